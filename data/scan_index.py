"""The index of scans: what is known of each file, so that the next scan need not open it."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from util import atomic_write, foreign_owner, is_own, open_regular

INDEX_HEAD = b"warble scan index 4\n"
INDEX_LIMIT = 1_000_000  # files in the index: those of this scan, then those of earlier ones
BLOCK = 8192  # files that are looked up at a time, to keep copies small

# What is known of a file, one record of the index. `key` stands for its path, size, modification
# time and inode, so that a changed file is an unknown one; a record with key 0 is not saved.
# What only few files have is not in the record but in a dict of texts: the SHA-256 of a readable
# file that seems to have a duplicate, or the reason why a file is unreadable.
RECORD = np.dtype([
    ("key", "u8"),
    ("ok", "?"),  # readable
    ("decoded", "?"),  # from end to end, not just its header
    ("has_text", "?"),
    ("channels", "u2"),
    ("rate", "i4"),  # Hz
    ("frames", "i8"),  # those that decode, if decoded
    ("declared", "i8"),  # frames that the header declares, if those are more
    ("opposite", "?"),  # the channels cancel each other; seen by decoding
    ("fingerprint", "u8"),  # of a few pieces of the content; 0: not taken
])
PREFIX = len(INDEX_HEAD) + hashlib.sha256().digest_size  # bytes before the body


def hash64(content: bytes) -> int:
    """64-bit hash. The chance that any two of a million files collide is 3e-8."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def recall(records: np.ndarray, index: str | os.PathLike | None) -> dict[int, str]:
    """Fill in the records (n,) whose keys the index knows. -> {position of a record: its text}."""
    known, text_of_key = _load(index)
    if len(known) == 0:
        return {}
    keys = known["key"].copy()  # contiguous, to be searched
    for begin in range(0, len(records), BLOCK):
        block = records[begin:begin + BLOCK]
        position = np.minimum(np.searchsorted(keys, block["key"]), len(keys) - 1)
        is_known = keys[position] == block["key"]
        block[is_known] = known[position[is_known]]
    with_text = np.flatnonzero(records["has_text"]).tolist()
    return {i: text_of_key[int(records["key"][i])] for i in with_text}


def save(index: str | os.PathLike, records: np.ndarray, texts: dict[int, str]) -> list[str]:
    """Add records to those that the index has now, up to INDEX_LIMIT. -> lines on what failed.

    If two scans write at the same moment the last one wins; the next scan then opens again what
    only the other one saw.
    """
    known, text_of_key = _load(index)
    text_of_key.update((int(records["key"][i]), text) for i, text in texts.items())
    merged = np.concatenate([records[records["key"] != 0], known])[:INDEX_LIMIT]
    first_of_key = np.unique(merged["key"], return_index=True)[1]  # the first is the newest
    merged = merged[first_of_key]
    text_of_key = {key: text_of_key[key] for key in merged["key"][merged["has_text"]].tolist()}
    body = b"".join([len(merged).to_bytes(8, "little"), merged, json.dumps(text_of_key).encode()])
    owner = foreign_owner(Path(index).parent)
    if owner:
        return [f"the scan is not saved: {owner}; give another --cache-dir"]
    try:
        with atomic_write(index, "wb") as file:
            file.write(INDEX_HEAD + hashlib.sha256(body).digest() + body)
    except OSError as error:
        return [f"the scan is not saved: {index}: {error.strerror}"]
    return []


def _load(index):
    """Records (m,) sorted by key, and {key: text}; empty if there is no valid index."""
    content = _read_own(index) if index is not None else b""
    body = memoryview(content)[PREFIX:]
    if content[:PREFIX] != INDEX_HEAD + hashlib.sha256(body).digest():
        return np.zeros(0, RECORD), {}
    n = int.from_bytes(body[:8], "little")
    records = np.frombuffer(body[8:], RECORD, n)
    texts = json.loads(bytes(body[8 + records.nbytes:]))
    return records, {int(key): text for key, text in texts.items()}


def _read_own(index):
    """The bytes of an index that this user wrote; nothing if it is another's or no file."""
    if foreign_owner(Path(index).parent):
        return b""
    try:
        with open_regular(index) as file:
            return file.read() if is_own(os.fstat(file.fileno())) else b""
    except OSError:
        return b""
