"""What is on the disk: audio files below a folder, what is in each, which are broken, which are the same.

A scan reads headers (or, with full=True, decodes everything once) and remembers what it saw in an index
file, so that the next one opens only what is new or has changed.
"""
import csv
import hashlib
import io
import os
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .audio import AUDIO_SUFFIXES, AudioError, check, probe

WORKERS = min(8, 2 * (os.cpu_count() or 1))  # libsndfile works without the GIL, and a disk likes a queue
PIECE = 4096  # bytes at the start, middle and end of a file that go into its fingerprint
INDEX_HEAD = b"warble scan index 2\n"
INDEX_LIMIT = 1_000_000  # files remembered: those of this scan, then the ones of earlier scans

# What is known of a file. `key` stands for its path, size, mtime and inode, so that a changed file is an
# unknown one; without a key the fact is not remembered.
FACT = np.dtype([("key", "S16"), ("ok", "?"), ("full", "?"), ("rate", "i4"), ("channels", "i4"), ("frames", "i8"),
                 ("print", "S16"), ("digest", "S32"), ("reason", "S160")])


@dataclass
class Scan:
    """What the files of a manifest hold; arrays run over the manifest's rows."""
    duration: np.ndarray  # (n,) float32 seconds of the clip, cut at the file's end; 0 for a broken file
    rate: np.ndarray  # (n,) int32 Hz
    channels: np.ndarray  # (n,) int16
    ok: np.ndarray  # (n,) bool
    reasons: dict[int, str]  # row -> why it cannot be used, for every row that is not ok
    duplicates: list[list[int]]  # rows of byte-identical files under different paths
    full: bool  # decoded, not only the headers read
    seconds: float  # that the scan took
    fresh: int  # files opened; the index knew the others
    notes: list[str]  # what went wrong without stopping the scan


def printable(text):
    """`text` with line breaks and undecodable bytes escaped, so that it fits on one line anywhere."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def suffix(name):
    """Lower-case suffix with its dot, or ""."""
    return os.path.splitext(name)[1].lower()


def audio_below(root, top, ignored):
    """Every path with an audio suffix below root/top, relative to root, in no order. What is no regular
    file is there too: the scan says why it cannot be used. Links to folders are followed.

    ignored: a Counter that is given the suffixes of the other files. Raises OSError for a folder that
    cannot be read.
    """
    def identity(folder):
        status = os.stat(folder)
        return status.st_dev, status.st_ino

    found, waiting = [], [(top, {identity(root)})]
    while waiting:
        folder, above = waiting.pop()
        here = identity(os.path.join(root, folder))
        if here in above:  # a link back to a folder that holds it
            continue
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if suffix(entry.name) in AUDIO_SUFFIXES:
                    found.append(path)
                elif entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry.path):
                    waiting.append((path, above | {here}))
                else:
                    ignored[suffix(entry.name)] += 1
    return found


def write_atomic(path, content):
    """Write bytes so that `path` holds the old content or the new, whatever happens in between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def codes(values):
    """Codes (n,) int32 of hashable values, numbered from 0 as they first come."""
    seen = {}
    return np.array([seen.setdefault(value, len(seen)) for value in values], np.int32)


def unite(one, other):
    """Codes (n,) int32 from 0 of the finest grouping in which rows that share a code in `one` or in
    `other`, both (n,) codes from 0, are together."""
    size = int(one.max()) + 1
    graph = coo_array((np.ones(len(one)), (one, size + other)), shape=(size + int(other.max()) + 1,) * 2)
    return connected_components(graph, directed=False)[1][one]


def scan(manifest, index, full):
    """Look into every file of a manifest once, however many rows use it.

    index: a file that remembers what was seen, or None; it is made, and made anew when damaged, and runs
    side by side may share it. full: decode every file from end to end; otherwise only headers are read,
    and a file that an earlier full scan found broken stays broken until it changes.

    Returns a Scan; a broken file is a row that is not ok, never an exception.
    """
    began = time.perf_counter()
    file_of = codes(manifest.paths)  # (n,) file of each row
    names = [os.path.join(manifest.root, path) for path in dict.fromkeys(manifest.paths)]
    facts, size = _stat(names)
    known = _load_index(index)
    _recall(facts, known)
    opened, notes = np.zeros(len(names), bool), []
    try:
        _look(names, facts, opened, full)
        same = _same_content(names, facts, opened, size)
    finally:  # interrupted too: what was seen need not be seen again
        if index is not None and opened.any():
            notes += _save_index(index, facts, known)

    ok = facts["ok"][file_of]
    seconds = (facts["frames"] / np.maximum(facts["rate"], 1)).astype(np.float32)[file_of]
    duration = np.where(ok, np.fmin(manifest.end, seconds) - manifest.start, 0).astype(np.float32)
    reasons = {int(row): facts["reason"][file_of[row]].decode(errors="replace") for row in np.flatnonzero(~ok)}
    for row in np.flatnonzero(ok & (duration <= 0)):
        reasons[int(row)] = f"the clip starts at {manifest.start[row]:g} s, but the file ends at {seconds[row]:g} s"
        ok[row], duration[row] = False, 0
    rows_of = _sets(file_of) if same else []
    duplicates = sorted(sorted(int(row) for file in files for row in rows_of[file]) for files in same)
    return Scan(duration, facts["rate"][file_of], facts["channels"][file_of].astype(np.int16), ok, reasons, duplicates,
                full, time.perf_counter() - began, int(opened.sum()), notes)


def write_bad_files(bad, path):
    """Write `path,reason` for every pair in `bad`, each once; only the header if there is none."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "reason"])
    writer.writerows(dict.fromkeys(map(tuple, bad)))
    write_atomic(path, os.fsencode(text.getvalue()))


def summary(scan, manifest):
    """A few lines on what was found."""
    ok, n = scan.ok, len(manifest)
    files = len(set(manifest.paths))
    lines = [f"{n} clips in {files} files, {scan.duration.sum(dtype=float) / 3600:.2f} h; {scan.fresh} files "
             f"{'decoded' if scan.full else 'opened'} in {scan.seconds:.1f} s"]
    if ok.any():
        low, middle, high = np.quantile(scan.duration[ok], [0, 0.5, 1])
        lines.append(f"length {low:.2f} / {middle:.2f} / {high:.2f} s (shortest / median / longest)")
        lines.append(f"{_count(scan.rate[ok], ' Hz')}; {_count(scan.channels[ok], ' channel(s)')}")
    late = int((manifest.end[ok] > manifest.start[ok] + scan.duration[ok] + 0.05).sum())
    if late:
        lines.append(f"{late} clips end after their file does and are cut there")
    if scan.reasons:
        first = "; ".join(f"{manifest.paths[row]}: {scan.reasons[row]}" for row in sorted(scan.reasons)[:3])
        lines.append(f"{len(scan.reasons)} clips left out as broken: {first}{'; ...' * (len(scan.reasons) > 3)}")
    if scan.duplicates:
        one, other = list(dict.fromkeys(manifest.paths[row] for row in scan.duplicates[0]))[:2]
        copies = sum(len({manifest.paths[row] for row in rows}) - 1 for rows in scan.duplicates)
        lines.append(f"{copies} files are byte-identical to another, e.g. {one} = {other}")
    return [printable(line) for line in lines + scan.notes]


def _count(values, unit):
    found = Counter(values.tolist()).most_common()
    rest = len(found) - 4
    return ", ".join(f"{value}{unit} x {n}" for value, n in found[:4]) + (f" and {rest} more" if rest > 0 else "")


def _stat(names):
    """Empty facts (files,) with their keys, and sizes (files,) in bytes, -1 where there is no file."""
    facts, size = np.zeros(len(names), FACT), np.full(len(names), -1, np.int64)
    for i, name in enumerate(names):
        try:
            status = os.stat(name)
        except (OSError, ValueError):
            continue
        size[i] = status.st_size
        state = os.fsencode(f"{name}\0{status.st_size} {status.st_mtime_ns} {status.st_ino}")
        facts["key"][i] = hashlib.blake2b(state, digest_size=16).digest()
    return facts, size


def _recall(facts, known):
    """Fill in what the index knows."""
    if len(known) == 0:
        return
    at = np.minimum(np.searchsorted(known["key"], facts["key"]), len(known) - 1)
    hit = known["key"][at] == facts["key"]
    facts[hit] = known[at[hit]]


def _look(names, facts, opened, full):
    """Read the headers of the files that are not known, or decode those not known to decode.

    That a header is bad is not remembered: mending a permission leaves the key as it is. That decoding
    fails is, since headers do not show it; only the next full scan tries again.
    """
    def look(i):
        opened[i], fact = True, facts[i]
        key, fact["key"], fact["ok"], fact["full"], fact["reason"] = fact["key"], b"", False, False, b""
        try:
            info = probe(names[i])
            if full:
                fact["full"] = True
                info = check(names[i])
            fact["rate"], fact["channels"], fact["frames"], fact["ok"] = info.rate, info.channels, info.frames, True
        except AudioError as error:
            fact["reason"] = str(error).encode(errors="replace")
        if fact["ok"] or fact["full"]:
            fact["key"] = key

    known = facts["ok"] & facts["full"] if full else facts["ok"] | (facts["reason"] != b"")
    _each(look, np.flatnonzero(~known).tolist())


def _same_content(names, facts, opened, size):
    """Arrays of files with equal bytes: equal size, then equal fingerprint, then equal SHA-256."""
    def fill(field, read, files):
        def look(i):
            opened[i] = True
            try:
                facts[field][i] = read(names[i], size[i])
            except OSError as error:  # gone since its header was read
                facts["key"][i], facts["ok"][i] = b"", False
                facts["reason"][i] = f"cannot be read: {error.strerror}".encode()
        _each(look, files[facts[field][files] == b""].tolist())
        return files[facts["ok"][files]]

    alike = np.flatnonzero(facts["ok"])
    alike = alike[_shared(size[alike])]
    for field, read in (("print", _fingerprint), ("digest", _sha256)):
        alike = fill(field, read, alike)
        alike = alike[_shared(facts[field][alike])]
    return [alike[files] for files in _sets(facts["digest"][alike])]


def _each(function, items):
    """function(item) for every item, on a few threads."""
    waiting = iter(items)  # the threads take turns at it

    def work():
        for item in waiting:
            function(item)

    pool = ThreadPoolExecutor(WORKERS)
    try:
        for job in [pool.submit(work) for _ in range(min(WORKERS, len(items)))]:
            job.result()
    finally:
        for _ in waiting:  # on Ctrl-C: nothing more is begun
            pass
        pool.shutdown()


def _fingerprint(name, size):
    digest = hashlib.blake2b(b"%d" % size, digest_size=16)
    with open(name, "rb", buffering=0) as file:
        for start in (0, size // 2, size - PIECE):
            file.seek(max(0, start))
            digest.update(file.read(PIECE))
    return digest.digest()


def _sha256(name, size):
    digest = hashlib.sha256()
    with open(name, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _shared(values):
    """Mask (n,) of the values that are there more than once."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _sets(values):
    """Arrays of the indices of equal values, one per distinct value in rising order."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(values[order][1:] != values[order][:-1]) + 1) if len(order) else []


def _load_index(index):
    """Facts (m,) sorted by key; none if there is no sound index."""
    try:
        content = Path(index).read_bytes() if index is not None else b""
    except OSError:
        content = b""
    head, body = content[:len(INDEX_HEAD) + 32], content[len(INDEX_HEAD) + 32:]
    sound = head == INDEX_HEAD + hashlib.sha256(body).digest()
    return np.frombuffer(body if sound else b"", FACT)


def _save_index(index, facts, known):
    """Write these facts and the older ones up to the limit. Of runs side by side the last one to write
    wins; what only the others saw is looked at once more. Returns lines that say what went wrong."""
    facts = np.concatenate([facts[facts["key"] != b""], known])[:INDEX_LIMIT]
    facts = facts[np.unique(facts["key"], return_index=True)[1]]  # the first of a key is the newest
    body = facts.tobytes()
    try:
        write_atomic(index, INDEX_HEAD + hashlib.sha256(body).digest() + body)
    except OSError as error:
        return [f"the scan is not remembered: {index}: {error.strerror}"]
    return []
