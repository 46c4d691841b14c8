"""Times of clips: which columns have them and in which unit, and whether they fit the files."""
import re
from typing import NamedTuple

import numpy as np

from .csv_table import column_name
from .manifest import DataError, Manifest

# Names of columns without their unit.
START = {"start", "start_time", "starttime", "begin", "begin_time", "begintime", "onset",
         "onset_time", "t_start", "tstart", "time_start", "t_min", "tmin", "xmin", "t0", "from",
         "event_start", "event_onset", "segment_start", "clip_start", "start_offset", "time_begin",
         "start_at", "offset_start"}
END = {"end", "end_time", "endtime", "stop", "stop_time", "finish", "t_end", "tend", "time_end",
       "t_max", "tmax", "xmax", "t1", "to", "until", "event_end", "event_offset", "segment_end",
       "clip_end", "end_offset", "offset_time", "time_stop", "stop_at", "end_at", "offset_end"}
DURATION = {"duration", "dur", "length", "len", "clip_duration", "segment_duration",
            "event_duration", "clip_length", "segment_length", "delta", "duration_time"}
OFFSET = {"offset"}  # an end beside a start, a start beside a duration
UNITS = {
    "s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1,
    "ms": 1e-3, "msec": 1e-3, "msecs": 1e-3, "millis": 1e-3, "millisecond": 1e-3,
    "milliseconds": 1e-3, "us": 1e-6, "microseconds": 1e-6,
    "min": 60, "mins": 60, "minute": 60, "minutes": 60, "h": 3600, "hours": 3600,
}
NOT_SECONDS = {"sample", "samples", "frame", "frames", "idx", "index"}
CLOCK = re.compile(r"(\d{4}-\d\d?-\d\d?[T ])?\d{1,2}:\d\d(:\d\d(\.\d+)?)?Z?")
FAR = 2  # times of a clip that end beyond this many lengths of its file are in another unit


class TimeColumn(NamedTuple):
    """A column of times."""
    index: int
    seconds: float  # per unit


def time_columns(header: list[str], used: list[bool], path: object) -> dict[str, TimeColumn]:
    """The columns of "start", "end" and "duration", as far as the table has them.

    used: whether a column has anything in it. Raises DataError if times cannot be read as seconds,
    or if it is not clear what a column means.
    """
    found = {}
    for i, name in enumerate(header):
        kind, unit = kind_of(column_name(name))
        if kind is None or not used[i]:
            continue
        if unit in NOT_SECONDS:
            if kind == "duration":
                continue
            raise DataError(f"{path}: the column {name} has times in {unit}; make it seconds, as a "
                            f"column {kind}")
        # The first of equals, but seconds come before other units.
        if kind not in found or (unit == "s" and found[kind].seconds != 1):
            found[kind] = TimeColumn(i, UNITS[unit])
    offset = found.pop("offset", None)
    if offset is not None:
        name = header[offset.index]
        if "start" in found and "end" not in found:
            found["end"] = offset
        elif "start" not in found and "duration" in found:
            found["start"] = offset
        elif "start" not in found and "end" not in found:
            raise DataError(f"{path}: the column {name} may be where a clip starts or ends; call "
                            "it start or end")
    if "start" not in found or "end" in found:
        found.pop("duration", None)  # of the whole file, or known already
    return found


def kind_of(name: str) -> tuple[str | None, str]:
    """What a column of this name has -> (start, end, offset, duration or None; unit)."""
    base, _, last = name.rpartition("_")
    unit = "s"
    if base and (last in UNITS or last in NOT_SECONDS):
        # begin_time_s and start_time_in_s; but t_min is a minimum.
        base = base.removesuffix("_in")
        if name not in START | END:
            name, unit = base, last
    first, _, rest = name.partition("_")
    if first in NOT_SECONDS and rest:  # sample_start
        name, unit = rest, first
    for kind, names in (("start", START), ("end", END), ("offset", OFFSET), ("duration", DURATION)):
        if name in names:
            return kind, unit
    return None, unit


def parse_time(text: str, column: TimeColumn) -> float:
    """Seconds; raises ValueError. A decimal comma is allowed."""
    if re.fullmatch(r"\d+,\d+", text):
        text = text.replace(",", ".")
    return float(text) * column.seconds


def is_clock_time(text: str) -> bool:
    """Whether a field is a time of day or a date with one."""
    return CLOCK.fullmatch(text.strip()) is not None


def check_times(manifest: Manifest, file_seconds: np.ndarray, rate: np.ndarray, max_bad_share: float
                ) -> None:
    """Raise DataError if more than this share of the clips end far beyond their files.

    Then the times are in milliseconds or samples. file_seconds: (n,) length of each clip's file, 0
    if it cannot be read. rate: (n,) its sampling rate in Hz.
    """
    known = file_seconds > 0
    last = np.where(np.isnan(manifest.end), manifest.start, manifest.end)
    is_far = known & (last > FAR * file_seconds) & (last > file_seconds + 0.5)
    n_far, n_known = int(is_far.sum()), int(known.sum())
    if n_far <= max_bad_share * n_known:
        return
    row = np.flatnonzero(is_far)[0]

    def fits(factor):
        share = last[known] * factor / file_seconds[known]
        return (share < 1.05).mean() > 0.95 and share.max() > 0.2

    if fits(1e-3):
        fix = "they fit as milliseconds: call the columns start_ms and end_ms"
    elif fits(1 / rate[known]):
        fix = "they fit as samples: divide them by the sampling rate"
    else:
        fix = "times must be seconds into the file; fix them, or raise --max-bad-share"
    raise DataError(
        f"--data {manifest.root}: the times of {n_far} of {n_known} clips are far beyond the end "
        f"of their files, e.g. {manifest.paths[row]} at {last[row]:g} s of "
        f"{file_seconds[row]:.4g} s; {fix}")
