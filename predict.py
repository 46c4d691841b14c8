"""Predict over recordings of any length: python predict.py --ckpt best.pt FILES_OR_FOLDERS

The checkpoint says what the model, the front end, the classes and a window are, so no flag does.
Read it from top to bottom: the command, its flags, the loop, the folder of the results.
"""
import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin
from util import require_working_directory

require_working_directory()
import torch
from tqdm import tqdm

from core.device.memory import is_out_of_memory
from core.device.precision import Precision, choose_precision, pick_device
from core.divergence import TrainingError
from core.exits import INVALID_INPUT, print_error, run_script
from core.run.checkpoint import Checkpoint, as_checkpoint_error, link, load_checkpoint
from core.run.folder import RunError, create_run
from core.run.signals import StopRequest
from core.scoring import calibration_of, find_checkpoint, is_multi_label, restore, window_scores
from core.smoke import duration
from data.audio import AudioError, check
from data.manifest import DataError
from data.scan import write_bad_files
from data.stream import (
    Recording,
    WindowBatch,
    Windows,
    find_recordings,
    number_groups,
    read_headers,
    window_batches,
)
from flags import SHARE, count, number
from metrics import apply_temperature
from report import predictions
from util import plural, printable, sha256_of, write_json

FORMATS = ("csv", "jsonl", "raven", "audacity")


def main(argv: list[str] | None = None) -> None:
    """Predict over the recordings. Errors are raised; see core/exits.py."""
    args = parse(argv)
    StopRequest()  # not armed: a signal ends the process at once, and what is done is on disk
    path, out = find_checkpoint(args.ckpt), Path(args.out)
    recordings = find_recordings(args.inputs)
    print(f"checkpoint: {path}")
    checkpoint, device = load_checkpoint(path), pick_device(args.device)
    model, frontend = restore(checkpoint, device)
    windows = window_geometry(checkpoint, frontend.config.sample_rate, args.hop)
    labeller = Labeller(checkpoint, args.threshold, args.top_k)
    settings = open_out(out)
    precision = pick_precision(args.amp, device, settings)
    print(f"device: {device}, {precision.name} ({precision.reason})")
    check_settings(out, settings, {
        "checkpoint": sha256_of(path), "hop": windows.hop / windows.rate,
        "threshold": args.threshold, "top_k": labeller.top_k, "embeddings": args.embeddings,
        "device": device.type, "amp": precision.mode})

    read_headers(recordings, windows)
    readable = [recording for recording in recordings if recording.reason is None]
    groups = number_groups([recording.windows for recording in readable], args.batch_size)
    todo = unfinished(out / "parts", readable, groups, args.embeddings)
    n_done_before = len(readable) - len(todo)
    hours = sum(recording.info.seconds for recording in readable) / 3600
    done_before = f"; {n_done_before} were done before" if n_done_before else ""
    print(f"data: {plural(len(recordings), 'recording')}, {hours:.2f} h{done_before}")

    dim = model.config.dim if args.embeddings else 0
    default_threads = min(8, os.cpu_count() or 1) if device.type == "cuda" else 1
    batches = window_batches(todo, windows, args.batch_size,
                             default_threads if args.workers < 0 else args.workers)
    started = time.perf_counter()
    try:
        n_windows = predict_all(
            model, frontend, batches, precision, labeller.multi_label,
            lambda recording: predictions.RecordingWriter(out / "parts", recording, labeller, dim),
            sum(recording.info.seconds for recording, _ in todo))
        seconds = time.perf_counter() - started
        write_tables(args, out, recordings, checkpoint["classes"], frontend.config)
    except SystemExit:  # a signal
        print(f"\nstopped: finished recordings are kept in {out}; the same command continues")
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"--batch-size {args.batch_size}: out of memory; give a smaller one. "
                       "Finished recordings are kept") from None
    done = [recording.info.seconds for recording, _ in todo if recording.reason is None]
    speed = f", {sum(done) / seconds:.0f} times real time" if done else ""
    print(f"predicted: {plural(len(done), 'recording')}, {plural(n_windows, 'window')}, "
          f"{sum(done):.0f} s of audio in {duration(seconds)}{speed}")


# --- flags ---

def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predict.py", description=(__doc__ or "").split("\n")[0], epilog="""
        windows.csv has a row for each window and predicted class (path, start and end in seconds,
        label, score), with an empty label if no class reaches its threshold. files.csv has the same
        for each recording as a whole (the mean of its windows, calibrated). classes.csv has, for
        each recording and class, the number of windows above the threshold and the highest score
        with its time. bad_files.csv lists unreadable recordings. Windows are never merged: a call
        that lasts for three windows is in three rows. The same command continues a run that was
        stopped; changed recordings are predicted again.""")

    def error(message):
        print_error(f"{message} (see --help)")
        sys.exit(INVALID_INPUT)

    parser.error = error
    parser.add_argument("inputs", nargs="+", metavar="FILES_OR_FOLDERS", help="recordings, and "
                        "folders with recordings at any depth")
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint; a bare name is looked up in the newest run "
        "under runs/")
    add("--out", default="predictions", help="folder of the results (default: predictions); use "
        "another one for other flags")
    add("--threshold", type=SHARE, help="score above which a class is predicted (default: the "
        "checkpoint's for each class, 0.5 if it has none)")
    add("--top-k", type=count(1), help="consider only the k highest-scoring classes of a window "
        "(default: 1; all if clips may have several labels)")
    add("--hop", type=number(0.01), help="seconds between the starts of two windows (default: the "
        "length of a window; the last window ends with the recording)")
    add("--format", type=formats, default=["csv"], help=f"{', '.join(FORMATS)}, or several "
        "separated by commas (default: csv); jsonl: a line for each window; raven, audacity: a "
        "selection table or label track for each recording")
    add("--embeddings", action="store_true", help="also write the model's features of each window: "
        "an .npz for each recording with embeddings (windows, dim) float32, start and end in "
        "seconds")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="precision")
    add("--batch-size", type=count(1), default=16, help="windows at a time")
    add("--workers", type=count(-1, 1024), default=-1, help="recordings decoded at a time (-1: one "
        "per core, at most 8, with a GPU; 1 without)")
    args = parser.parse_args(argv)
    if args.workers == 0:
        parser.error("--workers 0: must be at least 1, or -1")
    return args


def formats(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text!r}: give {', '.join(FORMATS)}, or several "
                                         "separated by commas")
    return list(dict.fromkeys(names))


def window_geometry(checkpoint: Checkpoint, rate: int, hop: float | None) -> Windows:
    """Windows of the trained length; `hop` seconds apart if given."""
    with as_checkpoint_error(checkpoint.path):
        n_samples = checkpoint["clip"]["samples"]
        windows = Windows(rate, n_samples, n_samples, checkpoint["clip"]["short"])
    if hop is None:
        return windows
    if round(hop * rate) > n_samples:
        raise DataError(f"--hop {hop:g}: longer than a window, so audio between windows would be "
                        f"missed; give at most {n_samples / rate:g}")
    return replace(windows, hop=round(hop * rate))


def pick_precision(amp: str, device: torch.device, settings: dict | None) -> Precision:
    """As asked for; auto takes what the predictions in the folder were made with."""
    if amp == "auto" and settings and settings.get("device") == device.type:
        amp = settings.get("amp", "auto")  # what auto measures may differ from time to time
    return choose_precision(device, amp)


# --- the loop ---

class Labeller:
    """Probabilities of a window or a recording -> its predicted classes."""

    def __init__(self, checkpoint: Checkpoint, threshold: float | None, top_k: int | None):
        calibration, n_classes = calibration_of(checkpoint), len(checkpoint["classes"])
        self.multi_label = is_multi_label(checkpoint)
        self.temperature = calibration["temperature"]
        if threshold is None:
            self.thresholds = np.array(calibration["thresholds"])
        else:
            self.thresholds = np.full(n_classes, threshold)
        # With one label per clip, the second best class is no answer if the best is uncertain.
        self.top_k = top_k or (n_classes if self.multi_label else 1)

    def __call__(self, probabilities: np.ndarray) -> predictions.Labels:
        """(classes,) uncalibrated -> the best `top_k` classes that reach their thresholds."""
        scores = apply_temperature(probabilities[None], self.temperature, self.multi_label)[0]
        best = np.argsort(-scores, kind="stable")[:self.top_k]
        return [[int(i), round(float(scores[i]), 6)] for i in best
                if scores[i] >= self.thresholds[i]]


@torch.inference_mode()
def predict_all(model, frontend, batches: Iterable[WindowBatch], precision: Precision,
                multi_label: bool, new_writer: Callable, seconds: float) -> int:
    """Score every window of the batches, write a part for each recording -> number of windows.

    seconds: of audio, for the progress bar. Raises TrainingError if scores are not finite.
    """
    model.eval()
    writers, n_windows, rate = {}, 0, frontend.config.sample_rate

    def writer_of(recording):
        if recording.file not in writers:
            writers[recording.file] = new_writer(recording)
        return writers[recording.file]

    bar = tqdm(total=round(seconds), desc="predicting", unit="s", unit_scale=True, leave=False,
               disable=not sys.stderr.isatty())
    with bar, precision.cast_weights_once():
        for batch in batches:
            if batch.windows:
                wave = torch.from_numpy(batch.wave)
                _, probabilities, features = window_scores(model, frontend, wave, precision,
                                                           multi_label)
                features = features.float().cpu().numpy()
                if not np.isfinite(probabilities).all():
                    raise TrainingError("the model's scores are not finite: its weights are "
                                        "damaged or the precision is too low; try --amp off")
                for i, (recording, start, end) in enumerate(batch.windows):
                    n_new = writer_of(recording).add(start, end, probabilities[i], features[i])
                    bar.update(n_new / rate)
                n_windows += len(batch.windows)
            for recording, reason in batch.ended:
                writer_of(recording).finish(reason, rate)
                del writers[recording.file]
    return n_windows


# --- the folder of the results ---

def open_out(out: Path) -> dict | None:
    """Make and lock the folder -> the settings of the predictions in it, None if there are none."""
    try:
        if out.is_dir() and not (out / "settings.json").exists():
            foreign = [path for path in out.iterdir() if path.name not in (".lock", "parts")]
            if foreign:
                raise RunError(f"--out {out}: holds other things than predictions; give another "
                               "--out")
        create_run(out, may_exist=True)
        (out / "parts").mkdir(exist_ok=True)
        predictions.remove_leftovers(out)
        return json.loads((out / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except RunError as error:
        raise RunError(str(error).replace("--run-dir", "--out")) from None
    except (OSError, ValueError) as error:
        raise RunError(f"--out {out}: its settings.json cannot be read ({error}); give another "
                       "--out") from None


def check_settings(out: Path, stored: dict | None, settings: dict) -> None:
    """Write the settings of a new folder; refuse a folder whose predictions had other settings."""
    if stored is None:
        write_json(out / "settings.json", settings)
        return
    for name, value in settings.items():
        if stored.get(name) == value:
            continue
        other = f"with {name} {stored.get(name)}, not {value}"
        if name == "checkpoint":
            other = "of another checkpoint"
        raise RunError(f"--out {out}: holds predictions {other}; give another --out, or remove "
                       "that folder")


def unfinished(parts: Path, recordings: list[Recording], groups: list[int], embeddings: bool
               ) -> list[tuple[Recording, int]]:
    """The recordings to predict, with their groups.

    A group is repeated as a whole, so that its batches and the last bits of its scores are the
    same. A recording that was broken before is tried once more: it may have been the disk.
    """
    done = set()
    for recording in recordings:
        head = predictions.finished_part(parts, recording, embeddings)
        if head is not None and (head["reason"] is None or is_broken(recording)):
            done.add(recording.file)
    pairs = list(zip(recordings, groups))
    to_repeat = {group for recording, group in pairs if recording.file not in done}
    return [(recording, group) for recording, group in pairs if group in to_repeat]


def is_broken(recording: Recording) -> bool:
    try:
        check(recording.file)
    except AudioError:
        return True
    return False


def write_tables(args, out: Path, recordings: list[Recording], classes: list[str], config) -> None:
    """Put all parts together; raises DataError if no recording can be read."""
    good, bad = predictions.sort_by_outcome(out, recordings)
    write_bad_files(bad, out / "bad_files.csv")
    for path, reason in bad[:10]:
        print(f"  left out: {printable(path)}: {reason}")
    if not good:
        raise DataError(f"{args.inputs[0]}: none of the {len(recordings)} recordings can be read; "
                        f"{out}/bad_files.csv says why")
    written, n_empty, n_windows = predictions.assemble_tables(out, good, args.format, classes,
                                                              config)
    if args.embeddings:
        predictions.link_embeddings(out, good, link)
        written.append("embeddings/")
    if n_empty:
        print(f"  {n_empty} of {n_windows} windows have no class that reaches its threshold; "
              "--threshold 0 shows the best class of each")
    unreadable = f"; {len(bad)} unreadable recordings, see bad_files.csv" if bad else ""
    print(f"written: {out}/{', '.join(written)}{unreadable}")


if __name__ == "__main__":
    run_script(main)
