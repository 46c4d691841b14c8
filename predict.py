"""Predict over recordings of any length: python predict.py --ckpt best.pt FILES_OR_FOLDERS

Takes no geometry flags: the checkpoint says what the model, the front end, the classes and a window are. Reads from top
to bottom: flags, the results of one recording, the loop, the tables, and `main`, which puts them together.
"""
import argparse
import contextlib
import csv
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall on a shared CPU
import torch
from tqdm import tqdm

from metrics import apply_temperature
from core.run.checkpoint import as_checkpoint_error as reading, link, load_checkpoint
from core.divergence import TrainingError as NumbersError
from core.device.memory import is_out_of_memory as ran_out
from core.device.precision import choose_precision, pick_device
from core.exits import run_script, print_error
from core.run.folder import RunError, create_run
from util import write_json, printable
from core.run.signals import StopRequest
from core.smoke import duration
from data.audio import AudioError, check
from data.manifest import DataError
from data.scan import write_bad_files
from data.stream import Windows, find_recordings, read_headers, number_groups, window_batches
from core.scoring import calibration_of, find_checkpoint, is_multi_label as multi_label_of, restore, window_scores
from report.tracks import label_track, labelled, selection_table, window_lines, window_rows
from util import plural as count

FORMATS = ("csv", "jsonl", "raven", "audacity")
SUFFIXES = {"raven": ".Table.1.selections.txt", "audacity": ".txt", "embeddings": ".npz"}  # of a file for each recording


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__.split("\n")[0], epilog="""
        windows.csv has a line for each window and class that was kept (path, start and end in seconds, label, score), with
        an empty label where no class reaches its threshold; files.csv the same for each recording as a whole (the mean of its
        windows, calibrated as one clip is), classes.csv in how many windows of a recording each class was kept, its highest score and
        where; bad_files.csv what could not be read and why. Windows are never merged: a call
        that goes on over three windows is three lines. A run that was stopped, by whatever, is continued by the same command:
        what is done is not done again, a recording that has changed is; parts/ is there for that.""")
    parser.error = lambda message: [print_error(f"{message} (see --help)"), sys.exit(2)]
    parser.add_argument("inputs", nargs="+", metavar="FILES_OR_FOLDERS", help="recordings, and folders with recordings "
                        "anywhere below")
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint; a bare name is looked up in the newest run under runs/")
    add("--out", default="predictions", help="folder of the results (default: predictions); one for each set of flags")
    add("--hop", type=float, help="seconds from one window to the next (default: a window's length, side by side; the last "
        "one is moved back to end with the recording)")
    add("--threshold", type=float, help="score from which on a class counts (default: the checkpoint's for each class, 0.5 "
        "where it has none)")
    add("--top-k", type=int, help="so many classes of a window, the best, are asked whether they reach their threshold (default: 1, "
        "all where clips may have several labels)")
    add("--format", type=formats, default=["csv"], help=f"{', '.join(FORMATS)} or several with commas between (default: csv); "
        "jsonl: a line for each window; raven, audacity: a selection table or label track for each recording")
    add("--embeddings", action="store_true", help="write the model's features of each window, too: an .npz for each recording "
        "with embeddings (windows, dim) float32, start and end in seconds; there is no other format")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="precision (default: what the device can)")
    add("--batch-size", type=int, default=16, help="windows at a time, of one recording or of several")
    add("--workers", type=int, default=-1, help="recordings decoded at a time (-1: one per core, at most 8, with a GPU; 1 "
        "without)")
    args = parser.parse_args(argv)
    for name, low in (("batch_size", 1), ("top_k", 1), ("hop", 0.01)):
        if getattr(args, name) is not None and not low <= getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: must lie in 0 to 1")
    if args.workers == 0 or args.workers < -1:
        parser.error(f"--workers {args.workers}: must be at least 1, or -1")
    return args


def formats(text):
    names = text.split(",")
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text!r}: give {', '.join(FORMATS)} or several with commas between")
    return list(dict.fromkeys(names))


# --- what a window or a recording gets ---

def kept(probabilities, temperature, multi_label, thresholds, top_k):
    """(classes,) probabilities as the model gives them -> [[class, calibrated score]] of those of the best `top_k` whose score
    reaches their threshold, best first: where a clip has one label, the second best is no answer because the best is unsure."""
    scores = apply_temperature(probabilities[None], temperature, multi_label)[0]
    order = np.argsort(-scores, kind="stable")
    return [[int(i), round(float(scores[i]), 6)] for i in order[:top_k] if scores[i] >= thresholds[i]]


class Part:
    """The results of one recording on their way to its file in parts/: a line of JSON that sums them up, then one for
    each window, [start, end, [[class, score], ...]], start and end in samples. They wait in unnamed files, so that memory
    does not grow, and get their name when all are there."""

    def __init__(self, folder, recording, keep, dim):
        self.folder, self.recording, self.keep, self.dim = folder, recording, keep, dim  # dim: of features to write, or 0
        self.rows = tempfile.TemporaryFile("w+", dir=folder)
        self.features = tempfile.TemporaryFile(dir=folder) if dim else None
        self.sums, self.count, self.heard = 0.0, 0, 0  # heard: samples

    def add(self, start, end, probabilities, features):
        """A window: samples, (classes,) probabilities and (dim,) features -> samples that it adds to what was heard."""
        self.rows.write(json.dumps([start, end, self.keep(probabilities)]) + "\n")
        if self.dim:
            self.features.write(features.tobytes())
        new = end - self.heard
        self.sums, self.count, self.heard = self.sums + probabilities, self.count + 1, end
        return new

    def finish(self, reason, rate):
        """All windows are there; or there will be no more, for a reason."""
        path = part_path(self.folder, self.recording)
        head = {"size": self.recording.size, "mtime_ns": self.recording.mtime_ns, "reason": reason}
        if reason is None:
            # calibration was fitted on such means, so the temperature comes after
            head |= {"windows": self.count, "scores": self.keep(self.sums / self.count), "bytes": self.rows.tell()}
            if self.dim:
                self._write_features(path.with_suffix(".npz"), rate)
        with replacing(path) as file:
            file.write(json.dumps(head) + "\n")
            if reason is None:
                self.rows.seek(0)
                shutil.copyfileobj(self.rows, file)

    def _write_features(self, path, rate):
        self.features.flush()
        self.rows.seek(0)
        spans = np.array([json.loads(line)[:2] for line in self.rows]) / rate  # (windows, 2)
        with replacing(path, "wb") as file:
            np.savez(file, embeddings=np.memmap(self.features, np.float32, "r", shape=(self.count, self.dim)),
                     start=spans[:, 0], end=spans[:, 1])


def part_path(folder, recording):
    return folder / f"{recording.key}.jsonl"


def finished(folder, recording, embeddings):
    """The first line of a recording's file in `folder`; None where there is none, or not a whole one, or the recording
    has changed since."""
    path = part_path(folder, recording)
    try:
        with open(path, "rb") as file:
            line = file.readline()
        head = json.loads(line)
        if (head["size"], head["mtime_ns"]) != (recording.size, recording.mtime_ns):
            return None
        if head["reason"] is None and (path.stat().st_size != len(line) + head["bytes"]
                                       or embeddings and not path.with_suffix(".npz").exists()):
            return None
        return head
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file to write that takes the place of `path` when all is written. Bytes of a path that are not UTF-8 are
    written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        text = {} if "b" in mode else dict(newline="", encoding="utf-8", errors="surrogateescape")
        with open(temporary, mode, **text) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@torch.inference_mode()
def predict(model, frontend, batches, precision, multi_label, new_part, bar):
    """Score every window of the batches and write the part of each recording -> windows scored. new_part(recording) opens
    one. Raises NumbersError where scores are not finite."""
    model.eval()
    parts, count, rate = {}, 0, frontend.config.sample_rate

    def part(recording):
        if recording.file not in parts:
            parts[recording.file] = new_part(recording)
        return parts[recording.file]

    with precision.cast_weights_once():
        for batch in batches:
            if batch.windows:
                _, probabilities, features = window_scores(model, frontend, torch.from_numpy(batch.wave), precision, multi_label)
                features = features.float().cpu().numpy()
                if not np.isfinite(probabilities).all():
                    raise NumbersError("the model's scores are not finite: its weights are damaged or the precision is too "
                                       "low; try --amp off")
                for (recording, start, end), *its in zip(batch.windows, probabilities, features, strict=True):
                    bar.update(part(recording).add(start, end, *its) / rate)
                count += len(batch.windows)
            for recording, reason in batch.ended:
                part(recording).finish(reason, rate)
                del parts[recording.file]
    return count


# --- the folder of the results ---

def open_out(out):
    """Make and lock the folder -> the settings of the predictions that are in it, or None where there are none yet."""
    try:
        if out.is_dir() and not (out / "settings.json").exists() and any(p.name not in (".lock", "parts") for p in out.iterdir()):
            raise RunError(f"--out {out}: holds other things than predictions; give another --out")
        create_run(out, may_exist=True)
        (out / "parts").mkdir(exist_ok=True)
        return json.loads((out / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except RunError as error:
        raise RunError(str(error).replace("--run-dir", "--out")) from None
    except (OSError, ValueError) as error:
        raise RunError(f"--out {out}: its settings.json cannot be read ({error}); give another --out") from None


def settle(out, stored, settings):
    """Write the settings into a new folder; refuse a folder whose predictions were made with others."""
    if stored is None:
        write_json(out / "settings.json", settings)
        return
    for name, value in settings.items():
        if stored.get(name) != value:
            what = "of another checkpoint" if name == "checkpoint" else f"with {name} {stored.get(name)}, not {value}"
            raise RunError(f"--out {out}: holds predictions {what}; give another --out, or remove that folder")


def put_together(out, recordings, names, embeddings, classes, config):
    """Write the tables of all recordings from their parts -> (recordings that have predictions, [(path, reason)] of the
    others, what was written)."""
    parts, good, bad = out / "parts", [], []
    for recording in recordings:
        if recording.reason is None:
            with open(part_path(parts, recording), "rb") as file:
                recording.reason = json.loads(file.readline())["reason"]
        if recording.reason is None:
            good.append(recording)
            continue
        bad.append((recording.path, recording.reason))
        for name in SUFFIXES:  # it may have been readable once
            own_file(out, name, recording).unlink(missing_ok=True)
    write_bad_files(bad, out / "bad_files.csv")
    if not good:
        return good, bad, []
    written = write_tables(out, good, names, classes, config)
    if embeddings:
        for recording in good:
            path = own_file(out, "embeddings", recording)
            path.parent.mkdir(parents=True, exist_ok=True)
            link(part_path(parts, recording).with_suffix(".npz"), path)
        written.append("embeddings/")
    return good, bad, written


def own_file(out, name, recording):
    return out / name / (recording.name + SUFFIXES[name])


def write_tables(out, recordings, names, classes, config):
    """Put the parts of the recordings together in the formats called `names` -> what was written."""
    empty = total = 0
    with contextlib.ExitStack() as stack:
        files, counts = (csv.writer(stack.enter_context(replacing(out / name))) for name in ("files.csv", "classes.csv"))
        files.writerow("path seconds windows label score".split())
        counts.writerow("path label windows highest at".split())
        together = {name: stack.enter_context(replacing(out / f"windows.{name}")) for name in names if name in ("csv", "jsonl")}
        if "csv" in together:
            csv.writer(together["csv"]).writerow("path start end label score".split())
        for recording in recordings:
            with contextlib.ExitStack() as own:
                writers = [window_rows(together[name], recording) if name == "csv" else window_lines(together[name], recording)
                           for name in together]
                for name in names:
                    if name in SUFFIXES:
                        file = own.enter_context(replacing(own_file(out, name, recording)))
                        writers.append(selection_table(file, config.fmin, min(config.fmax, recording.info.rate / 2)) if name == "raven"
                                       else label_track(file))
                part = own.enter_context(open(part_path(out / "parts", recording), encoding="utf-8"))
                head = json.loads(part.readline())
                for label, score in labelled(head["scores"], classes) or [("", "")]:
                    files.writerow([recording.path, f"{recording.info.seconds:.3f}", head["windows"], label, score])
                heard = {}  # class -> [windows, highest score, start of that window]
                for line in part:
                    start, end, found = json.loads(line)
                    for write in writers:
                        write(start / config.sample_rate, end / config.sample_rate, labelled(found, classes))
                    empty, total = empty + (not found), total + 1
                    for i, score in found:
                        n, highest, at = heard.get(i, (0, -1.0, 0))
                        heard[i] = (n + 1, score, start) if score > highest else (n + 1, highest, at)
                counts.writerows([recording.path, classes[i], n, f"{highest:.6f}", f"{at / config.sample_rate:.3f}"]
                                 for i, (n, highest, at) in sorted(heard.items(), key=lambda item: -item[1][0]))
    if empty:
        print(f"  {empty} of {total} windows have no class that reaches its threshold; --threshold 0 gives each its best")
    return ["files.csv", "classes.csv", *(f"windows.{name}" for name in together), *(f"{name}/" for name in names if name in SUFFIXES)]


def unfinished(parts, recordings, groups, embeddings):
    """The recordings that are to be done, with their groups -> ([(recording, group)], number of those done before).

    A group with one that is not done is done again as a whole. One that was broken before is decoded once more: it may
    have been the disk or the network."""
    done = set()
    for recording in recordings:
        head = finished(parts, recording, embeddings)
        if head is not None and (head["reason"] is None or still_broken(recording)):
            done.add(recording.file)
    again = {group for recording, group in zip(recordings, groups, strict=True) if recording.file not in done}
    todo = [(recording, group) for recording, group in zip(recordings, groups, strict=True) if group in again]
    return todo, len(recordings) - len(todo)


def still_broken(recording):
    try:
        check(recording.file)
    except AudioError:
        return True
    return False


# --- the command ---

def main(argv=None):
    args = parse(argv)
    StopRequest()  # never armed: a signal ends the process at once, with 130 or 143, and what is done is on the disk
    path, out = find_checkpoint(args.ckpt), Path(args.out)
    recordings = find_recordings(args.inputs)
    print(f"checkpoint: {path}")
    state, device = load_checkpoint(path), pick_device(args.device)
    model, frontend = restore(state, device)
    rate, calibration, multi_label = frontend.config.sample_rate, calibration_of(state), multi_label_of(state)
    top_k = args.top_k or (len(state["classes"]) if multi_label else 1)
    thresholds = np.array(calibration["thresholds"] if args.threshold is None else [args.threshold] * len(state["classes"]))
    with reading(path):
        cut = Windows(rate, state["clip"]["samples"], state["clip"]["samples"], state["clip"]["short"])
    if args.hop is not None:
        if round(args.hop * rate) > cut.samples:
            raise DataError(f"--hop {args.hop:g}: longer than a window, which would leave audio unheard; give at most "
                            f"{cut.samples / rate:g}")
        cut = replace(cut, hop=round(args.hop * rate))
    stored = open_out(out)
    again = args.amp == "auto" and stored and stored.get("device") == device.type  # what auto measures may differ
    precision = choose_precision(device, stored.get("amp", "auto") if again else args.amp)
    print(f"device: {device}, {precision.name} ({precision.reason})")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settle(out, stored, {"checkpoint": digest, "hop": cut.hop / rate, "threshold": args.threshold, "top_k": top_k,
                         "embeddings": args.embeddings, "device": device.type, "amp": precision.mode})

    read_headers(recordings, cut)
    readable = [recording for recording in recordings if recording.reason is None]
    groups = number_groups([recording.windows for recording in readable], args.batch_size)
    todo, before = unfinished(out / "parts", readable, groups, args.embeddings)
    print(f"data: {count(len(recordings), 'recording')}, {sum(r.info.seconds for r in readable) / 3600:.2f} h"
          + f"; {before} were done before" * bool(before))

    def new_part(recording):
        return Part(out / "parts", recording, lambda p: kept(p, calibration["temperature"], multi_label, thresholds, top_k),
                    model.config.dim if args.embeddings else 0)

    threads = args.workers if args.workers > 0 else min(8, os.cpu_count() or 1) if device.type == "cuda" else 1
    began = time.perf_counter()
    try:
        with tqdm(total=round(sum(recording.info.seconds for recording, _ in todo)), desc="predicting", unit="s", unit_scale=True,
                  leave=False, disable=not sys.stderr.isatty()) as bar:
            windows = predict(model, frontend, window_batches(todo, cut, args.batch_size, threads), precision, multi_label, new_part,
                              bar)
        took = time.perf_counter() - began
        good, bad, written = put_together(out, recordings, args.format, args.embeddings, state["classes"], frontend.config)
    except SystemExit:  # a signal
        print(f"\nstopped: what is done is kept in {out}, the same command goes on from there")
        raise
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise RunError(f"--batch-size {args.batch_size}: out of memory; give a smaller one, what is done is kept") from None
    for name, reason in bad[:10]:
        print(f"  left out: {printable(name)}: {reason}")
    if not good:
        raise DataError(f"{args.inputs[0]}: none of the {len(recordings)} recordings can be read; {out}/bad_files.csv says why")
    done = [recording.info.seconds for recording, _ in todo if recording.reason is None]
    print(f"predicted: {count(len(done), 'recording')}, {count(windows, 'window')}, {sum(done):.0f} s of audio in {duration(took)}"
          + f", {sum(done) / took:.0f} times real time" * bool(done))
    print(f"written: {out}/{', '.join(written)}" + f"; {len(bad)} recordings could not be read, see bad_files.csv" * bool(bad))


if __name__ == "__main__":
    run_script(main)
