"""Predict over recordings of any length: python predict.py --ckpt best.pt FILES_OR_FOLDERS

The checkpoint says what the model, the front end, the classes and a window are, so no flag does.
Read it from top to bottom: the command, its flags, the loop, the folder of the results, the end.
"""
import argparse
import contextlib
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
from core.exits import parse_args, run_script
from core.run.checkpoint import Checkpoint, as_checkpoint_error, link, load_checkpoint
from core.run.folder import RunError, create_run
from core.run.signals import StopRequest
from core.scoring import (
    SILENCE_DBFS,
    calibration_of,
    find_checkpoint,
    is_multi_label,
    is_silent,
    restore,
    window_scores,
)
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
from model.frontend import FrontendConfig
from report import predictions
from util import plural, printable, read_regular, sha256_of, write_json

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
    todo = unfinished(out / "parts", recordings, args.batch_size, args.embeddings)
    default_threads = min(8, os.cpu_count() or 1) if device.type == "cuda" else 1
    n_threads = default_threads if args.workers == -1 else args.workers
    batches = window_batches(todo, windows, args.batch_size, n_threads)
    dim = model.config.dim if args.embeddings else 0

    def new_writer(recording):
        return predictions.RecordingWriter(out / "parts", recording, labeller.predicted_classes,
                                           dim)

    with interruptions(out, args.batch_size):
        started = time.perf_counter()
        n_windows = predict_all(model, frontend, batches, precision, labeller.multi_label,
                                new_writer, seconds_of(recording for recording, _ in todo))
        seconds = time.perf_counter() - started
        readable, unreadable = predictions.sort_by_outcome(out, recordings)
        list_unreadable(out, readable, unreadable)
        if not readable:
            raise DataError(f"{args.inputs[0]}: none of the {len(recordings)} recordings can be "
                            f"read; {out}/bad_files.csv says why")
        print_speed([recording for recording, _ in todo if recording.reason is None], n_windows,
                    seconds)
        write_tables(out, readable, args.format, args.embeddings, checkpoint["classes"],
                     frontend.config)


# --- flags ---

def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predict.py", description=(__doc__ or "").split("\n")[0], epilog="""
        windows.csv has a row for each window and predicted class (path, start and end in seconds,
        label, score), with an empty label if no class reaches its threshold, or in a silent window.
        files.csv has the same for each recording as a whole (the mean of its windows with a signal,
        calibrated). classes.csv has, for
        each recording and class, the number of windows above threshold and the time of the highest
        score. bad_files.csv lists unreadable recordings. Windows are never merged: a call
        that lasts for three windows has three rows. The same command continues a run that was
        stopped; changed recordings are predicted again.""")

    add = parser.add_argument_group("what most people need").add_argument
    add("inputs", nargs="+", metavar="FILES_OR_FOLDERS",
        help="recordings, and folders with recordings at any depth")
    add("--ckpt", required=True,
        help="checkpoint; a bare name is looked up in the newest run under runs/")
    add("--out", default="predictions",
        help="folder of the results (default: predictions); use another one for other flags")
    add("--threshold", type=SHARE,
        help="lowest score at which a class is predicted (default: the checkpoint's for each "
        "class, 0.5 if it has none)")
    add("--format", type=formats, default=["csv"],
        help=f"{', '.join(FORMATS)}, or several separated by commas (default: csv); jsonl: a line "
        "for each window; raven, audacity: a selection table or label track for each recording")
    add = parser.add_argument_group("windows and classes").add_argument
    add("--hop", type=number(0.01),
        help="seconds between the starts of two windows (default: the length of a window); the "
        "last window always ends with the recording")
    add("--top-k", type=count(1),
        help="consider only the k highest-scoring classes of a window (default: 1; all if clips "
        "may have several labels)")
    add("--embeddings", action="store_true",
        help="also write the model's features of each window: an .npz for each recording with "
        "embeddings (windows, dim) float32, start and end in seconds")
    add = parser.add_argument_group("device and speed").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
        help="precision (default: auto, the fastest that the device supports)")
    add("--batch-size", type=count(1), default=16, help="windows at a time (default: 16)")
    add("--workers", type=count(-1, 1024), default=-1,
        help="recordings decoded at a time (default: -1, which is 1 on a CPU and one per core, at "
        "most 8, with a GPU)")
    args = parse_args(parser, argv)
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
    """Decides which classes of a window or a recording are predicted."""

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

    def predicted_classes(self, probabilities: np.ndarray) -> predictions.Labels:
        """Those of the `top_k` best classes that reach their threshold, with calibrated scores.

        probabilities: (classes,), not calibrated.
        """
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
                silent = is_silent(wave).tolist()
                _, probabilities, features = window_scores(model, frontend, wave, precision,
                                                           multi_label)
                features = features.float().cpu().numpy()
                if not np.isfinite(probabilities).all():
                    raise TrainingError("the model's scores are not finite: its weights are "
                                        "damaged or the precision is too low; try --amp off")
                for i, (recording, start, end) in enumerate(batch.windows):
                    n_new = writer_of(recording).add(start, end, probabilities[i], features[i],
                                                     silent[i])
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
        is_new = not (out / "settings.json").exists()
        if is_new and out.is_dir() and predictions.foreign_files(out):
            raise RunError(f"--out {out}: holds other things than predictions; give another --out")
        create_run(out, may_exist=True)
        (out / "parts").mkdir(exist_ok=True)
        predictions.remove_leftovers(out)
        return json.loads(read_regular(out / "settings.json"))
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


def unfinished(parts: Path, recordings: list[Recording], batch_size: int, embeddings: bool
               ) -> list[tuple[Recording, int]]:
    """The readable recordings that are not done yet, each with the number of its group.

    A group is repeated as a whole, so that its batches and the last bits of its scores are the
    same. A recording that was broken before is tried once more: it may have been the disk.
    """
    readable = [recording for recording in recordings if recording.reason is None]
    groups = number_groups([recording.windows for recording in readable], batch_size)
    groups_to_do = set()
    for recording, group in zip(readable, groups):
        head = predictions.finished_part(parts, recording, embeddings)
        is_done = head is not None and (is_whole(head) or is_broken(recording))
        if not is_done:
            groups_to_do.add(group)
    todo = [(recording, group) for recording, group in zip(readable, groups)
            if group in groups_to_do]
    n_done = len(readable) - len(todo)
    note = f"; {n_done} were done before" if n_done else ""
    hours = seconds_of(readable) / 3600
    print(f"data: {plural(len(recordings), 'recording')}, {hours:.2f} h{note}")
    return todo


def is_whole(head: dict) -> bool:
    return head["reason"] is None and not head.get("truncated")


def is_broken(recording: Recording) -> bool:
    try:
        return check(recording.file).truncated
    except AudioError:
        return True


def seconds_of(recordings: Iterable[Recording]) -> float:
    return sum(recording.info.seconds for recording in recordings)


# --- the end of a run ---

@contextlib.contextmanager
def interruptions(out, batch_size):
    """Say what is kept if a signal comes or memory runs out."""
    try:
        yield
    except SystemExit:  # a signal
        print(f"\nstopped: finished recordings are kept in {out}; the same command continues")
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"--batch-size {batch_size}: out of memory; give a smaller one. Finished "
                       "recordings are kept") from None


def list_unreadable(out: Path, readable: list[Recording], unreadable: list[tuple[str, str]]
                    ) -> None:
    """Write bad_files.csv and print the first truncated recordings and [(path, reason)]."""
    truncated = [(recording.path, f"{recording.truncated}; what decodes is used")
                 for recording in readable if recording.truncated]
    write_bad_files(unreadable + truncated, out / "bad_files.csv")
    for path, reason in truncated[:10]:
        print(f"  truncated: {printable(path)}: {reason}")
    for path, reason in unreadable[:10]:
        print(f"  left out: {printable(path)}: {reason}")
    if unreadable:
        print(f"{plural(len(unreadable), 'unreadable recording')}, see {out}/bad_files.csv")


def print_speed(done: list[Recording], n_windows: int, seconds: float) -> None:
    n_seconds = seconds_of(done)
    speed = f", {n_seconds / seconds:.0f} times real time" if done else ""
    print(f"predicted: {plural(len(done), 'recording')}, {plural(n_windows, 'window')}, "
          f"{n_seconds:.0f} s of audio in {duration(seconds)}{speed}")


def write_tables(out: Path, recordings: list[Recording], formats: list[str], embeddings: bool,
                 classes: list[str], config: FrontendConfig) -> None:
    """Write the results of all recordings in these formats, from their parts."""
    written, n_silent, n_empty, n_windows = predictions.assemble_tables(
        out, recordings, formats, classes, config)
    if embeddings:
        predictions.link_embeddings(out, recordings, link)
        written.append("embeddings/")
    if n_silent:
        print(f"  {n_silent} of {n_windows} windows are silent (peak below {SILENCE_DBFS} dBFS): "
              "they get no class")
    if n_empty:
        print(f"  {n_empty} of {n_windows} windows have no class that reaches its threshold; "
              "--threshold 0 shows the best class of each")
    print(f"written: {out}/{', '.join(written)}")


if __name__ == "__main__":
    run_script(main)
