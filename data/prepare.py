"""Labelled recordings -> a checked manifest with splits, ready to train on."""
import os
from collections import Counter
from pathlib import Path

import numpy as np

from .demo import write_demo
from .manifest import DataError, Manifest, load_manifest
from .named import find_data
from .scan import audio_below, scan, summary
from .splits import assign_splits, audit, drop_rare

DEMO = Path(__file__).parents[1] / "demo_data"
DECODE_ALL_UP_TO = 5000  # files; above, only headers are read before training


def cache_folder(name=None):
    """Where what can be made again is kept: the folder of that name, or the usual one."""
    return Path(name) if name else Path.home() / ".cache" / "warble"


def prepare(data, audio_dir=None, fold=None, min_clips=1, max_bad_share=0.05, how="auto", seed=0, cache_dir=None,
            say=print, several=False):
    """Find, scan, clean and split the recordings.

    data: "demo", class folders, a CSV, a known layout or the name of a data set; how: "full" decodes every file once,
    "headers" does not, "auto" does up to 5,000 files; cache_dir: see `cache_folder`, the scan is remembered and data sets are
    kept there; `say` gets each line for the person; several: whether the loss can learn clips with several labels.
    Returns (manifest of the readable clips, [(path, reason)] of the others). Raises DataError.
    """
    if data == "demo":
        say("data: the built-in demo, synthesised sounds. For your own recordings:\n"
            "  python train.py --data FOLDER_OR_CSV --warmup-epochs 0 --batch-size 4")
        data = write_demo(DEMO)
    data = find_data(data, cache_folder(cache_dir), say)
    manifest = load_manifest(data, audio_dir)
    manifest = manifest if several else manifest.one_label()
    full = how == "full" or how == "auto" and len(manifest) <= DECODE_ALL_UP_TO
    seen = scan(manifest, cache_folder(cache_dir) / "scan", full)
    _say(say, f"data: {manifest.root}", manifest.notes + summary(seen, manifest))
    bad = [(manifest.paths[row], reason) for row, reason in sorted(seen.reasons.items())]
    if len(bad) > max_bad_share * len(manifest):
        raise DataError(f"--data {data}: {len(bad)} of {len(manifest)} clips cannot be read, more than --max-bad-share "
                        f"{max_bad_share:g}; the first: {bad[0][0]}: {bad[0][1]}; mend or remove them, or raise --max-bad-share")
    manifest.duration = seen.duration
    twins = np.full(len(manifest), -1, np.int32)
    for number, rows in enumerate(seen.duplicates):
        twins[rows] = number
    keep = np.flatnonzero(seen.ok)
    manifest, twins = manifest.take(keep), twins[keep]
    if min_clips > 1:
        frequent = manifest.having(manifest.counts() >= min_clips)
        manifest, notes = drop_rare(manifest, min_clips)
        twins = twins[frequent]
        _say(say, None, notes)
    order = np.argsort(twins, kind="stable")[np.count_nonzero(twins < 0):]  # sets of twins, one after the other
    duplicates = [rows.tolist() for rows in np.split(order, np.flatnonzero(np.diff(twins[order])) + 1) if len(rows)]
    notes = assign_splits(manifest, duplicates, seed=seed, fold=fold)
    notes += _without_several(manifest)
    notes += [f"LEAK: {line}" for line in audit(manifest, duplicates)]
    manifest.notes += notes
    _say(say, None, notes)
    for split in ("train", "val", "test"):
        if len(manifest.rows(split)) == 0:
            raise DataError(f"--data {data}: no clip is left for {split}; give more recordings, or a split column")
    return manifest, bad


def _without_several(manifest):
    """A line where clips with several labels are missing in a split."""
    if not manifest.multi_label:
        return []
    several = {split: sum(len(manifest.label_sets[i][0]) > 1 for i in manifest.label_set[manifest.rows(split)].tolist())
               for split in ("train", "val", "test")}
    missing = [split for split, n in several.items() if n == 0]
    return [f"no clip with several labels in {', '.join(missing)}: the figures there say nothing of such clips"] if (
        missing and any(several.values())) else []


def noise_recordings(folder, cache_dir=None):
    """A manifest, of one class, of every readable recording anywhere below a folder. Raises DataError."""
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise DataError(f"--noise-dir {folder}: no such folder; give one that holds recordings of background sounds")
    try:
        below = audio_below(root.parent, root.name, Counter())
    except OSError as error:
        raise DataError(f"--noise-dir {error.filename}: {error.strerror}; make it readable or take it away") from None
    paths = sorted((path.removeprefix(root.name + "/") for path in below), key=os.fsencode)
    n, zeros = len(paths), np.zeros(len(paths), np.int32)
    found = Manifest("noise", root, ["noise"], paths, zeros, zeros.astype(np.float32), np.full(n, np.nan, np.float32),
                     np.arange(n, dtype=np.int32), "each file alone", np.full(n, -1, np.int8), None, [])
    if n:
        seen = scan(found, cache_folder(cache_dir) / "scan", full=False)
        found.duration = seen.duration
        found = found.take(seen.ok)
    if len(found) == 0:
        raise DataError(f"--noise-dir {folder}: no recording in there can be read; give one that holds some, or leave it out")
    return found


def _say(say, title, lines):
    if title:
        say(title)
    for line in lines:
        say(f"  {line}")
