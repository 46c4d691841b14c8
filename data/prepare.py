"""Labelled recordings -> a checked manifest with splits, ready to train on."""
import os
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from util import plural

from .annotations import AnnotationRules, cut_events
from .clip_times import check_times
from .content import content_keys
from .demo import write_demo
from .files import find_outage, recordings_below
from .folds import assign_folds
from .load import load_manifest
from .manifest import COLUMN_TYPES, SPLITS, DataError, Manifest
from .named import find_data
from .negatives import cut_into_windows
from .old_split import OldRun, extend_split
from .overview import class_lines, source_lines, warning_lines
from .scan import refuse_truncated, scan, summary
from .sound_print import shorten
from .splits import assign_splits, audit, drop_rare
from .stratify import undivided

DEMO = Path(__file__).parents[1] / "demo_data"
MIN_UNITS = 10  # with fewer groups, it is likely that they are why a split is empty
MAX_NOTES = 100  # on truncated clips
MAX_CLIPS_TO_DECODE = 5000  # with more clips, only headers are read before training


def cache_folder(name: str | os.PathLike | None = None) -> Path:
    """The folder for what can be made again: the given one, or ~/.cache/warble.

    Raises DataError if there is no home directory.
    """
    if name:
        return Path(name)
    try:
        return Path.home() / ".cache" / "warble"
    except RuntimeError:
        raise DataError("no home directory to keep the cache in; set HOME, or give --cache-dir, a "
                        "folder for it") from None


def prepare(data: str | os.PathLike, audio_dir: str | os.PathLike | None = None,
            fold: int | None = None, min_clips: int = 1, max_bad_share: float = 0.05,
            scan_mode: str = "auto", seed: int = 0, cache_dir: str | os.PathLike | None = None,
            log: Callable[[str], None] = print, multi_label: bool | None = False,
            truncated: str = "use", n_folds: int | None = None, old: OldRun | None = None,
            seconds: float = 4.0, negatives: str | os.PathLike | None = None,
            real_classes: Collection[str] = (), annotations: AnnotationRules | None = None
            ) -> tuple[Manifest, list[tuple[str, str]]]:
    """Find, scan, clean and split the recordings.

    data: "demo", class folders, a CSV, a known layout or the name of a data set.
    scan_mode: "full" decodes every file once, "headers" does not, "auto" does up to 5,000 clips.
    cache_dir: see `cache_folder`; for the scan's index and for data sets.
    multi_label: whether the loss can learn clips with several labels; None: as the data need it.
    truncated: "use" what truncated recordings have, or "refuse" them.
    n_folds: make this many folds instead of those of the data; `fold` is then the test.
    old: an earlier run, whose clips keep their split.
    seconds: the length of a window, into which recordings without a label are cut.
    negatives, real_classes: see `load_manifest`.
    annotations: how to read annotated events, if the data are such.

    -> (manifest of the readable clips, (path, reason) of each other one). Raises DataError.
    """
    cache = cache_folder(cache_dir)
    if data == "demo":
        log("data: the built-in demo of synthesised sounds. For your own recordings:\n"
            "  python train.py --data FOLDER_OR_CSV --warmup-epochs 0 --batch-size 4")
        data = write_demo(DEMO)
    data = find_data(data, cache, log)
    rules = annotations or AnnotationRules()
    manifest = _load(data, audio_dir, real_classes, negatives, rules, multi_label)
    result = _scan(manifest, data, cache, scan_mode, truncated)
    log(f"data: {manifest.root}")
    _log_indented(log, manifest.notes + summary(result, manifest) + _describe_unchecked(result))
    # Into run.json: which clips are shorter than they claim, and why.
    manifest.notes += [f"{manifest.paths[row]}: {reason}"
                       for row, reason in list(result.truncated.items())[:MAX_NOTES]]
    bad = _bad_clips(manifest, result, data, max_bad_share)

    lines = []
    if n_folds:  # before clips are left out, so that the folds stay if a file breaks
        lines += assign_folds(manifest, result.copies, n_folds, seed)
    manifest, rows = _cut(manifest, result, seconds, rules, log)
    if min_clips > 1:
        is_frequent = manifest.rows_with(manifest.counts() >= min_clips) | ~manifest.has_label
        manifest, dropped = drop_rare(manifest, min_clips)
        rows = rows[is_frequent]
        lines += dropped
    manifest.content = content_keys(manifest.root, manifest.paths)
    if result.prints is not None:
        manifest.sound = shorten(result.prints[rows]).view(COLUMN_TYPES["sound"])
    duplicates = _renumber(result.duplicates, rows)
    copies = _renumber(result.copies, rows)
    near = [pair for pair in _renumber(result.near, rows, first_only=True) if len(pair) == 2]
    if old is not None and fold is None:
        lines += _extend_split(manifest, copies, duplicates, old, seed)
    _log_indented(log, class_lines(manifest) + source_lines(manifest))
    lines += assign_splits(manifest, copies, seed=seed, fold=fold)
    lines += warning_lines(manifest, by_fold=fold is not None)
    lines += _describe_missing_multi_label(manifest)
    lines += [f"LEAK: {line}" for line in audit(manifest, duplicates, near)]
    manifest.notes += lines
    _log_indented(log, lines)
    _refuse_empty_splits(manifest, data, copies)
    return manifest, bad


def _load(data, audio_dir, real_classes, negatives, rules, multi_label):
    """The manifest with one label per clip unless more are needed and can be learnt."""
    if rules.annotated and multi_label is False:
        raise DataError("--annotated: a window may contain several classes, or none; leave --loss "
                        "out, or give bce or focal-bce")
    manifest = load_manifest(data, audio_dir, real_classes=real_classes, negatives=negatives,
                             annotated=rules.annotated, label_column=rules.label_column)
    if multi_label is None:
        multi_label = rules.annotated is not None or manifest.needs_sigmoids
    return manifest if multi_label else manifest.single_label()


def _cut(manifest, result, seconds, rules, log):
    """The readable clips, with negatives and annotated recordings cut into windows.

    -> (manifest, (n,) the scanned row that each of its rows is from).
    """
    rows = np.flatnonzero(result.ok)
    manifest = manifest.select(rows)
    if rules.annotated:
        manifest, cut_from = cut_events(manifest, result.file_seconds[rows], seconds, rules)
        log(f"  {manifest.notes[-1]}")
    else:
        manifest, cut_from = cut_into_windows(manifest, seconds)
    return manifest, rows[cut_from]


def _refuse_empty_splits(manifest, data, copies):
    for split in SPLITS:
        if len(manifest.rows(split)) == 0:
            raise DataError(f"--data {data}: no clip is left for {split}; give more recordings, or "
                            f"a split column{_group_advice(manifest, copies)}")


def _group_advice(manifest, copies):
    """What else helps if too few groups are the reason that a split is empty."""
    n_units = len(np.unique(undivided(manifest, copies)))
    source = manifest.sources.get("group") or manifest.group_source
    if n_units >= MIN_UNITS or not source.startswith("column "):
        return ""
    name = source.removeprefix("column ")
    return (f", or give the column {name} another name if its values may be in several splits: "
            f"its {plural(len(np.unique(manifest.group)), 'group')} and equal recordings leave "
            f"{n_units} that stay whole")


def _describe_unchecked(result):
    """A line on what a scan of headers cannot find."""
    if result.full or result.prints is not None:
        return []
    return ["not checked, since only headers were read: copies in another format, rate or gain "
            "(--scan full finds them)"]


def _extend_split(manifest, copies, duplicates, old, seed):
    """The lines of `extend_split`. Splits of older runs may divide near-identical recordings."""
    try:
        return extend_split(manifest, copies, old, seed=seed)
    except DataError:
        return extend_split(manifest, duplicates, old, seed=seed)


def _scan(manifest, data, cache, scan_mode, truncated):
    """Scan the files of a manifest and set its durations. Raises DataError if a disk is away."""
    decode_all = len(manifest) <= MAX_CLIPS_TO_DECODE
    full = scan_mode == "full" or (scan_mode == "auto" and decode_all)
    result = scan(manifest, cache / "scan", full)
    failed = {manifest.paths[row]: reason for row, reason in result.reasons.items()}
    outage = find_outage(manifest.root, failed, manifest.paths, were_there=False)
    if outage:
        raise DataError(f"--data {data}: the data are not there: {outage}; bring them back, then "
                        "give the same command again")
    if truncated == "refuse":
        refuse_truncated(result)
    manifest.duration = result.duration
    return result


def _bad_clips(manifest, result, data, max_bad_share):
    """(path, reason) of each clip that cannot be used. Raises DataError if there are too many."""
    check_times(manifest, result.file_seconds, result.rate, max_bad_share)
    bad = [(manifest.paths[row], reason) for row, reason in sorted(result.reasons.items())]
    if len(bad) > max_bad_share * len(manifest):
        path, reason = bad[0]
        raise DataError(
            f"--data {data}: {len(bad)} of {len(manifest)} clips cannot be read, more than "
            f"--max-bad-share {max_bad_share:g}; the first: {path}: {reason}; fix or remove them, "
            "or raise --max-bad-share")
    return bad


def _renumber(sets, rows, first_only=False):
    """Sets of old rows as sets of new rows; rows: (k,) the old row that each new one is from.

    first_only: of an old row that was cut into several, only the first one.
    """
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    renumbered = []
    for old_rows in sets:
        first = np.searchsorted(sorted_rows, old_rows, side="left")
        last = np.searchsorted(sorted_rows, old_rows, side="right")
        if first_only:
            last = np.minimum(last, first + 1)
        new_rows = [order[i:k] for i, k in zip(first, last)]
        renumbered.append(np.concatenate(new_rows).tolist())
    return [new_rows for new_rows in renumbered if new_rows]


def _describe_missing_multi_label(manifest):
    """A line on splits without a clip that has several labels, if other splits have some."""
    if not manifest.multi_label:
        return []
    has_several = np.array([len(label_set.present) > 1 for label_set in manifest.label_sets])
    counts = {split: has_several[manifest.label_set[manifest.rows(split)]].sum()
              for split in SPLITS}
    missing = [split for split, n in counts.items() if n == 0]
    if not missing or not any(counts.values()):
        return []
    return [f"no clip with several labels in {', '.join(missing)}: the metrics there do not cover "
            "such clips"]


def noise_recordings(folder: str | os.PathLike,
                     cache_dir: str | os.PathLike | None = None) -> Manifest:
    """A manifest with one class of every readable recording below a folder. Raises DataError."""
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise DataError(f"--noise-dir {folder}: no such folder; give one that contains recordings "
                        "of background sounds")
    paths = sorted(recordings_below(root, "--noise-dir"), key=os.fsencode)
    n = len(paths)
    manifest = Manifest(
        name="noise", root=root, classes=["noise"], paths=paths, labels=np.zeros(n, np.int32),
        start=np.zeros(n, np.float32), end=np.full(n, np.nan, np.float32),
        group=np.arange(n, dtype=np.int32), group_source="each file alone",
        split=np.full(n, -1, np.int8), fold=None, notes=[])
    if n:
        result = scan(manifest, cache_folder(cache_dir) / "scan", full=False)
        manifest.duration = result.duration
        manifest = manifest.select(result.ok)
    if len(manifest) == 0:
        raise DataError(f"--noise-dir {folder}: contains no readable recording; give a folder that "
                        "does, or leave the flag out")
    return manifest


def _log_indented(log, lines):
    for line in lines:
        log(f"  {line}")
