"""Evaluate a checkpoint: python evaluate.py --ckpt best.pt

Takes no geometry flags: the checkpoint says what the model, the front end, the classes and the split are.
Holds `evaluate()`, which validation during training and the test both use.
"""
import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall on a shared CPU
import torch
from tqdm import tqdm

from core.calibration import HOTTEST, temper
from core.checkpoint import CheckpointError, load_checkpoint, reading
from core.guard import NumbersError
from core.precision import DeviceError, choose_precision, pick_device
from core.run import RunError, newest_run
from data.cache import WaveCache
from data.clips import Clips, evaluation_batches
from data.manifest import SPLITS, DataError, Manifest, load_manifest
from data.named import credit, find_data
from data.prepare import cache_folder
from data.scan import printable, scan
from losses import SIGMOID, build_loss, hits as hits_of
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.relevance import patch_relevance
from report import examples, page
from metrics import predicted_classes as decisions  # noqa: F401
from report.results import pooled_results, result_lines, write_results  # noqa: F401

INPUT_ERRORS = (CheckpointError, DataError, DeviceError, RunError)
# The report looks for wrong labels among so many training clips, for so many seconds, and for what mattered for so long.
SUSPECT_CLIPS, SUSPECT_SECONDS, RELEVANCE_SECONDS = 2000, 120, 60


@dataclass
class Evaluation:
    """Scores of the clips that could be read, in the order of their rows."""
    rows: np.ndarray  # (n,) manifest rows
    labels: np.ndarray  # (n,) class indices, or (n, classes) of 1, 0 and nan where clips may have several labels
    scores: np.ndarray  # (n, classes) probabilities (of several labels each for itself), the mean over each clip's tiles
    losses: np.ndarray  # (n,) the mean over each clip's tiles
    broken: dict  # row -> why it could not be read
    tiles: np.ndarray  # (n,) how many each clip has
    hits: np.ndarray  # (n,) how many of them alone would have been right

    @classmethod
    def merge(cls, parts):
        """One Evaluation from those of the ranks, which had every n-th row each, ordered by row."""
        rows, labels, scores, losses, tiles, hits = (np.concatenate([getattr(part, name) for part in parts]) for name in (
            "rows", "labels", "scores", "losses", "tiles", "hits"))
        order = np.argsort(rows)
        return cls(rows[order], labels[order], scores[order], losses[order],
                   {row: why for part in parts for row, why in part.broken.items()}, tiles[order], hits[order])


@torch.inference_mode()
def window_scores(model, frontend, wave, precision, multi_label):
    """The one way from audio to scores: waveforms (B, samples) -> logits (B, classes) and features (B, dim), on the device, and
    scores (B, classes) in float64 on the CPU: of each class for itself, or adding up to 1 over the classes."""
    wave = wave.to(precision.device, non_blocking=True)
    with precision.autocast():
        features = model.features(frontend(wave))
        logits = model.head(features)
    scores = logits.float().cpu().double().sigmoid() if multi_label else logits.float().softmax(dim=1).cpu().double()
    return logits, scores.numpy(), features


@torch.inference_mode()
def evaluate(model, frontend, batches, manifest, rows, loss_fn, precision, stop=None, show=None):
    """Score every clip of `rows` once -> Evaluation, or None where `stop()` turned true on the way.

    batches: from `evaluation_batches` over the same rows. A clip with an unreadable tile is left out and
    listed in `.broken`. Raises NumbersError where scores are not finite.
    """
    model.eval()
    loss_fn.eval()
    index = {int(row): i for i, row in enumerate(rows)}
    n_classes = model.config.n_classes
    scores, losses = np.zeros((len(rows), n_classes)), np.zeros(len(rows))
    tiles, hits, broken = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64), {}
    bar = tqdm(batches, desc=show, leave=False, disable=show is None or not sys.stderr.isatty(), unit="batch")
    with precision.window():
        for batch in bar:
            if stop is not None and stop():
                return None
            broken.update(batch.broken)
            if len(batch.rows) == 0:
                continue
            logits, tile_scores, _ = window_scores(model, frontend, batch.wave, precision, manifest.multi_label)
            loss = loss_fn(logits, batch.target.to(precision.device, non_blocking=True))
            at = [index[row] for row in batch.rows.tolist()]
            np.add.at(scores, at, tile_scores)
            np.add.at(losses, at, loss.cpu().double().numpy())
            np.add.at(tiles, at, 1)
            np.add.at(hits, at, hits_of(logits.cpu(), batch.target).numpy())
    keep = np.array([int(row) not in broken for row in rows], dtype=bool) & (tiles > 0)
    scores, losses = scores[keep] / tiles[keep, None], losses[keep] / tiles[keep]
    rows = np.asarray(rows)[keep]
    if not np.isfinite(scores).all() or not np.isfinite(losses).all():
        raise NumbersError("the model's scores are not finite: its weights are damaged or the precision is too low; try "
                           "--amp off")
    labels = manifest.targets(rows) if manifest.multi_label else manifest.labels[rows].astype(np.int64)
    return Evaluation(rows, labels, scores, losses, broken, tiles[keep], hits[keep])


def write_report(out, checkpoint, calibration, epoch, folder, result, model, frontend, clips, loss_fn, precision, batch_size,
                 options=()):
    """Write the page `out` about the results in `folder`, with clips to listen to out of `result` and, where the manifest has
    them, out of the training clips -> a line for the person. checkpoint, calibration, epoch: its path, what `calibration_of`
    gives for it, and the epoch that its weights are of; options: words for evaluate.py to do it again."""
    manifest, rows = clips.manifest, clips.manifest.rows("train")
    split = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["split"]

    def listen(result, kinds):
        return examples_of(kinds, result, calibration, model, frontend, clips, precision)
    trained, kinds, scored, shown = result, ("suspect", "uncertain", "right"), (0, len(rows), 0), []
    if split != "train":
        some = np.random.default_rng(0).permutation(rows)[:SUSPECT_CLIPS]
        trained, kinds = score_some(some, model, frontend, clips, loss_fn, precision, batch_size), ("suspect",)
    if trained is not None:
        said = examples.answers(temper(trained.scores, calibration["temperature"], manifest.multi_label), trained.labels,
                                calibration["thresholds"])
        truth = examples.answers(manifest.targets(trained.rows), trained.labels, 0.5)
        scored, shown = (len(trained.rows), len(rows), int((said != truth).any(axis=1).sum())), listen(trained, kinds)
    if split != "train":
        shown += listen(result, examples.OF_TEST)
    try:
        page.write_page(out, checkpoint.parent, folder, shown, examples.SuspectSearch(*scored), manifest.root,
                        frontend.mel_hz.numpy(), (model.config.patch, model.config.stride), epoch,
                        shlex.join(["python", "evaluate.py", "--ckpt", str(checkpoint), *options]))
    except OSError as error:
        return f"{out}: cannot be written ({error.strerror}); the results are in {folder}"
    return f"written: {out}"


def score_some(rows, model, frontend, clips, loss_fn, precision, batch_size):
    """An Evaluation of these rows, or of as many as SUSPECT_SECONDS allow; None of none."""
    began, parts = time.monotonic(), []
    for i in range(0, len(rows), 100):
        if time.monotonic() - began > SUSPECT_SECONDS:
            break
        some = rows[i:i + 100]
        parts.append(evaluate(model, frontend, evaluation_batches(clips, some, batch_size), clips.manifest, some, loss_fn, precision,
                              show="training clips"))
    return Evaluation.merge(parts) if sum(len(part.rows) for part in parts) else None


def examples_of(kinds, result, calibration, model, frontend, clips, precision, most_tiles=32):
    """[examples.Example] of these kinds out of an Evaluation: of each clip the tile that speaks most for the class it was chosen for,
    of at most so many spread over it. A clip that cannot be read any more is left out."""
    manifest, rate, found, began = clips.manifest, clips.rate, [], time.monotonic()
    scores = temper(result.scores, calibration["temperature"], manifest.multi_label)
    said = examples.answers(scores, result.labels, calibration["thresholds"])
    for kind, i, focus in examples.choose(scores, result.labels, kinds, calibration["thresholds"]):
        row = int(result.rows[i])
        starts = clips.tiles(row)
        starts = [starts[j] for j in np.unique(np.linspace(0, len(starts) - 1, min(most_tiles, len(starts))).astype(int))]
        batch = clips.batch([(row, start) for start in starts])
        if batch.broken:
            continue
        _, tile_scores, _ = window_scores(model, frontend, batch.wave, precision, manifest.multi_label)
        tile, relevance = int(tile_scores[:, focus].argmax()), None
        with torch.no_grad():
            spec = frontend(batch.wave[tile:tile + 1].to(precision.device))
        if time.monotonic() - began < RELEVANCE_SECONDS:
            relevance = patch_relevance(model, spec, torch.tensor([focus], device=spec.device))[0].cpu().numpy()
        start, length = starts[tile], min(clips.samples, int(clips.total[row]) - starts[tile])
        begin = float(manifest.start[row]) + start / rate
        found.append(examples.Example(kind, i, manifest.paths[row], manifest.file(row), begin, begin + length / rate,
                                  manifest.positives([row])[1].tolist(), np.flatnonzero(said[i]).tolist(), focus, scores[i],
                                  spec[0].cpu().numpy(), relevance, batch.wave[tile].cpu().numpy(), rate))
    return found


def weights_of(state):
    """The weights of a checkpoint that are evaluated: the averages, where the run kept some."""
    return state["ema"] or state["model"]


def multi_label_of(state):
    """Whether a checkpoint's clips may have several labels, so that each class is a question of its own."""
    with reading(state.path):
        return state["manifest"].get("label_set") is not None


def calibration_of(state):
    """The temperature and the thresholds of a checkpoint {"temperature": float, "thresholds": [float]}: 1 and 0.5 in one that
    older versions wrote."""
    with reading(state.path):
        found = state["calibration"] or {"temperature": 1.0, "thresholds": [0.5] * len(state["classes"])}
        temperature, thresholds = found["temperature"], found["thresholds"]
        if not 1 / HOTTEST <= temperature <= HOTTEST or len(thresholds) != len(state["classes"]) or not all(
                0 <= value <= 1 for value in thresholds):
            raise ValueError("a temperature or thresholds out of range")
        return {"temperature": float(temperature), "thresholds": [float(value) for value in thresholds]}


def restore(state, device, averaged=True):
    """The model and the front end that a checkpoint from `load_checkpoint` describes, on a device."""
    with reading(state.path):
        weights = weights_of(state) if averaged else state["model"]
        config, frontend = ASTConfig(**state["config"]), FrontendConfig(**state["frontend"])
        found = {name: value.shape for name, value in weights.items()}
        if config.depth != len({name.split(".")[1] for name in found if name.startswith("blocks.")}):
            raise ValueError(f"its weights are not of depth {config.depth}")
        with torch.device("meta"):  # shapes without memory, whatever sizes it claims
            shapes = {name: value.shape for name, value in AST(config).state_dict().items()}
        for name in [*shapes, *found]:
            if shapes.get(name) != found.get(name):
                raise ValueError(f"{name[:60]} has shape {found.get(name)}, its config gives {shapes.get(name)}")
        if not config.patch <= frontend.frames(state["clip"]["samples"]) < 10**6 or frontend.n_mels != config.n_mels:
            raise ValueError(f"its clip of {state['clip']['samples']} samples does not fit its front end and model")
        if len(state["classes"]) != config.n_classes:
            raise ValueError(f"{len(state['classes'])} classes and {config.n_classes} scores")
        model = AST(config)
        model.load_state_dict(weights)
        return model.to(device), build_frontend(frontend).to(device)


def find_checkpoint(name):
    """A path as given; a bare name that is no file here is looked up in the newest run."""
    path = Path(name)
    if path.is_file() or path.name != name:
        return path
    found = newest_run("runs", name)
    if found is None:
        newest = newest_run("runs", "last.pt")
        mend = "train first (python train.py) or give a path" if newest is None else (
            f"the newest, {newest.parent}, has {', '.join(sorted(p.name for p in newest.parent.glob('*.pt')))}")
        raise CheckpointError(f"--ckpt {name}: no such file here, and no run under runs/ has one; {mend}")
    return found


def evaluation_data(state, data, audio_dir, split):
    """What to evaluate on -> (manifest with the checkpoint's classes, rows, split name, notes)."""
    with reading(state.path):
        own = Manifest.from_dict(state["manifest"])
        if own.classes != state["classes"]:
            raise ValueError("the classes of its manifest are not its own")
        if own.multi_label and state["loss"]["name"] not in SIGMOID:
            raise ValueError("its manifest has several labels a clip, which its loss cannot learn")
    if data is not None:
        other = load_manifest(data, audio_dir, own.classes)
        known = {path: row for row, path in enumerate(own.paths)}
        if np.mean([path in known for path in other.paths]) > 0.5:
            # The training data in another place: its split stands, or training clips would be tested on.
            own.root = other.root
        else:
            return _other_data(other, own.classes, own.multi_label)
    rows = own.rows(split)
    if len(rows) == 0:
        there = [name for name in SPLITS if len(own.rows(name))]
        raise DataError(f"--split {split}: the run has no such clips; it has {', '.join(there)}")
    missing = [row for row in rows if not own.file(row).exists()]
    if len(missing) == len(rows):
        raise DataError(f"{own.file(rows[0])}: the run's recordings are not there any more; give their folder with "
                        "--data")
    return own, rows, split, [f"data: {own.root}, the split made in training"]


def _other_data(other, classes, multi_label):
    """Map another data set's labels to the checkpoint's classes; all of its readable clips are used."""
    strange = [name for name in other.classes if name not in classes]
    if strange:
        raise DataError(f"--data: classes that the checkpoint does not know: {', '.join(strange[:5])}"
                        f"{' ...' if len(strange) > 5 else ''}; it knows {', '.join(classes[:5])}"
                        f"{' ...' if len(classes) > 5 else ''}; rename or leave them out")
    if not multi_label and other.multi_label and any(len(held) > 1 for held, _ in other.label_sets):
        raise DataError(f"--data {other.root}: clips with several labels, but the checkpoint has learnt that a clip has one; give "
                        "clips with one label, or a checkpoint of such data")
    if multi_label != other.multi_label:
        other = other.with_sets([((int(label),), ()) for label in other.labels]) if multi_label else other.one_label()
    seen = scan(other, None, full=False)
    keep = np.flatnonzero(seen.ok)
    if len(keep) == 0:
        raise DataError(f"--data {other.root}: none of the {len(other)} files can be read; the first: "
                        f"{other.paths[0]}: {seen.reasons[0]}")
    found = other.take(keep).relabelled(classes, [classes.index(name) for name in other.classes])
    found.duration = seen.duration[keep]
    notes = [f"data: {other.root}, all {len(keep)} clips (not the training data)"]
    if len(keep) < len(other):
        notes.append(f"  {len(other) - len(keep)} files cannot be read and are left out")
    return found, np.arange(len(keep)), "all", notes


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.error = lambda message: sys.exit(fail(f"{message} (see --help)"))
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint; a bare name is looked up in the newest run under runs/")
    add("--split", default="test", choices=SPLITS, help="which part of the run's own split (default: test)")
    add("--data", help="other data with the same classes, or the same data in another place; as train.py takes it")
    add("--audio-dir", help="folder that the paths of a CSV given with --data are relative to")
    add("--out", help="where to write the results (default: <run folder>/<split>)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="precision (default: as in training "
        "where the device can)")
    add("--batch-size", type=int, default=16, help="tiles at a time")
    add("--workers", type=int, default=0, help="processes that decode beside this one")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size and --workers: --batch-size from 1, --workers from 0")
    return args


def fail(message, code=2):
    """Say on one line what is wrong -> the exit code."""
    print(f"error: {printable(message)}", file=sys.stderr)
    return code


def escape_names():
    """From here on print names that are not UTF-8, or that the terminal cannot show, as escapes."""
    if hasattr(sys.stdout, "reconfigure"):  # not where somebody has put another stream there
        sys.stdout.reconfigure(errors="backslashreplace")


def main(argv=None):
    args = parse(argv)
    path = find_checkpoint(args.ckpt)
    print(f"checkpoint: {path}")
    state = load_checkpoint(path)
    device = pick_device(args.device)
    precision = choose_precision(device, args.amp)
    print(f"device: {device}, {precision.name} ({precision.reason})")
    model, frontend = restore(state, device)
    with reading(path):
        kept, cached = cache_folder(state["flags"]["cache_dir"]), state["flags"].get("cache", "off") != "off"
    data = args.data and find_data(args.data, kept)
    manifest, rows, split, notes = evaluation_data(state, data, args.audio_dir, args.split)
    print("\n".join(notes + [f"  {line}" for line in credit(manifest.root)]))
    with reading(path):
        cache = WaveCache(kept / "audio", frontend.config.sample_rate) if cached else None
        clips = Clips(manifest, frontend.config.sample_rate, state["clip"]["samples"], state["clip"]["short"], cache=cache)
        loss_fn = build_loss(**state["loss"]).to(device)
        loss_fn(torch.zeros(1, len(state["classes"]), device=device), torch.zeros(1, dtype=torch.long, device=device))
    batches = evaluation_batches(clips, rows, args.batch_size, args.workers, pin=device.type == "cuda")
    result = evaluate(model, frontend, batches, manifest, rows, loss_fn, precision, show=split)
    for row, reason in list(result.broken.items())[:10]:
        print(f"  left out: {manifest.paths[row]}: {reason}")
    if len(result.rows) == 0:
        raise DataError(f"{manifest.root}: none of the {len(rows)} clips can be read; give their folder with --data")
    folder = Path(args.out) if args.out else path.parent / split
    calibration = calibration_of(state)
    metrics = write_results(folder, result, manifest, state["classes"], split, calibration)
    print("\n".join(result_lines(metrics)))
    print(f"written: {folder}/metrics.json, predictions.csv, scores.npz, per_class.csv" + ", confusion.png" * (
        not manifest.multi_label), flush=True)
    out = (folder if args.out or split != "test" else path.parent) / "report.html"
    options = [f"--{name}={value}" for name in ("split", "data", "audio-dir", "out")
               if (value := getattr(args, name.replace("-", "_"))) != (name == "split" and "test" or None)]
    print(write_report(out, path, calibration, state["progress"]["epoch"], folder, result, model, frontend, clips, loss_fn, precision,
                       args.batch_size, options))


if __name__ == "__main__":
    escape_names()
    try:
        main()
    except INPUT_ERRORS as error:
        sys.exit(fail(error))
    except NumbersError as error:
        sys.exit(fail(error, 3))
