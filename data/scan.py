"""What is on the disk: audio files below a folder, what is in each, which are broken, which are the same.

A scan reads headers (or, with full=True, decodes everything once) and remembers what it saw in an index
file, so that the next one opens only what is new or has changed.
"""
import csv
import hashlib
import io
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .audio import AUDIO_SUFFIXES, AudioError, check, probe

WORKERS = min(8, 2 * (os.cpu_count() or 1))  # libsndfile works without the GIL, and a disk likes a queue
PIECE = 4096  # bytes at the start, middle and end of a file that go into its fingerprint
INDEX_HEAD = b"warble scan index 3\n"
INDEX_LIMIT = 1_000_000  # files remembered: those of this scan, then the ones of earlier scans
PART = 8192  # files that are looked up in the index at a time, to keep copies small

# What is known of every file. `key` stands for its path, size, mtime and inode, so that a changed file is an
# unknown one; a fact whose key is 0 is not remembered. `print` is the fingerprint, 0 if not taken. What only a
# few files have is no field here but in a dict of texts, file -> the SHA-256 (hex) of a good one that has a twin,
# or why a broken one is broken; `noted` are the files that are in it.
FACT = np.dtype([("key", "u8"), ("ok", "?"), ("full", "?"), ("noted", "?"), ("channels", "u2"), ("rate", "i4"),
                 ("frames", "i8"), ("print", "u8")])


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
    files: int  # that the rows are of


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
    return np.fromiter((seen.setdefault(value, len(seen)) for value in values), np.int32)


def unite(one, other):
    """Codes (n,) int32 from 0 of the finest grouping in which rows that share a code in `one` or in
    `other`, both (n,) codes from 0, are together."""
    if len(np.unique(other)) == len(other):  # it puts nothing together
        return one
    from scipy.sparse import coo_array  # a quarter of a second, which --help need not wait for
    from scipy.sparse.csgraph import connected_components

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
    root, paths = os.path.join(manifest.root, ""), list(dict.fromkeys(manifest.paths))

    def name(file):  # not a list of them: they are long
        return root + paths[file]

    facts, size = _stat(name, len(paths))
    texts = _recall(facts, index)
    opened, notes = np.zeros(len(paths), bool), []
    try:
        _look(name, facts, texts, opened, full)
        same = _same_content(name, facts, texts, opened, size)
    finally:  # interrupted too: what was seen need not be seen again
        if index is not None and opened.any():
            notes += _save_index(index, facts, texts)

    ok = facts["ok"][file_of]
    seconds = (facts["frames"] / np.maximum(facts["rate"], 1)).astype(np.float32)[file_of]
    duration = np.where(ok, np.fmin(manifest.end, seconds) - manifest.start, 0).astype(np.float32)
    reasons = {row: texts[file_of[row]] for row in np.flatnonzero(~ok).tolist()}
    for row in np.flatnonzero(ok & (duration <= 0)).tolist():
        reasons[row] = f"the clip starts at {manifest.start[row]:g} s, but the file ends at {seconds[row]:g} s"
        ok[row], duration[row] = False, 0
    return Scan(duration, facts["rate"][file_of], facts["channels"][file_of].astype(np.int16), ok, reasons,
                _rows_of(same, file_of), full, time.perf_counter() - began, int(opened.sum()), notes, len(paths))


def _rows_of(same, file_of):
    """Lists of the rows of each set of files, in rising order."""
    set_of = np.full(len(file_of), -1, np.int32)  # of each file; there are no more files than rows
    for number, files in enumerate(same):
        set_of[files] = number
    rows = np.flatnonzero(set_of[file_of] >= 0)
    return sorted(rows[at].tolist() for at in sets_of(set_of[file_of[rows]]))


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
    lines = [f"{n} clips in {scan.files} files, {scan.duration.sum(dtype=float) / 3600:.2f} h; {scan.fresh} files "
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
    found, counts = np.unique(values, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:4]
    rest = len(found) - 4
    return (", ".join(f"{found[i]}{unit} x {counts[i]}" for i in frequent)
            + (f" and {rest} more" if rest > 0 else ""))


def _stat(name, n):
    """Empty facts (n,) with their keys, and sizes (n,) in bytes, -1 where there is no file."""
    facts, size = np.zeros(n, FACT), np.full(n, -1, np.int64)
    key = facts["key"]
    for i in range(n):
        path = name(i)
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        size[i] = status.st_size
        key[i] = _hash(os.fsencode(f"{path}\0{status.st_size} {status.st_mtime_ns} {status.st_ino}"))
    return facts, size


def _hash(content):
    """64 bits of a hash; that any two of a million files share one has a chance of 3e-8."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _recall(facts, index):
    """Fill in what the index knows. Returns the texts of these files."""
    known, said = _load_index(index)
    if len(known) == 0:
        return {}
    keys = known["key"].copy()  # side by side, to be searched
    for begin in range(0, len(facts), PART):
        part = facts[begin:begin + PART]
        at = np.minimum(np.searchsorted(keys, part["key"]), len(keys) - 1)
        hit = keys[at] == part["key"]
        part[hit] = known[at[hit]]
    return {i: said[int(facts["key"][i])] for i in np.flatnonzero(facts["noted"]).tolist()}


def _look(name, facts, texts, opened, full):
    """Read the headers of the files that are not known, or decode those not known to decode.

    That a header is bad is not remembered: mending a permission leaves the key as it is. That decoding
    fails is, since headers do not show it; only the next full scan tries again.
    """
    def look(i):
        opened[i], fact = True, facts[i]
        key, fact["key"] = fact["key"], 0
        if not fact["ok"]:
            texts.pop(i, None)
        fact["ok"] = fact["full"] = False
        try:
            info = probe(name(i))
            if full:
                fact["full"] = True
                info = check(name(i))
            fact["rate"], fact["channels"], fact["frames"], fact["ok"] = info.rate, info.channels, info.frames, True
        except AudioError as error:
            texts[i] = str(error).encode(errors="replace").decode()
        fact["noted"] = i in texts
        if fact["ok"] or fact["full"]:
            fact["key"] = key

    known = facts["ok"] & facts["full"] if full else facts["ok"] | facts["full"]
    _each(look, np.flatnonzero(~known).tolist())


def _same_content(name, facts, texts, opened, size):
    """Arrays of files with equal bytes: equal size, then equal fingerprint, then equal SHA-256."""
    def fingerprint(i):
        facts["print"][i] = _fingerprint(name(i), int(size[i]))

    def digest(i):
        texts[i], facts["noted"][i] = _sha256(name(i)), True  # in this order: an error leaves both

    def read(look, files):
        """look(file) for the files; one that cannot be read any more is broken."""
        def careful(i):
            opened[i] = True
            try:
                look(i)
            except OSError as error:  # gone since its header was read
                facts["key"][i], facts["ok"][i] = 0, False
                texts[i] = f"cannot be read: {error.strerror}"
        _each(careful, files.tolist())

    alike = np.flatnonzero(facts["ok"])
    alike = alike[_shared(size[alike])]
    read(fingerprint, alike[facts["print"][alike] == 0])
    alike = alike[facts["ok"][alike]]
    alike = alike[_shared(facts["print"][alike])]
    read(digest, alike[~facts["noted"][alike]])
    alike = alike[facts["ok"][alike]]
    content = codes(texts[i] for i in alike.tolist())
    return [alike[files] for files in sets_of(content) if len(files) > 1]


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
    """64 bits of a hash of the size and of the file's start, middle and end."""
    file = os.open(name, os.O_RDONLY)
    try:
        if size <= 3 * PIECE:
            pieces = [os.pread(file, 3 * PIECE, 0)]
        else:
            pieces = [os.pread(file, PIECE, start) for start in (0, size // 2, size - PIECE)]
    finally:
        os.close(file)
    return _hash(b"%d" % size + b"".join(pieces))


def _sha256(name):
    digest = hashlib.sha256()
    with open(name, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _shared(values):
    """Mask (n,) of the values that are there more than once."""
    order = np.argsort(values, kind="stable")
    again = np.flatnonzero(np.diff(values[order]) == 0)
    shared = np.zeros(len(values), bool)
    shared[order[again]] = shared[order[again + 1]] = True
    return shared


def sets_of(values):
    """Arrays of the indices of equal values, one per distinct value in rising order."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(order) else []


def _load_index(index):
    """Facts (m,) sorted by key, and the texts by key; none if there is no sound index."""
    try:
        content = Path(index).read_bytes() if index is not None else b""
    except OSError:
        content = b""
    start = len(INDEX_HEAD) + 32
    body = memoryview(content)[start:]
    if content[:start] != INDEX_HEAD + hashlib.sha256(body).digest():
        return np.zeros(0, FACT), {}
    m = int.from_bytes(body[:8], "little")
    known = np.frombuffer(body[8:], FACT, m)
    return known, {int(key): text for key, text in json.loads(bytes(body[8 + known.nbytes:])).items()}


def _save_index(index, facts, texts):
    """Add these facts to those that the index has now, up to the limit. Of runs side by side that write in the
    same moment the last one wins; what only the others saw is looked at once more. Returns lines that say what
    went wrong."""
    known, said = _load_index(index)
    said.update((int(facts["key"][i]), text) for i, text in texts.items())
    known = np.concatenate([facts[facts["key"] != 0], known])[:INDEX_LIMIT]
    known = known[np.unique(known["key"], return_index=True)[1]]  # the first of a key is the newest
    said = {key: said[key] for key in known["key"][known["noted"]].tolist()}
    body = b"".join([len(known).to_bytes(8, "little"), known, json.dumps(said).encode()])
    try:
        write_atomic(index, INDEX_HEAD + hashlib.sha256(body).digest() + body)
    except OSError as error:
        return [f"the scan is not remembered: {index}: {error.strerror}"]
    return []
