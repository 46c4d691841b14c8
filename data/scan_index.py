"""The index of scans: what is known of each file, so that the next scan need not open it."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from util import atomic_write, foreign_owner, is_own, open_regular

from .sound_print import PRINT

INDEX_HEAD = b"warble scan index 5\n"
INDEX_LIMIT = 1_000_000  # files in the index: those of this scan, then those of earlier ones
BLOCK = 8192  # files that are looked up at a time, to keep copies small

# What is known of a file, one record of the index. `key` stands for its path, size, modification
# time and inode, so that a changed file is an unknown one; a record with key 0 is not saved.
# What only few files have is not in the record but in a dict of texts: the SHA-256 of a readable
# file that seems to have a duplicate, or the reason why a file is unreadable. Prints of the sound
# are in a table of their own, since only decoded files have one.
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
PRINT_RECORD = np.dtype([("key", "u8"), ("print", PRINT)])
PREFIX = len(INDEX_HEAD) + hashlib.sha256().digest_size  # bytes before the body


def hash64(content: bytes) -> int:
    """64-bit hash. The chance that any two of a million files collide is 3e-8."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def recall(records: np.ndarray, index: str | os.PathLike | None
           ) -> tuple[dict[int, str], dict[int, bytes]]:
    """Fill in the records (n,) whose keys the index knows.

    -> ({position of a record: its text}, {position of a record: PRINT of its file}).
    """
    known, text_of_key, prints = _load(index)
    if len(known) == 0:
        return {}, {}
    keys = known["key"].copy()  # contiguous, to be searched
    for begin in range(0, len(records), BLOCK):
        block = records[begin:begin + BLOCK]
        position = np.minimum(np.searchsorted(keys, block["key"]), len(keys) - 1)
        is_known = keys[position] == block["key"]
        block[is_known] = known[position[is_known]]
    with_text = np.flatnonzero(records["has_text"]).tolist()
    texts = {i: text_of_key[int(records["key"][i])] for i in with_text}
    decoded = np.flatnonzero(records["decoded"])
    print_keys = prints["key"].copy()
    position = np.searchsorted(print_keys, records["key"][decoded])
    return texts, {
        i: prints["print"][at].tobytes() for i, at in zip(decoded.tolist(), position.tolist())
        if at < len(print_keys) and print_keys[at] == records["key"][i]}


def save(index: str | os.PathLike, records: np.ndarray, texts: dict[int, str],
         prints: dict[int, bytes]) -> list[str]:
    """Add records to those that the index has now, up to INDEX_LIMIT. -> lines on what failed.

    If two scans write at the same moment the last one wins; the next scan then opens again what
    only the other one saw.
    """
    known, text_of_key, known_prints = _load(index)
    text_of_key.update((int(records["key"][i]), text) for i, text in texts.items())
    merged = np.concatenate([records[records["key"] != 0], known])[:INDEX_LIMIT]
    first_of_key = np.unique(merged["key"], return_index=True)[1]  # the first is the newest
    merged = merged[first_of_key]
    text_of_key = {key: text_of_key[key] for key in merged["key"][merged["has_text"]].tolist()}
    merged_prints = _merge_prints(records, prints, known_prints, merged["key"])
    body = b"".join([len(merged).to_bytes(8, "little"), len(merged_prints).to_bytes(8, "little"),
                     merged, merged_prints, json.dumps(text_of_key).encode()])
    owner = foreign_owner(Path(index).parent)
    if owner:
        return [f"the scan is not saved: {owner}; give another --cache-dir"]
    try:
        with atomic_write(index, "wb") as file:
            file.write(INDEX_HEAD + hashlib.sha256(body).digest() + body)
    except OSError as error:
        return [f"the scan is not saved: {index}: {error.strerror}"]
    return []


def _merge_prints(records, prints, known, keys):
    """PRINT_RECORDs (k,) sorted by key: the new prints and the known ones of files with `keys`."""
    files = np.fromiter(prints, np.int64, len(prints))
    new = np.zeros(len(files), PRINT_RECORD)
    new["key"] = records["key"][files]
    new["print"] = np.frombuffer(b"".join(prints.values()), PRINT)
    merged = np.concatenate([new, known])
    merged = merged[np.unique(merged["key"], return_index=True)[1]]  # the first is the newest
    return merged[np.isin(merged["key"], keys)]


def _load(index):
    """Records (m,) sorted by key, {key: text} and PRINT_RECORDs (k,) sorted by key.

    All are empty if there is no valid index.
    """
    content = _read_own(index) if index is not None else b""
    body = memoryview(content)[PREFIX:]
    if content[:PREFIX] != INDEX_HEAD + hashlib.sha256(body).digest():
        return np.zeros(0, RECORD), {}, np.zeros(0, PRINT_RECORD)
    n, n_prints = (int.from_bytes(body[begin:begin + 8], "little") for begin in (0, 8))
    records = np.frombuffer(body[16:], RECORD, n)
    body = body[16 + records.nbytes:]
    prints = np.frombuffer(body, PRINT_RECORD, n_prints)
    texts = json.loads(bytes(body[prints.nbytes:]))
    return records, {int(key): text for key, text in texts.items()}, prints


def _read_own(index):
    """The bytes of an index that this user wrote; nothing if it is another's or no file."""
    if foreign_owner(Path(index).parent):
        return b""
    try:
        with open_regular(index) as file:
            return file.read() if is_own(os.fstat(file.fileno())) else b""
    except OSError:
        return b""
