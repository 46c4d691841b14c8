"""Evaluate a checkpoint: python evaluate.py --ckpt best.pt

The checkpoint says what the model, the front end, the classes and the split are, so no flag does.
"""
import argparse
import os
import shlex
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin
from util import require_working_directory

require_working_directory()
import numpy as np
import torch

from core.device.precision import choose_precision, pick_device
from core.exits import parse_args, run_script
from core.run.checkpoint import Checkpoint, as_checkpoint_error, load_checkpoint
from core.run.origin import own_run_info
from core.scoring import (
    Scorer,
    calibration_of,
    evaluate,
    find_checkpoint,
    has_sigmoids,
    is_multi_label,
    restore,
)
from core.scoring.annotated_data import TrueEvents, annotated_windows
from core.scoring.given_data import (
    READINGS,
    choose_reading,
    compare_with_run,
    other_data,
    own_data,
    readable_part,
)
from core.scoring.report_page import write_report
from data.annotations import MODES, AnnotationRules
from data.cache import WaveCache
from data.clips import Clips, evaluation_batches
from data.files import find_outage
from data.load import load_manifest
from data.manifest import SPLITS, DataError, Manifest
from data.named import credit, find_data
from data.negatives import add_negatives, cut_into_windows, load_negatives
from data.prepare import cache_folder
from data.recorder_names import parse_recorder_name
from data.scan import scan
from losses import SIGMOID_LOSSES, build_loss
from metrics import apply_temperature
from metrics.false_alarms import reported_classes
from report.event_results import event_lines, write_event_results
from report.results import result_lines, write_results
from util import plural, summarize, write_json


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=(__doc__ or "").split("\n")[0])

    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint; a bare name is looked up in the newest run "
        "under runs/")
    add("--split", default="test", choices=SPLITS, help="part of the run's own split (default: "
        "test)")
    add("--data", help="other data with the same classes, or the same data in another place; as "
        "for train.py. Needed for a checkpoint outside the folder of its run")
    add("--negatives", help="recordings that contain none of the classes, a folder or a CSV, to "
        "count false alarms on, beside the clips of --split or --data")
    add("--annotations", help="annotated recordings to test on, by window and by event: a folder "
        "or a table, as for train.py --annotated")
    add("--annotated", choices=list(MODES), help="what --annotations leave out: all = none of the "
        "classes; parts = unknown (default: as in training)")
    add("--label-column", help="column of the annotations that has the classes, if it is not clear")
    add("--audio-dir", help="folder that the paths of a CSV given with --data are relative to")
    add("--data-is", choices=READINGS, help="how to read --data: same = the run's own data, with "
        "its split; other = score every clip (default: decided by what is in the files)")
    add("--out", help="folder for the results (default: <run folder>/<split>)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="precision "
        "(default: auto, as in training if the device is the same)")
    add("--batch-size", type=int, default=16, help="tiles at a time")
    add("--workers", type=int, default=0, help="processes that decode audio beside this one")
    args = parse_args(parser, argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: must be at least 1")
    if args.workers < 0:
        parser.error(f"--workers {args.workers}: must be at least 0")
    if args.annotations and args.data:
        parser.error("--annotations: excludes --data; give one of them")
    if (args.annotated or args.label_column) and not args.annotations:
        parser.error("--annotated and --label-column: only with --annotations")
    return args


def main(argv: list[str] | None = None) -> int:
    """Evaluate one checkpoint -> exit code. Errors are raised; see core/exits.py."""
    args = parse(argv)
    path = find_checkpoint(args.ckpt)
    print(f"checkpoint: {path}")
    checkpoint, device = load_checkpoint(path), pick_device(args.device)
    same_device = checkpoint.get("device") == device.type
    precision = choose_precision(device, checkpoint["amp"] if args.amp == "auto" and same_device
                                 else args.amp)
    print(f"device: {device}, {precision.name} ({precision.reason})")
    model, frontend = restore(checkpoint, device)
    info = own_run_info(checkpoint)
    cache_root = cache_folder(info and info["flags"].get("cache_dir"))
    data = args.data and find_data(args.data, cache_root)
    true_events = None
    if args.annotations:
        manifest, true_events, notes = annotated_data(checkpoint, args)
        rows, split = np.arange(len(manifest)), "all"
    else:
        manifest, rows, split, notes = evaluation_data(checkpoint, data, args.audio_dir,
                                                       args.split, args.data_is)
    if args.negatives:
        manifest, rows, more = with_negatives(checkpoint, manifest, rows, args.negatives)
        notes += more
    notes += [f"  {line}" for line in credit(manifest.root)]
    print("\n".join(notes))
    with as_checkpoint_error(path):
        clips = open_clips(checkpoint, manifest, frontend.config.sample_rate, cache_root)
        scorer = Scorer(model, frontend, restore_loss(checkpoint, device), precision,
                        has_sigmoids(checkpoint))
    batches = evaluation_batches(clips, rows, args.batch_size, args.workers,
                                 pin=device.type == "cuda")
    result = evaluate(scorer, batches, manifest, rows, progress_title=split)
    failed = {manifest.paths[row]: reason for row, reason in result.broken.items()}
    outage = find_outage(manifest.root, failed, manifest.paths)
    if outage:
        raise DataError(f"the data are not there: {outage}; bring them back, or give their folder "
                        "with --data")
    for row, reason in list(result.broken.items())[:10]:
        print(f"  left out: {manifest.paths[row]}: {reason}")
    if len(result.rows) == 0:
        raise DataError(f"{manifest.root}: none of the {len(rows)} clips can be read; give their "
                        "folder with --data")
    folder = Path(args.out) if args.out else path.parent / split
    calibration = calibration_of(checkpoint)
    leaks = [note for note in notes if note.startswith("LEAK: ")]
    metrics = write_results(folder, result, manifest, checkpoint["classes"], split, calibration,
                            leaks)
    print("\n".join(result_lines(metrics)))
    if true_events is not None:
        print("\n".join(event_results(folder, metrics, result, manifest, true_events, checkpoint)))
    print(f"written: {folder}", flush=True)
    report_folder = folder if args.out or split != "test" else path.parent
    print(write_report(report_folder / "report.html", path, calibration,
                       checkpoint["progress"]["epoch"], folder, split, result, scorer, clips,
                       args.batch_size, same_command(args, path)))
    return 0


def same_command(args, path):
    """The command line that gives the same results again."""
    words = ["python", "evaluate.py", "--ckpt", str(path)]
    if args.split != "test":
        words.append(f"--split={args.split}")
    for flag, value in (("data", args.data), ("annotations", args.annotations),
                        ("annotated", args.annotated), ("label-column", args.label_column),
                        ("negatives", args.negatives),
                        ("audio-dir", args.audio_dir), ("data-is", args.data_is),
                        ("out", args.out)):
        if value is not None:
            words.append(f"--{flag}={value}")
    return shlex.join(words)


def open_clips(checkpoint: Checkpoint, manifest: Manifest, rate: int, cache_root: Path) -> Clips:
    """The waveforms, from the cache if the run used one, so that they are rounded alike."""
    was_cached = checkpoint["flags"].get("cache", "off") != "off"
    cache = WaveCache(cache_root / "audio", rate) if was_cached else None
    if cache and cache.problem:
        print(f"  {cache.problem}")
    return Clips(manifest, rate, checkpoint["clip"]["samples"], checkpoint["clip"]["short"],
                 cache=cache)


def restore_loss(checkpoint: Checkpoint, device: torch.device) -> torch.nn.Module:
    """The loss of the run, tried on one clip: its settings may come from an altered file."""
    loss_fn = build_loss(**checkpoint["loss"]).to(device)
    logits = torch.zeros(1, len(checkpoint["classes"]), device=device)
    loss_fn(logits, torch.zeros(1, dtype=torch.long, device=device))
    return loss_fn


# --- which clips ---

def evaluation_data(checkpoint: Checkpoint, data: str | None, audio_dir: str | None, split: str,
                    data_is: str | None = None) -> tuple[Manifest, np.ndarray, str, list[str]]:
    """The clips to evaluate: (manifest with the checkpoint's classes, rows, split, notes).

    Without `data` they are those of the run, if the checkpoint is in the folder of its run. Raises
    DataError otherwise: a file from elsewhere must not choose what is read here.
    """
    with as_checkpoint_error(checkpoint.path):
        manifest = Manifest.from_dict(checkpoint["manifest"])
        if manifest.classes != checkpoint["classes"]:
            raise ValueError("the classes of its manifest are not its own")
        if manifest.multi_label and checkpoint["loss"]["name"] not in SIGMOID_LOSSES:
            raise ValueError("its clips have several labels, which its loss cannot learn")
        known_bad = frozenset(path for path, _ in checkpoint["bad_files"])
        if manifest.duration is None:
            raise ValueError("its manifest has no lengths")
    if data is not None:
        given = load_manifest(data, audio_dir, manifest.classes)
        given = cut_like_run(given, checkpoint)
        compared = compare_with_run(manifest, given, known_bad)
        if choose_reading(compared, data_is) == "other":
            manifest, notes = other_data(manifest, compared)
            return manifest, np.arange(len(manifest)), "all", notes
        manifest, notes = own_data(manifest, compared)
    else:
        info = own_run_info(checkpoint)
        if info is None:
            raise DataError(f"{checkpoint.path}: not in the folder of its run, so the recordings "
                            f"that it names in {manifest.root} are not read; give their folder or "
                            "CSV with --data")
        manifest.root = Path(info["data"]["root"])
        notes = [f"data: {manifest.root}, the split made in training"]
    rows = manifest.rows(split)
    if len(rows) == 0:
        present = [name for name in SPLITS if len(manifest.rows(name))]
        raise DataError(f"--split {split}: the run has no such clips; it has "
                        f"{summarize(present)}")
    if not any(manifest.file(row).exists() for row in rows):
        raise DataError(f"{manifest.file(rows[0])}: the run's recordings are not there any more; "
                        "give their folder with --data")
    return manifest, rows, split, notes


def annotated_data(checkpoint: Checkpoint, args) -> tuple[Manifest, TrueEvents, list[str]]:
    """The windows of --annotations, the annotated events, and notes."""
    with as_checkpoint_error(checkpoint.path):
        run, flags = Manifest.from_dict(checkpoint["manifest"]), checkpoint["flags"]
        defaults = AnnotationRules()
        rules = AnnotationRules(
            args.annotated or flags.get("annotated"), args.label_column,
            flags.get("min_overlap", defaults.min_overlap),
            flags.get("min_event_share", defaults.min_fraction))
        return annotated_windows(run, args.annotations, args.audio_dir, rules, flags["seconds"])


def event_results(folder, metrics, result, windows, true_events, checkpoint) -> list[str]:
    """Write the results by event and add them to metrics.json -> lines to print."""
    calibration = calibration_of(checkpoint)
    calibrated = apply_temperature(result.scores, calibration["temperature"],
                                   calibration["sigmoid"])
    top_k = None if is_multi_label(checkpoint) else 1  # one answer per window, as in predict.py
    active = reported_classes(calibrated, calibration["thresholds"], top_k)
    names = [parse_recorder_name(path) for path in sorted(set(windows.paths))]
    places = [(name.site, name.start.date().isoformat() if name.start else "") for name in names]
    metrics["events"] = write_event_results(folder, result, windows, active, true_events, places)
    for name, row in zip(checkpoint["classes"], metrics["events"]["per_class"], strict=True):
        row["class"] = name
    write_json(folder / "metrics.json", metrics)
    return event_lines(metrics["events"])


def cut_like_run(given: Manifest, checkpoint: Checkpoint) -> Manifest:
    """Given data with its negatives cut into windows, as the run's were; see data/negatives.py."""
    long = given.select(given.is_negative)
    if len(long) == 0:
        return given
    found = scan(long, None, full=False)
    given.duration = np.zeros(len(given), np.float32)
    given.duration[given.is_negative] = found.duration
    with as_checkpoint_error(checkpoint.path):
        seconds = checkpoint["flags"]["seconds"]
    cut, _ = cut_into_windows(given, seconds)
    cut.duration = None  # not known for all
    return cut


def with_negatives(checkpoint: Checkpoint, manifest: Manifest, rows: np.ndarray, negatives: str
                   ) -> tuple[Manifest, np.ndarray, list[str]]:
    """Add the recordings of --negatives to the clips to evaluate: (manifest, rows, notes)."""
    others = load_negatives(negatives)
    n_given = len(others)
    others, _ = readable_part(others, scan(others, None, full=False),
                              f"--negatives {negatives}: none of the {n_given} recordings")
    n_readable = len(others)
    with as_checkpoint_error(checkpoint.path):
        others, _ = cut_into_windows(others, checkpoint["flags"]["seconds"])
    notes = [f"negatives: {plural(len(others), 'window')} of {plural(n_readable, 'recording')} "
             f"in {others.root}"]
    if n_readable < n_given:
        notes.append(f"  {n_given - n_readable} unreadable files are left out")
    code = manifest.split[rows[0]]  # of all clips to evaluate, and of no other clip
    others.split[:] = code
    both = add_negatives(manifest, others)
    return both, np.flatnonzero(both.split == code), notes


if __name__ == "__main__":
    run_script(main)
