"""Fine-tune an Audio Spectrogram Transformer on labelled recordings.

    python train.py --warmup-epochs 0 --batch-size 4                      the built-in demo, offline, on a CPU
    python train.py --data FOLDER_OR_CSV --warmup-epochs 0 --batch-size 4  your own recordings

Reads from top to bottom: flags, then data, model, optimiser and the loop in `main`, around `train_step`.
"""
import argparse
import collections
import contextlib
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall on a shared CPU
import numpy as np
import torch
from tqdm import tqdm

from core.calibration import calibrate
from core.checkpoint import CheckpointError, SaveTimer, link, load_checkpoint, reading, save_checkpoint
from core.compiled import Compiled
from core.distributed import Ranks, RanksError
from core.ema import EMA
from core.guard import NumbersError, diverged
from core.memory import OutOfMemory, Pieces, largest_batch, ran_out
from core.metrics import point_metrics
from core.precision import DeviceError, Precision, choose_precision, pick_device
from core.progress import Progress
from core.run import DISK_ERRORS, RunError, RunLog, create_run, describe_machine, open_run, write_json
from core.signals import StopRequest
from core.smoke import peak_memory_mb, smoke_test
from data.augment import Augment
from data.cache import CACHES, WaveCache, choose_cache
from data.clips import Batch, Clips, TrainLoader, evaluation_batches
from data.draws import DROP_PATH, PATCHOUT, uniform
from data.manifest import DataError, Manifest, load_manifest
from data.named import SOURCES, credit, find_data
from data.prepare import cache_folder, noise_recordings, prepare
from data.sampling import SAMPLERS, quotas, write_heard
from data.scan import write_bad_files
from data.splits import split_hash, write_split
from evaluate import (Evaluation, calibration_of, decisions, escape_names, evaluate, fail, pooled_results, restore, result_lines,
                      weights_of, write_report, write_results)
from losses import SIGMOID_LOSSES, balanced_alpha, build_loss, is_correct, soft_target
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.groups import freeze_backbone, parameter_groups
from model.pretrained import WeightsError, load_pretrained
from report import pictures
from sched import SHAPES, RelativeSchedule

INPUT_ERRORS = (CheckpointError, DataError, DeviceError, RunError, WeightsError)  # exit code 2
NUMBERS_ERRORS = (NumbersError, OutOfMemory)  # exit code 3

# A recipe is a set of flag values; a flag on the command line wins over it.
RECIPES = {
    "baseline": {},
    "augmented": dict(freq_mask=15, time_mask=35, specaug_p=0.8, mixup_alpha=0.4, mixup_p=0.6),
    "best": dict(effective_batch=4, shift_p=1.0, patchout=0.3),  # what experiments/ showed
    "demo": dict(weights="none", dim=128, depth=4, heads=4, epochs=32, patience=32, effective_batch=4,
                 lr_backbone=8e-4, lr_head=8e-4, weight_decay=5e-2, freq_mask=15, time_mask=35, mixup_alpha=0.4,
                 mixup_p=0.3, shift_p=1.0),
}
# Flags that may differ when a run is resumed: they change where and how fast it runs, not what comes out.
FREE_ON_RESUME = {"resume", "run_dir", "workers", "device", "tensorboard", "eval_batch_size", "save_every", "max_skips",
                  "on_divergence", "max_bad_share", "cache_dir"}
FEW_STEPS = 10  # an epoch, below which the run says so
ROLLBACK_FACTOR, MOST_ROLLBACKS = 0.5, 5


def parse(argv=None, source=""):
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: sys.exit(fail(f"{source}{message} (see --help)"))
    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", help="class folders, a CSV with path,label or of Xeno-Canto, a folder laid out like ESC-50, "
        "UrbanSound8K, Speech Commands or BirdCLEF, demo, or a data set by name, which is fetched once: " + ", ".join(SOURCES))
    add("--audio-dir", help="folder that the paths of a CSV are relative to (default: the CSV's own)")
    add("--fold", type=int, help="test on this fold, validate on the next, train on the rest")
    add("--folds", choices=("all",), help="a run for each fold of the data, then their mean; go on with the same command and "
        "--run-dir")
    add("--min-clips", type=int, default=1, help="leave out classes with fewer clips than this")
    add("--max-bad-share", type=float, default=0.05, help="refuse to start above this share of unreadable files")
    add("--scan", default="auto", choices=("auto", "full", "headers"), help="decode every file once before training, "
        "or read headers only (auto: full up to 5,000 files)")
    add("--seconds", type=float, default=4.0, help="length of a training crop and of an evaluation tile")
    add("--short", default="repeat", choices=("repeat", "pad"), help="what becomes of clips shorter than that")
    add("--crop", default="random", choices=("random", "active", "start"), help="where training crops of longer recordings "
        "lie; active: the likelier the more goes on there")
    add("--sampler", default="shuffle", choices=tuple(SAMPLERS), help="how often a class comes in an epoch: as often as it "
        "has clips, by the root of that, or all alike")
    add("--workers", type=int, default=-1, help="processes that decode (-1: one per core, at most 8, with a GPU; 0 "
        "without)")
    add("--cache", default="auto", choices=CACHES, help="decoded audio, rounded to 16 bits of its scale: in files, in "
        "memory, on the GPU, or not kept; auto: on the GPU, else on the disk, where a quarter or half of it is enough")
    add("--cache-dir", help="folder of the cache, of the scan index and of fetched data sets (default: ~/.cache/warble)")
    add = parser.add_argument_group("model").add_argument
    add("--weights", default="audioset", help="audioset, imagenet, none, a .pth, .safetensors or .pt file, or a folder "
        "that export.py --to hf wrote")
    add("--size", default="base", choices=("tiny", "small", "base"), help="AST size")
    add("--dim", type=int, help="any size: embedding dimension")
    add("--depth", type=int, help="any size: number of blocks")
    add("--heads", type=int, help="any size: attention heads")
    add("--drop-path", type=float, default=0.0, help="stochastic depth rate of the last block")
    add("--freeze-epochs", type=int, default=0, help="epochs in which the head alone trains; as many as --epochs: a linear "
        "probe")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, about a third slower")
    add("--frontend", default="logmel", choices=("logmel", "fbank"), help="logmel: 22,050 Hz, standardised per clip; "
        "fbank: AudioSet's, 16 kHz")
    add("--fmin", type=float, help="lowest mel frequency in Hz (default: the front end's)")
    add("--fmax", type=float, help="highest mel frequency in Hz (default: the front end's)")
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=tuple(RECIPES), help="a set of flag values (default: demo for the demo, else baseline)")
    add("--epochs", type=int, default=50, help="most epochs")
    add("--patience", type=int, default=7, help="stop after so many epochs without a better one")
    add("--monitor", default="val_acc", choices=("val_acc", "val_macro_f1", "val_map", "val_loss"), help="what best is; where clips "
        "have several labels, val_map says most")
    add("--batch-size", type=batch_size, default=4, help="clips on the device at once, or auto: as many as fit")
    add("--effective-batch", type=int, help="clips per optimiser step, by accumulation (default: 32, or the next "
        "multiple of the batch size)")
    add("--eval-batch-size", type=int, default=16, help="tiles at once in evaluation")
    add("--warmup-epochs", type=float, default=0.0, help="epochs in which every group's LR rises to its own base")
    add("--schedule", default="cosine", choices=SHAPES, help="shape after the warm-up")
    add("--min-lr-ratio", type=float, default=0.0, help="where the schedule ends, as a share of the base LR")
    add("--lr-backbone", type=float, default=5e-5, help="base LR of the transformer")
    add("--lr-head", type=float, default=1e-3, help="base LR of the classifier")
    add("--layer-decay", type=float, default=1.0, help="LR of each block as a share of the next one's")
    add("--weight-decay", type=float, default=1e-2, help="AdamW's, none on biases, norms, tokens, positions")
    add("--clip-grad", type=float, default=1.0, help="largest gradient norm (0: no clipping)")
    add("--loss", default="focal", choices=("focal", "ce", *SIGMOID_LOSSES), help="loss; bce and focal-bce take each class for itself, "
        "for clips that may have several labels (in a CSV as a;b)")
    add("--gamma", type=float, default=2.0, help="focal losses: focus")
    add("--alpha", default="none", help="focal loss: class weight: none, a number, or balanced by class frequency; focal-bce: "
        "none, or the weight of present classes, 0 to 1, absent ones having the rest")
    add("--logit-adjust", type=float, default=0.0, help="focal loss, cross-entropy: logits shifted by so many times the log "
        "of the class frequency in training")
    add("--ema", type=float, default=0.0, help="decay of an average of the weights, which is then evaluated and used (0: none)")
    add("--label-smoothing", type=float, default=0.0, help="cross-entropy: share of the target spread over all classes")
    add = parser.add_argument_group("augmentation, in training only").add_argument
    add("--freq-mask", type=int, default=0, help="SpecAugment: widest mel mask")
    add("--time-mask", type=int, default=0, help="SpecAugment: widest frame mask")
    add("--specaug-p", type=float, default=0.8, help="SpecAugment: probability per clip")
    add("--mixup-alpha", type=float, default=0.0, help="MixUp: Beta(alpha, alpha); 0 is off")
    add("--mixup-p", type=float, default=0.6, help="MixUp: probability per clip")
    add("--gain", type=float, default=0.0, help="up to so many dB louder or softer")
    add("--noise-p", type=float, default=0.0, help="quiet stretches of other training clips as noise: probability per clip")
    add("--noise-dir", help="take that noise from the recordings in this folder instead")
    add("--noise-snr", default="5,30", metavar="LOW,HIGH", help="dB of the clip over that noise")
    add("--filter-p", type=float, default=0.0, help="random high-pass or low-pass: probability per clip")
    add("--patchout", type=float, default=0.0, help="share of each clip's patches left out: faster, and changes training")
    add("--shift-p", type=float, default=0.0, help="circular shift in time: probability per clip")
    add = parser.add_argument_group("run").add_argument
    add("--run-dir", help="folder of this run (default: runs/<time>-<data>)")
    add("--resume", nargs="?", const="newest", help="continue the run in --run-dir (default: the newest); auto: or start "
        "one where there is no checkpoint; or continue from a FILE")
    add("--save-every", default="10m", help="write last.pt within an epoch too: 500 (steps) or 10m (minutes); 0: do not")
    add("--max-skips", type=int, default=10, help="stop after so many steps in a row whose loss or gradients are not "
        "finite")
    add("--on-divergence", default="stop", choices=("stop", "rollback", "warn"), help="when validation accuracy falls away "
        "from its best: stop, go back to the best weights with all LRs halved, or say so and go on")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="mixed precision")
    add("--compile", default="off", choices=("off", "default", "graphs"), help="torch.compile the model for micro-batches of "
        "--batch-size; graphs: with CUDA graphs")
    add("--plain", action="store_true", help="plain eager code for debugging: no cache, no compiled model, no fused "
        "optimiser, weights cast for each micro-batch, the GPU waited for at each step")
    add("--tensorboard", action="store_true", help="write TensorBoard events into the run folder")
    add("--smoke", action="store_true", help="check data, model and speed in under two minutes, then stop")

    given = parser.parse_args(argv, argparse.Namespace(**{a.dest: None for a in parser._actions if a.dest != "help"}))
    given = {name: value for name, value in vars(given).items() if value is not None}
    recipe = given.get("recipe") or ("demo" if given.get("data", "demo") == "demo" else "baseline")
    parser.set_defaults(recipe=recipe, **RECIPES[recipe])
    args = parser.parse_args(argv)
    check_flags(parser, args, given)
    return args, given


def batch_size(text):
    return text if text == "auto" else int(text)


def check_flags(parser, args, given):
    size = 1 if args.batch_size == "auto" else args.batch_size
    micro_batches = -(-(args.effective_batch or 32) // max(1, size))  # rounded up
    if "effective_batch" not in given:  # the default or a recipe's, made to fit the batch size
        args.effective_batch = micro_batches * size
    if size < 1:
        parser.error(f"--batch-size {size}: must be at least 1")
    at_least = [("effective_batch", 1), ("eval_batch_size", 1), ("epochs", 1), ("patience", 1), ("min_clips", 1),
                ("seconds", 0.1), ("warmup_epochs", 0), ("lr_backbone", 0), ("lr_head", 0), ("weight_decay", 0),
                ("clip_grad", 0), ("gamma", 0), ("freq_mask", 0), ("time_mask", 0), ("mixup_alpha", 0), ("workers", -1),
                ("max_skips", 1), ("gain", 0), ("freeze_epochs", 0), ("logit_adjust", 0)]
    for name, low in at_least:
        if not getattr(args, name) >= low:
            parser.error(f"{flag(name)} {getattr(args, name)}: must be at least {low}")
    for name in ("max_bad_share", "min_lr_ratio", "specaug_p", "mixup_p", "shift_p", "label_smoothing", "drop_path", "patchout",
                 "noise_p", "filter_p", "layer_decay", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"{flag(name)} {getattr(args, name)}: must lie in 0 to 1")
    if args.folds and (args.fold is not None or args.smoke or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("--folds: goes without --fold, --smoke and torchrun; leave them out")
    if args.plain:
        if args.compile != "off" or given.get("cache", "off") != "off":
            parser.error("--plain: goes without --compile and --cache; leave them out")
        args.cache = "off"
    if args.effective_batch % size:
        parser.error(f"--effective-batch {args.effective_batch}: not a multiple of --batch-size {size}; use "
                     f"{micro_batches * size}")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g}: longer than the run of --epochs {args.epochs}; lower it")
    if args.logit_adjust and args.loss in SIGMOID_LOSSES:
        parser.error("--logit-adjust: belongs to a softmax loss; use --loss focal or ce")
    if args.noise_dir and not args.noise_p:
        parser.error("--noise-dir: does nothing without --noise-p; give it, 0.5 for instance")
    if not re.fullmatch(r"-?\d+(\.\d+)?,-?\d+(\.\d+)?", args.noise_snr):
        parser.error(f"--noise-snr {args.noise_snr}: give two numbers, as 5,30")
    if args.alpha not in ("none", "balanced"):
        try:
            args.alpha = float(args.alpha)
        except ValueError:
            parser.error(f"--alpha {args.alpha}: none, a number, or balanced")
    if args.alpha != "none" and args.loss not in ("focal", "focal-bce"):
        parser.error(f"--alpha {args.alpha}: belongs to a focal loss; leave it out, or use --loss focal or focal-bce")
    if args.label_smoothing and args.loss != "ce":
        parser.error("--label-smoothing: belongs to cross-entropy; leave it out, or use --loss ce")
    if args.loss == "focal-bce" and args.alpha != "none" and (args.alpha == "balanced" or not 0 <= args.alpha <= 1):
        parser.error(f"--alpha {args.alpha}: with --loss focal-bce none, or a number in 0 to 1")
    try:
        SaveTimer(args.save_every)
        frontend = FrontendConfig.of(args.frontend, args.fmin, args.fmax)
        config = ast_config(args, n_classes=2)
    except ValueError as error:
        parser.error(str(error))
    frames = frontend.frames(round(args.seconds * frontend.sample_rate))
    if frames < config.patch:
        parser.error(f"--seconds {args.seconds:g}: gives {frames} frames of the {config.patch} that the model needs; use "
                     f"{config.patch * frontend.hop_length / frontend.sample_rate + 0.05:.1f} or more")


def flag(name):
    return "--" + name.replace("_", "-")


def ast_config(args, n_classes):
    changes = {name: value for name in ("dim", "depth", "heads") if (value := getattr(args, name)) is not None}
    return getattr(ASTConfig, args.size)(n_classes, drop_path=args.drop_path, **changes)


# --- one optimiser step ---

@dataclass
class Training:
    """What a step needs."""
    model: AST
    frontend: torch.nn.Module
    augment: Augment
    loss_fn: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: RelativeSchedule
    precision: Precision
    clip_grad: float
    pieces: Pieces = field(default_factory=Pieces)
    ranks: Ranks = field(default_factory=Ranks)
    patchout: float = 0.0
    compiled: Compiled | None = None
    ema: EMA | None = None

    def forward(self, spec, noise, kept):
        return (self.compiled or self.model)(spec, noise, kept)

    def zero_grad(self):
        self.optimizer.zero_grad(set_to_none=not (self.compiled and self.compiled.graphs))


@torch.no_grad()
def model_input(t, batch, epoch):
    """Waveforms -> augmented spectrograms (B, n_mels, frames) and soft labels (B, classes), on the device."""
    wave = batch.wave.to(t.precision.device, non_blocking=True)
    target = soft_target(batch.target.to(t.precision.device, non_blocking=True), t.model.config.n_classes)
    noise = None if batch.noise is None else batch.noise.to(t.precision.device, non_blocking=True)
    wave = t.augment.louder(wave, epoch, batch.clips)
    wave = t.augment.shift(wave, epoch, batch.clips)
    wave = t.augment.background(wave, noise, epoch, batch.clips)
    wave = t.augment.filtered(wave, epoch, batch.clips)
    wave, target = t.augment.mixup(wave, target, epoch, batch.clips)
    spec = t.frontend(wave)
    return t.augment.spec_augment(spec, t.frontend.silence(spec), epoch, batch.clips), target


def model_draws(t, batch, epoch, frames):
    """What the model draws at random for the clips of a batch: (noise (B, 2 * depth) for drop-path or None, kept (B, k)
    patches or None)."""
    config, noise, kept = t.model.config, None, None
    if config.drop_path > 0:
        noise = torch.from_numpy(uniform(t.augment.seed, epoch, batch.clips, DROP_PATH, 2 * config.depth)).float()
        noise = noise.to(t.precision.device, non_blocking=True)
    if t.patchout > 0:
        n = math.prod(config.patches(frames))
        order = uniform(t.augment.seed, epoch, batch.clips, PATCHOUT, n).argsort(axis=1)[:, :max(1, round(n * (1 - t.patchout)))]
        kept = torch.from_numpy(np.sort(order, axis=1)).to(t.precision.device, non_blocking=True)
    return noise, kept


def accumulate(t, window, epoch, clips):
    """Forward and backward over this rank's micro-batches of a window of `clips` clips: adds up the gradient of
    the mean loss over the window. Returns the sum of (loss, correct clips) and [(rows, loss per clip)]."""
    sums, losses = torch.zeros(2, device=t.precision.device), []
    with t.precision.window():
        for batch in window:
            spec, target = model_input(t, batch, epoch)
            draws = model_draws(t, batch, epoch, spec.shape[2])
            for piece in t.pieces(len(spec)):  # the whole micro-batch, unless memory ran out before
                with t.precision.autocast():
                    logits = t.forward(spec[piece], *(None if draw is None else draw[piece] for draw in draws))
                loss = t.loss_fn(logits, target[piece])  # per clip, float32
                t.precision.scaler.scale(loss.sum() / clips).backward()
                right = is_correct(logits, target[piece])
                sums = sums + torch.stack([loss.detach().sum(), right.sum()]).float()
                losses.append((batch.rows[piece], loss.detach()))
    return sums, losses


def train_step(t, window, epoch, clips=None):
    """One optimiser step over a window of micro-batches: the gradient of the mean loss over all its clips,
    whatever their number and grouping, and however many ranks share them. `clips`: how many there are over
    all ranks. Returns a tensor (loss sum, correct clips, gradient norm, whether it stepped, loss scale), which is
    the same on all ranks and need not have been computed yet on a GPU, and [(rows, loss per clip)] of this rank."""
    clips = clips or sum(len(batch.rows) for batch in window)
    scaler, done = t.precision.scaler, None
    scale = scaler.scale(torch.ones((), device=t.precision.device))
    while done is None:
        try:
            done = accumulate(t, window, epoch, clips)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        if done is None:  # out of memory: again from the start in smaller pieces, with the same random numbers
            t.zero_grad()
            t.pieces.halve(max(len(batch.rows) for batch in window))
    sums, losses = done
    t.ranks.sum_gradients(t.model.parameters())
    loss_sum, correct = t.ranks.sum(sums)
    scaler.unscale_(t.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), t.clip_grad)
    finite = torch.isfinite(grad_norm) & torch.isfinite(loss_sum)
    fused = t.optimizer.defaults.get("fused")
    if fused and not scaler.is_enabled():  # for fp16 the scaler does the same
        t.optimizer.found_inf = (~finite).float()  # the fused step leaves weights and moments alone where this is 1
    if fused or finite:
        scaler.step(t.optimizer)
    scaler.update()
    t.zero_grad()
    t.schedule.step(finite)
    if t.ema:
        t.ema.update(finite)
    return torch.stack([loss_sum, correct, grad_norm, finite, scale]), losses


# --- the run ---

def command_line(flags):
    """The words that give these flags."""
    return [flag(name) if value is True else f"{flag(name)}={value}" for name, value in flags.items()
            if value is not None and value is not False]


def stored_flags(args, given, state, run_dir):
    """The flags that a run was started with, which one on the command line may not contradict."""
    stored = vars(parse(command_line(state["flags"]), f"{state.path}: ")[0])  # what a file says is checked like what a person says
    for name, value in given.items():
        if name in FREE_ON_RESUME:
            stored[name] = value
        elif stored[name] != getattr(args, name) and value != "auto":
            raise RunError(f"{flag(name)} {value}: the run was started with {stored[name]}; leave the flag out, or start "
                           f"a new run with --weights {run_dir}/last.pt")
    return argparse.Namespace(**stored)


def cross_validate(args, given):
    """A run for each fold, each in a folder of its own below --run-dir; finished ones are not made again."""
    manifest = load_manifest(find_data(args.data, cache_folder(args.cache_dir)), args.audio_dir)
    if manifest.fold is None:
        raise DataError(f"--data {args.data}: has no folds; give a CSV with a column fold, or leave --folds out")
    folder = Path(args.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{Path(args.data).stem}-folds")
    folds = sorted(set(manifest.fold.tolist()))
    for fold in folds:
        here = folder / f"fold{fold}"
        if (here / "test" / "scores.npz").exists():
            print(f"fold {fold}: done before, {here}")
            continue
        print(f"\nfold {fold} of {', '.join(map(str, folds))}")
        own = {**given, "folds": None, "fold": fold, "run_dir": here, "resume": "auto"}
        code = main(command_line(own))
        if code:
            return code
    print("\n".join(pooled_results([folder / f"fold{fold}" / "test" for fold in folds], folder)))
    return 0


def main(argv=None):
    args, given = parse(argv)
    if args.folds:
        return cross_validate(args, given)
    stop = StopRequest()
    ranks = Ranks()
    device = pick_device(args.device, ranks.local_rank)
    ranks.start(device)
    run_dir, state, notes = ranks.once(lambda: open_run(args.run_dir, args.resume, Path(args.data).stem))
    print("\n".join(notes), end="\n" * bool(notes))
    if state is not None:
        args = stored_flags(args, given, state, run_dir)
        device = pick_device(args.device, ranks.local_rank)
    same_device = state is not None and state["device"] == device.type
    precision = ranks.once(lambda: choose_precision(device, state["amp"] if same_device else args.amp)).on(device, args.plain)
    print(f"device: {device}, {precision.name} ({precision.reason})" + f", {ranks.size} processes" * (ranks.size > 1))

    # data
    if state is None:
        manifest, bad_files = ranks.once(lambda: prepare(args.data, args.audio_dir, args.fold, args.min_clips,
                                                         args.max_bad_share, args.scan, args.seed, args.cache_dir,
                                                         several=args.loss in SIGMOID_LOSSES))
    else:
        with reading(state.path):
            manifest = Manifest.from_dict(state["manifest"])
            bad_files = [(path, reason) for path, reason in state["bad_files"]]
            if manifest.multi_label and args.loss not in SIGMOID_LOSSES:
                raise ValueError("its manifest has several labels a clip, which its loss cannot learn")
    rows = {split: manifest.rows(split) for split in ("train", "val", "test")}
    print("".join(f"  {line}\n" for line in credit(manifest.root)), end="")
    print(f"  {len(manifest.classes)} classes; " + ", ".join(f"{len(rows[split])} {split}" for split in rows))

    # model
    torch.manual_seed(args.seed)
    if state is None:
        model = AST(ast_config(args, len(manifest.classes)))
        frontend = build_frontend(FrontendConfig.of(args.frontend, args.fmin, args.fmax)).to(device)
    else:
        model, frontend = restore(state, device, averaged=False)
    samples = round(args.seconds * frontend.config.sample_rate)
    weights = f"none (random, seed {args.seed})" if state is None else state["weights"]
    if state is None and args.weights != "none":
        report = ranks.once(lambda: load_pretrained(model, args.weights, own_reader=load_checkpoint, frontend=frontend.config))
        model.set_grid(report.columns)  # where another process has loaded them
        weights = f"{report.source}, sha256 {report.sha256}"
        print("\n".join(report.lines()))
    model.to(device).checkpointing = args.checkpointing
    ranks.share(model)
    n_params = sum(p.numel() for p in model.parameters())
    frames = frontend.config.frames(samples)
    grid = model.config.patches(frames)
    print(f"model: AST, dim {model.config.dim}, depth {model.config.depth}, {n_params / 1e6:.1f}M parameters, weights "
          f"{args.weights}\n  input ({model.config.n_mels}, {frames}) from {args.seconds:g} s at "
          f"{frontend.config.sample_rate} Hz; {grid[0]} x {grid[1]} patches + 2 = {grid[0] * grid[1] + 2} tokens")

    # loss, optimiser, schedule
    counts = manifest.take(rows["train"]).counts()
    alpha = None if args.alpha == "none" else args.alpha
    if alpha == "balanced":
        alpha = balanced_alpha(counts).tolist()
    loss = {"name": args.loss, "gamma": args.gamma, "alpha": alpha, "label_smoothing": args.label_smoothing,
            "tau": args.logit_adjust, "frequency": counts.tolist()}
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr_backbone, args.lr_head, args.weight_decay,
                                                   args.layer_decay),
                                  fused=not args.plain, foreach=False)
    steps_per_epoch = -(-len(rows["train"]) // args.effective_batch)
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    lag = 1 if device.type == "cuda" and not args.plain else 0  # steps until the results of one are read: no wait for a GPU
    schedule = RelativeSchedule(optimizer, warmup_steps, total_steps, args.schedule, args.min_lr_ratio,
                                device if lag else None)
    augment = Augment(args.freq_mask, args.time_mask, args.specaug_p, args.mixup_alpha, args.mixup_p, args.shift_p, args.gain,
                      tuple(map(float, args.noise_snr.split(","))), args.filter_p, frontend.config.sample_rate, args.seed)
    t = Training(model, frontend, augment, build_loss(**loss).to(device), optimizer, schedule, precision,
                 args.clip_grad or float("inf"), ranks=ranks, patchout=args.patchout,
                 ema=EMA(model, args.ema) if args.ema else None)
    if args.batch_size == "auto":
        args.batch_size = find_batch_size(t, args.effective_batch, samples)
    if args.compile != "off":
        compile_model(t, args.batch_size, samples, args.compile == "graphs")
    micro_batches = args.effective_batch // args.batch_size
    print(f"step: {micro_batches} x {args.batch_size} = {args.effective_batch} clips, "
          f"{steps_per_epoch} step{'s' * (steps_per_epoch != 1)} an epoch, {warmup_steps} of {total_steps} steps warm-up, then "
          f"{args.schedule}")
    if steps_per_epoch < FEW_STEPS and micro_batches > 1:
        print(f"  few steps: with so few clips give --effective-batch {args.batch_size}, or --recipe best")
    if micro_batches < ranks.size:
        print(f"  {ranks.size} processes share {micro_batches} micro-batches a step, some wait: lower --batch-size or raise "
              "--effective-batch")
    curves = [(group["name"], [group["initial_lr"] * schedule.factor(step) for step in range(total_steps)])
              for group in optimizer.param_groups]
    for group, (name, lrs) in zip(optimizer.param_groups, curves, strict=True):
        print(f"  {name:<18} LR base {group['initial_lr']:.1e}, peak {max(lrs):.1e}, final {lrs[-1]:.1e}; weight decay "
              f"{group['weight_decay']:g}; {sum(p.numel() for p in group['params']):,} parameters")

    # batches
    clips = open_clips(args, manifest, frontend.config.sample_rate, samples, device, ranks)
    workers = args.workers if args.workers >= 0 else min(8, torch.get_num_threads()) if device.type == "cuda" else 0
    loading = {"workers": workers, "pin": device.type == "cuda"}
    loader = TrainLoader(clips, rows["train"], args.batch_size, args.effective_batch, args.seed, sampler=args.sampler, **loading)
    if args.sampler != "shuffle":
        counts = np.bincount(manifest.labels[rows["train"]], minlength=len(manifest.classes))  # of several labels the first
        often = quotas(counts, len(rows["train"]), SAMPLERS[args.sampler])
        print(f"sampler {args.sampler}: clips of a class in an epoch, " + ", ".join(
            f"{manifest.classes[c]} {counts[c]} -> {often[c]}" for c in np.argsort(-counts, kind="stable")[[0, len(counts) // 2, -1]])
            + f" (most frequent, middle, rarest of {len(counts)} classes)")
    if args.smoke:
        n_val = sum(len(clips.tiles(row)) for row in rows["val"])
        ok = smoke_test(model, t.loss_fn, precision, lambda batch: model_input(t, batch, 0), loader.windows(0),
                        lambda window: train_step(t, window, 0), len(rows["train"]), n_val, args.epochs, len(bad_files))
        return 0 if ok else 3

    # run folder
    progress = Progress()
    if state is not None:
        progress = continue_from(state, t)
        print(f"resumed after step {progress.step}, in epoch {progress.epoch + 1}")
    elif ranks.first:
        create_run(run_dir, again=args.resume is not None)
        write_bad_files(bad_files, run_dir / "bad_files.csv")
        write_split(manifest, run_dir / "split.csv")
        write_json(run_dir / "run.json", {
            "flags": vars(args), "classes": manifest.classes, "multi_label": manifest.multi_label,
            "clips": {split: len(rows[split]) for split in rows}, "data": {"root": str(manifest.root), "notes": manifest.notes},
            "unreadable": len(bad_files), "split_sha256": split_hash(manifest), "weights": weights, "parameters": n_params,
            "model": model.config.to_dict(), "frontend": frontend.config.to_dict(), "precision": precision.name,
            "steps_per_epoch": steps_per_epoch, "warmup_steps": warmup_steps, "processes": ranks.size,
            **describe_machine(device)})
        pictures.schedule(curves, warmup_steps, steps_per_epoch, run_dir / "schedule.png")
        draw_first_batch(t, loader, run_dir / "batch.png")
    log = RunLog(run_dir, progress, args.tensorboard) if ranks.first else None
    timer = SaveTimer(args.save_every)
    calibration = state and calibration_of(state)  # by the last validation
    pending = collections.deque()  # steps whose results are still to be read

    def event(what, detail):
        tqdm.write(f"step {progress.step}: {what}: {detail}", file=sys.stdout)
        if log:
            log.event(progress.step, epoch + 1, what, detail)

    def settle(left=0):
        """Read the results of all steps but the last `left`, count them and write them down."""
        while len(pending) > left:
            figures, losses, n, lrs = pending.popleft()
            loss_sum, correct, grad_norm, stepped, scale = figures.tolist()
            progress.count(loss_sum, int(correct), n, stepped == 1)
            progress.seconds = time.perf_counter() - started
            if log:
                log.step(step=progress.step, epoch=progress.epoch + 1, loss=loss_sum / n, grad_norm=grad_norm, clips=n,
                         scale=scale, **{name: float(lr) for name, lr in lrs.items()})
            if stepped != 1:
                names = [[manifest.paths[row] for seen, loss in losses for row, value in zip(seen, loss.tolist())
                          if only_bad <= (not math.isfinite(value))] for only_bad in (True, False)]
                found = [sum(part, []) for part in zip(*ranks.gather(names), strict=True)]
                event("skipped", f"loss or gradients are not finite; clips: {', '.join(found[0] or found[1])}")
            bar.set_postfix_str(f"loss {progress.loss:.3f}, acc {progress.accuracy:.1%}, LR {float(lrs['lr_backbone']):.1e} "
                                f"{float(lrs['lr_head']):.1e}, {progress.clips_per_second:.1f} clips/s", refresh=False)
            if progress.skips_in_row >= args.max_skips:
                raise NumbersError(f"{progress.skips_in_row} steps in a row whose loss or gradients are not finite "
                                   f"(--max-skips); {kept()}; look at the clips named above, lower the LRs, or try --amp off")

    def kept():
        return f"best.pt of epoch {progress.best_epoch} is kept" if progress.best_epoch else "no epoch was completed"

    def save():
        settle()
        if not ranks.first:
            return
        log.sync()  # the rows are on disk before a checkpoint says so
        timer.saved(save_checkpoint(run_dir / "last.pt", {
            "model": model.state_dict(), "config": model.config.to_dict(), "frontend": frontend.config.to_dict(),
            "clip": {"samples": samples, "short": args.short}, "classes": manifest.classes, "loss": loss,
            "manifest": manifest.to_dict(), "bad_files": bad_files, "flags": vars(args), "weights": weights,
            "device": device.type, "amp": precision.mode, "piece": t.pieces.limit, "progress": progress.to_dict(),
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "scaler": precision.scaler.state_dict(),
            "ema": t.ema and t.ema.state_dict(), "ema_updates": float(t.ema.updates) if t.ema else 0.0,
            "calibration": calibration}),
            run_dir / "last.pt")

    def interrupted():
        save()
        start = f"torchrun --nproc-per-node {ranks.size} " if ranks.size > 1 else "python "
        print(f"saved after step {progress.step}; continue with:\n  {start}train.py --resume --run-dir "
              f"{shlex.quote(str(run_dir))}", flush=True)
        return max(ranks.gather(stop.exit_code if stop() else 0))

    def leave_out(broken):
        """Name the clips of all ranks that turned out to be unreadable on the way, once each."""
        known = {path for path, _ in bad_files}
        pairs = [(manifest.paths[row], reason) for part in ranks.gather(broken) for row, reason in part]
        for path, reason in dict(pairs).items():
            if path not in known:
                bad_files.append((path, reason))
                event("unreadable", f"left out: {path}: {reason}")
        if ranks.first:
            write_bad_files(bad_files, run_dir / "bad_files.csv")
        if len(bad_files) > args.max_bad_share * (len(manifest) + len(known)):
            save()
            raise DataError(f"--data {args.data}: by now {len(bad_files)} files cannot be read, more than --max-bad-share "
                            f"{args.max_bad_share:g}; mend them and continue with --resume --run-dir {run_dir}")

    def score(split):
        """An Evaluation of every clip of a split, each by one of the ranks; None where a signal came."""
        mine = rows[split][ranks.rank::ranks.size]
        batches = evaluation_batches(clips, mine, args.eval_batch_size, **loading)
        parts = ranks.gather(evaluate(model, frontend, batches, manifest, mine, t.loss_fn, precision, stop, split))
        if any(part is None for part in parts):
            return None
        result = Evaluation.merge(parts)
        if result.broken:
            leave_out(list(result.broken.items()) if ranks.first else [])
        if len(result.rows) == 0:
            raise DataError(f"{manifest.root}: not one {split} clip can be read any more; mend them, then --resume")
        return result

    def roll_back():
        """The weights and moments of the best epoch, and from here on all LRs times one factor."""
        best = ranks.once(lambda: load_checkpoint(run_dir / "best.pt"))
        model.load_state_dict(best["model"])
        if t.ema:
            t.ema.load_state_dict(best["ema"], best["ema_updates"])
        optimizer.load_state_dict(best["optimizer"])
        precision.scaler.load_state_dict(best["scaler"])
        schedule.rescale(ROLLBACK_FACTOR)
        progress.accuracies = best["progress"]["accuracies"][-1:]
        event("rollback", f"to epoch {progress.best_epoch}, all LRs x {schedule.scale:g} from here on")

    # the loop
    troubles = set()  # with the cache, said once each
    stop.armed, epoch = True, progress.epoch - 1  # of the last epoch done, where there is none left to do
    for epoch in range(progress.epoch, args.epochs):
        if progress.stale >= args.patience:
            print(f"early stop: {args.patience} epochs without a better {args.monitor}")
            break
        model.train()
        t.loss_fn.train()
        freeze_backbone(model, epoch < args.freeze_epochs)
        started = time.perf_counter() - progress.seconds
        bar = tqdm(loader.windows(epoch, progress.window, ranks.rank, ranks.size), desc=f"epoch {epoch + 1}/{args.epochs}",
                   unit="step", total=steps_per_epoch, initial=progress.window, leave=False,
                   disable=not (ranks.first and sys.stderr.isatty()))
        for window in bar:
            broken = [pair for batch in window for pair in batch.broken]
            window = [batch for batch in window if len(batch.rows)]
            n, n_broken, stopping, due = ranks.total(sum(len(batch.rows) for batch in window), len(broken), int(stop()),
                                                     int(ranks.first and timer.due(progress.step)))
            for trouble in {batch.trouble for batch in window} - troubles - {None}:
                troubles.add(trouble)
                event("cache", trouble)
            if n_broken:
                leave_out(broken)
            if stopping:
                return interrupted()
            if due:
                save()
            if n == 0:  # not one of its clips can be read
                settle()
                progress.window += 1
                continue
            lrs = group_lrs(optimizer)
            pending.append((*train_step(t, window, epoch, n), n, lrs))
            settle(lag)
        settle()

        with t.ema.applied() if t.ema else contextlib.nullcontext():
            result = score("val")
        if result is None:
            return interrupted()
        calibration = calibrate(result.scores, result.labels)
        said = decisions(result.scores, calibration) if manifest.multi_label else None  # at thresholds fitted on these clips
        figures = point_metrics(result.scores, result.labels, said)
        row = {"epoch": epoch + 1, "train_loss": progress.loss, "train_acc": progress.accuracy,
               "val_loss": float(result.losses.mean()), "val_acc": figures["accuracy"], "val_macro_f1":
               figures["macro_f1"], "val_map": figures["map"], **{k: float(lr) for k, lr in group_lrs(optimizer).items()},
               "seconds": progress.seconds, "clips_per_second": progress.clips_per_second,
               "peak_memory_mb": peak_memory_mb(device), "skipped_steps": progress.skipped}
        better = progress.end_epoch(row[args.monitor], args.monitor == "val_loss", row["val_acc"])
        print(f"epoch {epoch + 1:>2}/{args.epochs}  train loss {row['train_loss']:.3f} acc {row['train_acc']:.1%}  "
              f"val loss {row['val_loss']:.3f} acc {row['val_acc']:.1%} F1 {row['val_macro_f1']:.3f} mAP "
              f"{row['val_map']:.3f}  {row['clips_per_second']:.1f} clips/s  best {args.monitor[4:]} {progress.best:.3f} "
              f"(epoch {progress.best_epoch})" + f"  {row['skipped_steps']} steps skipped" * (row["skipped_steps"] > 0)
              + " *" * better, flush=True)
        if log:
            log.epoch(progress.step, **row)
        trouble = diverged(progress.accuracies, len(result.rows))
        if trouble:
            event("diverged", trouble)
        if trouble and args.on_divergence == "rollback":
            if schedule.scale <= ROLLBACK_FACTOR**MOST_ROLLBACKS:
                raise NumbersError(f"diverged again after {MOST_ROLLBACKS} rollbacks; {kept()}; the data or the labels are "
                                   "the likelier cause")
            roll_back()
        save()
        if ranks.first:
            if better:
                link(run_dir / "last.pt", run_dir / "best.pt")
            pictures.curves(run_dir / "history.csv", run_dir / "curves.png", args.monitor)
        if trouble and args.on_divergence == "stop":
            raise NumbersError(f"diverged: {trouble}; {kept()}; lower --lr-backbone and --lr-head, or go on with --resume "
                               "--on-divergence rollback (or warn)")

    # the test
    print(f"test: best.pt, epoch {progress.best_epoch}")
    best = ranks.once(lambda: load_checkpoint(run_dir / "best.pt"))
    model.load_state_dict(weights_of(best))
    fitted = calibration_of(best)
    del best  # the moments of its optimiser, too
    result = score("test")
    if result is None:
        return interrupted()
    if ranks.first:
        print(write_heard(loader, progress.epoch, run_dir / "heard.csv"))
        metrics = write_results(run_dir / "test", result, manifest, manifest.classes, "test", fitted)
        stop.armed = False  # nothing is left to save: a signal ends the page at once
        print("\n".join(result_lines(metrics)))
        print(write_report(run_dir / "report.html", run_dir / "best.pt", fitted, progress.best_epoch, run_dir / "test", result, model,
                           frontend, clips, t.loss_fn, precision, args.eval_batch_size))
        log.finish(progress.step, vars(args), metrics)
    print(f"written: {run_dir}\nnext: python evaluate.py --ckpt {shlex.quote(str(run_dir / 'best.pt'))}")
    return 0


def open_clips(args, manifest, rate, samples, device, ranks):
    """The Clips of a run, with its cache and its background noise. Writes into args.cache what became of it."""
    clips = Clips(manifest, rate, samples, args.short, args.seed, crop=args.crop)
    cache = WaveCache(cache_folder(args.cache_dir) / "audio", rate)
    args.cache, why = ranks.once(lambda: choose_cache(args.cache, clips.bytes, clips.longest, device, cache.folder))
    print(f"cache: {args.cache} ({why})")
    if args.cache != "off":
        clips.cache = cache
    if args.noise_p and args.noise_dir:
        noise = ranks.once(lambda: noise_recordings(args.noise_dir, args.cache_dir))
        print(f"noise: quiet stretches of {len(noise)} recordings in {noise.root}")
        clips.add_noise(args.noise_p, np.arange(len(noise)), Clips(noise, rate, samples, args.short, cache=clips.cache))
    elif args.noise_p:
        clips.add_noise(args.noise_p, manifest.rows("train"))
    if args.cache in ("ram", "device") and not args.smoke:
        clips.reside(device if args.cache == "device" else torch.device("cpu"), show=ranks.first and sys.stderr.isatty())
    return clips


def continue_from(state, t):
    """Give the optimiser, the schedule, the scaler and the micro-batch limit of a checkpoint to `t` -> Progress."""
    with reading(state.path):
        own = t.optimizer.state_dict()["param_groups"]  # rates and decay come from the flags
        t.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        for p, moments in t.optimizer.state.items():
            if moments.keys() != {"step", "exp_avg", "exp_avg_sq"} or not all(
                    value.shape in (p.shape, ()) and torch.isfinite(value).all() for value in moments.values()):
                raise ValueError("moments that are not those of its weights")
        t.schedule.load_state_dict(state["schedule"])
        if t.ema:
            t.ema.load_state_dict(state["ema"], state["ema_updates"])
        if state["scaler"]:  # empty where the run went without one, on another device
            t.precision.scaler.load_state_dict(state["scaler"])
        t.pieces.limit = state["piece"]
        return Progress(**state["progress"])


def group_lrs(optimizer):
    """The LR of the backbone and of the head, as the optimiser's next step will use them."""
    lrs = {group["name"].removesuffix("_no_decay"): group["lr"] for group in optimizer.param_groups}
    return {"lr_backbone": lrs.get("backbone", 0.0), "lr_head": lrs.get("head", 0.0)}


def attempt(t, size, samples):
    """Forward and backward of a micro-batch of silence, to see whether it can be done."""
    try:
        accumulate(t, [Batch(torch.zeros(size, samples), torch.zeros(size, dtype=torch.long), np.arange(size), [])], 0, size)
    finally:
        t.zero_grad()


def compile_model(t, size, samples, graphs):
    """Compile the model for micro-batches of `size` clips, and say so, or why it stays as it is."""
    started = time.perf_counter()
    t.compiled = Compiled(t.model, size, graphs)
    t.model.train()
    try:
        for _ in range(3 if graphs else 1):  # graphs are recorded after a warm-up
            attempt(t, size, samples)
        print(f"compiled for micro-batches of {size} in {time.perf_counter() - started:.0f} s")
    except Exception as error:  # no compiler, no Triton, a model that it cannot do: in a hundred ways
        t.compiled = None
        t.zero_grad()
        print(f"not compiled, the run goes on without: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


def find_batch_size(t, effective_batch, samples):
    """The largest micro-batch, a divisor of the effective batch, whose forward and backward pass fits."""
    share = -(-effective_batch // t.ranks.size)
    sizes = [size for size in range(1, share + 1) if effective_batch % size == 0]
    moments = [torch.empty_like(p) for p in t.model.parameters() for _ in range(2)]  # AdamW's, which come later

    t.model.train()
    found = min(t.ranks.gather(largest_batch(sizes, lambda size: attempt(t, size, samples), t.precision.device)))
    del moments
    print(f"--batch-size auto: {found} clips fit at once")
    return found


def draw_first_batch(t, loader, out):
    """batch.png: the first training micro-batches as the model sees them, augmentation included."""
    pairs = [(batch, *model_input(t, batch, 0)) for batch in next(loader.windows(0))]
    manifest, c = loader.clips.manifest, t.frontend.config
    pictures.batch(np.concatenate([spec.cpu().numpy() for _, spec, _ in pairs]),
                   np.concatenate([manifest.labels[batch.rows] for batch, _, _ in pairs]),
                   np.concatenate([target.cpu().numpy() for _, _, target in pairs]), manifest.classes,
                   out, c.sample_rate, c.hop_length, t.frontend.mel_hz.numpy(), t.frontend.unit)


if __name__ == "__main__":
    escape_names()
    try:
        sys.exit(main())
    except INPUT_ERRORS as error:  # raised on all ranks alike: one of them says it
        sys.exit(fail(error) if Ranks().first else 2)
    except NUMBERS_ERRORS as error:
        sys.exit(fail(error, 3))
    except RanksError as error:
        sys.exit(fail(error, 1))
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        sys.exit(fail("out of memory outside of the training step; lower --eval-batch-size or --batch-size, then continue "
                      "with --resume", 3))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        sys.exit(fail(f"{error.filename or 'a file of the run'}: cannot be written ({error.strerror}); free some space or "
                      "permit writing, then continue with --resume"))
    except KeyboardInterrupt:
        sys.exit(130)
