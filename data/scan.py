"""Scan the files of a manifest: what is in each, which are unreadable, which are duplicates.

A scan reads headers, or with full=True decodes every file once. It saves what it saw in an index,
so that the next scan opens only files that are new or have changed.
"""
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from util import CsvWriter, atomic_write, plural, printable, sha256_of, summarize

from . import scan_index
from .audio import AccessError, AudioError, AudioInfo, check, probe
from .grouping import factorize, indices_by_value, is_repeated
from .manifest import Manifest
from .near import connect, describe_near, pairs_of_clips
from .sound_print import PRINT, near_pairs

WORKERS = min(8, 2 * (os.cpu_count() or 1))  # libsndfile works without the GIL
PIECE = 4096  # bytes at the start, middle and end of a file that its fingerprint covers


@dataclass
class Scan:
    """What a scan found. Arrays have one entry per row of the manifest."""
    duration: np.ndarray  # (n,) float32 seconds of the clip, cut at the file's end; 0 if not ok
    rate: np.ndarray  # (n,) int32 Hz
    channels: np.ndarray  # (n,) int16
    ok: np.ndarray  # (n,) bool
    reasons: dict[int, str]  # row -> why it cannot be used, for every row that is not ok
    duplicates: list[list[int]]  # rows of byte-identical files under different paths
    full: bool  # whether files were decoded
    seconds: float  # that the scan took
    n_files: int
    n_opened: int  # files; the others were in the index
    notes: list[str]  # problems that did not stop the scan
    truncated: dict[int, str]  # row that is ok -> its file ends early, and how much it has
    opposite: np.ndarray  # (n,) bool: the channels cancel each other, so one of them is used
    file_seconds: np.ndarray | None = None  # (n,) float32 length of each clip's file; 0 if bad
    # (k, 2) rows of near-identical clips (data/near.py); byte-identical files count once.
    near: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    copies: list[list[int]] = field(default_factory=list)  # rows of equal or near-identical files
    prints: np.ndarray | None = None  # (n,) PRINT of each clip's file; 0 if not known


def scan(manifest: Manifest, index: str | os.PathLike | None, full: bool) -> Scan:
    """Look into every file of a manifest once, however many rows use it.

    index: the file to remember results in, or None. It is made if it is missing or damaged, and
        runs side by side may share it.
    full: decode every file from end to end. Otherwise only headers are read, and a file that an
        earlier full scan found unreadable stays so until it changes.

    An unreadable file gives a row that is not ok, never an exception.
    """
    began = time.perf_counter()
    file_of = factorize(manifest.paths)  # (n,) file of each row
    files = _Files(manifest.root, list(dict.fromkeys(manifest.paths)), index)
    try:
        files.inspect(full)
        duplicate_files = files.find_duplicates()
        near_files, prints = files.find_near(duplicate_files)
    finally:  # also on Ctrl-C: what was seen need not be seen again
        notes = files.describe_messages()
        if index is not None and files.opened.any():
            notes += scan_index.save(index, files.records, files.texts, files.prints)

    records = files.records
    ok = records["ok"][file_of]
    file_seconds = records["frames"] / np.maximum(records["rate"], 1)
    file_seconds = file_seconds.astype(np.float32)[file_of]
    duration = np.where(ok, np.fmin(manifest.end, file_seconds) - manifest.start, 0)
    duration = duration.astype(np.float32)
    reasons = {row: files.texts[file_of[row]] for row in np.flatnonzero(~ok).tolist()}
    for row in np.flatnonzero(ok & (duration <= 0)).tolist():
        reasons[row] = (f"the clip starts at {manifest.start[row]:g} s, but the file ends at "
                        f"{file_seconds[row]:g} s")
        ok[row] = False
        duration[row] = 0
    reaches_end = ok & ~(manifest.end <= file_seconds + 0.05)
    is_truncated = records["declared"] > records["frames"]
    truncated = {row: files.describe_truncation(file_of[row])
                 for row in np.flatnonzero(is_truncated[file_of] & reaches_end).tolist()}
    return Scan(
        truncated=truncated, opposite=ok & records["opposite"][file_of],
        duration=duration, rate=records["rate"][file_of],
        channels=records["channels"][file_of].astype(np.int16), ok=ok, reasons=reasons,
        duplicates=_rows_of_files(duplicate_files, file_of), full=full,
        seconds=time.perf_counter() - began, n_files=len(records),
        n_opened=int(files.opened.sum()), notes=notes,
        file_seconds=np.where(records["ok"][file_of], file_seconds, 0),
        near=pairs_of_clips(manifest, file_of, near_files),
        copies=_rows_of_files(connect(near_files, duplicate_files), file_of),
        prints=None if prints is None else prints[file_of])


def summary(scan: Scan, manifest: Manifest) -> list[str]:
    """Describe a scan in a few lines."""
    ok = scan.ok
    hours = scan.duration.sum(dtype=float) / 3600
    verb = "decoded" if scan.full else "opened"
    lines = [f"{plural(len(manifest), 'clip')} in {plural(scan.n_files, 'file')}, {hours:.2f} h; "
             f"{verb} {plural(scan.n_opened, 'file')} in {scan.seconds:.1f} s"]
    if ok.any():
        shortest, median, longest = np.quantile(scan.duration[ok], [0, 0.5, 1])
        lines.append(f"length {shortest:.2f} / {median:.2f} / {longest:.2f} s (shortest / median / "
                     "longest)")
        lines.append(f"{_count_values(scan.rate[ok], ' Hz')}; "
                     f"{_count_values(scan.channels[ok], ' channel(s)')}")
    n_cut = int((manifest.end[ok] > manifest.start[ok] + scan.duration[ok] + 0.05).sum())
    if n_cut:
        lines.append(f"cut at the end of their file: {plural(n_cut, 'clip')}")
    if scan.truncated:
        n_short = plural(len(scan.truncated), "clip")
        lines.append(f"truncated: {n_short}, used up to where the file ends (--truncated refuse "
                     f"leaves them out): {_examples(scan.truncated, manifest)}")
    if scan.opposite.any():
        rows = np.flatnonzero(scan.opposite)
        lines.append(f"opposite phase: the channels of {plural(len(rows), 'clip')} cancel each "
                     f"other, so one of them is used, e.g. {manifest.paths[rows[0]]}")
    if scan.reasons:
        n_bad = plural(len(scan.reasons), "unreadable clip")
        lines.append(f"left out: {n_bad}: {_examples(scan.reasons, manifest)}")
    if scan.duplicates:
        distinct = [dict.fromkeys(manifest.paths[row] for row in rows) for rows in scan.duplicates]
        n_copies = sum(len(paths) - 1 for paths in distinct)
        first, second = list(distinct[0])[:2]
        verb = "is" if n_copies == 1 else "are"
        lines.append(f"{plural(n_copies, 'file')} {verb} byte-identical to another, e.g. {first} = "
                     f"{second}")
    lines += describe_near(manifest, scan.near)
    return [printable(line) for line in lines + scan.notes]


def _examples(reasons, manifest, most=3):
    """"a.wav: why; b.wav: why; ..."."""
    examples = [f"{manifest.paths[row]}: {reasons[row]}" for row in sorted(reasons)]
    if len(examples) > most:
        examples[most:] = ["..."]
    return "; ".join(examples)


def refuse_truncated(scan: Scan) -> None:
    """Change a scan so that truncated clips are not ok."""
    rows = list(scan.truncated)
    scan.ok[rows] = False
    scan.duration[rows] = 0
    scan.reasons.update(scan.truncated)
    scan.truncated = {}


def write_bad_files(bad: Iterable[tuple[str, str]], path: str | os.PathLike) -> None:
    """Write a CSV of (path, reason) pairs, each pair once."""
    with atomic_write(path) as file:
        writer = CsvWriter(file)
        writer.writerow(["path", "reason"])
        writer.writerows(dict.fromkeys(map(tuple, bad)))


class _Files:
    """The files of a manifest and what is known of each."""

    def __init__(self, root, paths, index):
        n = len(paths)
        self.prefix = os.path.join(root, "")
        self.paths = paths  # relative; a list of full paths would be large
        self.records = np.zeros(n, scan_index.RECORD)
        self.size = np.full(n, -1, np.int64)  # bytes; -1: no such file
        self.opened = np.zeros(n, bool)
        self.messages = {}  # file -> what its decoder printed
        self._stat()
        self.texts, self.prints = scan_index.recall(self.records, index)

    def path(self, i):
        return self.prefix + self.paths[i]

    def _stat(self):
        for i in range(len(self.paths)):
            path = self.path(i)
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                continue
            self.size[i] = status.st_size
            identity = f"{path}\0{status.st_size} {status.st_mtime_ns} {status.st_ino}"
            self.records["key"][i] = scan_index.hash64(os.fsencode(identity))

    def inspect(self, full):
        """Read the headers of unknown files; with `full`, decode those that were not decoded."""
        ok, decoded = self.records["ok"], self.records["decoded"]
        if full:
            known = ok & decoded
        else:
            known = ok | decoded
        _run_in_threads(lambda i: self._inspect_file(i, full), np.flatnonzero(~known).tolist())

    def _inspect_file(self, i, full):
        """Fill in the record of a file, and its text if it is unreadable.

        A bad header is not saved, since a changed permission leaves the key as it is. A failed
        decoding is, since the header does not show it; only the next full scan tries again. What
        the system refuses to read is not saved: it may be the disk.
        """
        self.opened[i] = True
        record = self.records[i]  # a view
        key = record["key"]
        record["key"] = 0  # do not save it as long as it is incomplete
        if not record["ok"]:
            self.texts.pop(i, None)  # an old reason
        record["ok"] = record["decoded"] = False
        self.prints.pop(i, None)
        try:
            info = probe(self.path(i))
            if full:
                record["decoded"] = True
                info = check(self.path(i))
                if info.sound:
                    self.prints[i] = info.sound
            record["rate"], record["channels"] = info.rate, info.channels
            record["frames"], record["declared"] = info.frames, info.declared
            record["opposite"] = info.opposite
            record["ok"] = True
            if info.messages:
                self.messages[i] = info.messages[0]
        except AccessError as error:
            record["decoded"] = False
            self.texts[i] = str(error)
        except AudioError as error:
            self.texts[i] = str(error).encode(errors="replace").decode()
        record["has_text"] = i in self.texts
        if record["ok"] or record["decoded"]:
            record["key"] = key

    def describe_truncation(self, i):
        record = self.records[i]
        return AudioInfo(int(record["rate"]), int(record["frames"]), 1, "",
                         int(record["declared"])).describe_truncation()

    def describe_messages(self):
        """A line on what decoders printed about files that can be used."""
        lines = [f"{self.paths[i]}: {text[:150]}" for i, text in sorted(self.messages.items())
                 if self.records["ok"][i]]
        return [f"the decoder complains: {summarize(lines, 3)}"] if lines else []

    def find_duplicates(self):
        """Arrays of files with equal content.

        Compares sizes, then fingerprints of files of equal size, then SHA-256 of files with equal
        fingerprints.
        """
        records = self.records
        candidates = np.flatnonzero(records["ok"])
        candidates = candidates[is_repeated(self.size[candidates])]
        self._read(self._take_fingerprint, candidates[records["fingerprint"][candidates] == 0])
        candidates = candidates[records["ok"][candidates]]
        candidates = candidates[is_repeated(records["fingerprint"][candidates])]
        self._read(self._take_digest, candidates[~records["has_text"][candidates]])
        candidates = candidates[records["ok"][candidates]]
        content = factorize(self.texts[i] for i in candidates.tolist())
        return [candidates[same] for same in indices_by_value(content) if len(same) > 1]

    def find_near(self, duplicate_files):
        """((k, 2) near-identical files, (n,) PRINT of each file or None if no file has one).

        Byte-identical files count once.
        """
        files = np.array(sorted(i for i in self.prints if self.records["ok"][i]), np.int64)
        if len(files) == 0:
            return np.zeros((0, 2), np.int64), None
        prints = np.zeros(len(self.records), PRINT)
        prints[files] = np.frombuffer(b"".join(self.prints[i] for i in files.tolist()), PRINT)
        copies = [i for same in duplicate_files for i in same[1:]]
        files = np.setdiff1d(files, copies)
        seconds = self.records["frames"][files] / self.records["rate"][files]
        return files[near_pairs(prints[files], seconds)], prints

    def _read(self, take, files):
        """take(file) for each file. A file that has vanished since its header was read is bad."""
        def take_carefully(i):
            self.opened[i] = True
            try:
                take(i)
            except OSError as error:
                self.records["key"][i] = 0
                self.records["ok"][i] = False
                self.texts[i] = f"cannot be read: {error.strerror}"

        _run_in_threads(take_carefully, files.tolist())

    def _take_fingerprint(self, i):
        size = int(self.size[i])
        with open(self.path(i), "rb", buffering=0) as file:
            if size <= 3 * PIECE:
                pieces = [os.pread(file.fileno(), 3 * PIECE, 0)]
            else:
                starts = (0, size // 2, size - PIECE)
                pieces = [os.pread(file.fileno(), PIECE, start) for start in starts]
        self.records["fingerprint"][i] = scan_index.hash64(b"%d" % size + b"".join(pieces))

    def _take_digest(self, i):
        self.texts[i] = sha256_of(self.path(i))
        self.records["has_text"][i] = True  # last, so that an error leaves both as they were


def _rows_of_files(sets_of_files, file_of):
    """Sorted lists of the rows of each set of files."""
    set_of_file = np.full(len(file_of), -1, np.int32)  # there are no more files than rows
    for number, files in enumerate(sets_of_files):
        set_of_file[files] = number
    set_of_row = set_of_file[file_of]
    rows = np.flatnonzero(set_of_row >= 0)
    return sorted(rows[indices].tolist() for indices in indices_by_value(set_of_row[rows]))


def _count_values(values, unit, most=4):
    """"44100 Hz x 20, 48000 Hz x 3 and 2 more"."""
    distinct, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    text = ", ".join(f"{distinct[i]}{unit} x {counts[i]}" for i in order[:most])
    n_more = len(distinct) - most
    return f"{text} and {n_more} more" if n_more > 0 else text


def _run_in_threads(function: Callable[[int], None], items: list[int]) -> None:
    """Call function(item) for each item on a few threads; on Ctrl-C begin no further item."""
    waiting = iter(items)  # shared by the threads

    def work():
        for item in waiting:
            function(item)

    pool = ThreadPoolExecutor(WORKERS)
    try:
        jobs = [pool.submit(work) for _ in range(min(WORKERS, len(items)))]
        for job in jobs:
            job.result()
    finally:
        for _ in waiting:  # empty it, so that the threads end
            pass
        pool.shutdown()
