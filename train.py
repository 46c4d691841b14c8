"""Fine-tune an Audio Spectrogram Transformer on labelled recordings.

    python train.py --warmup-epochs 0 --batch-size 4                      the built-in demo, offline, on a CPU
    python train.py --data FOLDER_OR_CSV --warmup-epochs 0 --batch-size 4  your own recordings

Reads from top to bottom: flags, then data, model, optimiser and the loop in `main`, around `train_step`.
"""
import argparse
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall on a shared CPU
import torch
from tqdm import tqdm

from core.checkpoint import CheckpointError, link, load_checkpoint, load_newest, save_checkpoint
from core.metrics import point_metrics
from core.precision import DeviceError, Precision, choose_precision, pick_device
from core.progress import Progress
from core.run import RunError, RunLog, check_new, create_run, describe_machine, lock_run, newest_run, write_json
from core.signals import StopRequest
from core.smoke import duration, overfit, peak_memory_mb
from data.augment import Augment
from data.clips import Clips, TrainLoader, evaluation_batches
from data.draws import DROP_PATH, uniform
from data.manifest import DataError, Manifest
from data.prepare import prepare
from data.scan import write_bad_files
from data.splits import split_hash, write_split
from evaluate import evaluate, restore, result_lines, write_results
from losses import balanced_alpha, build_loss, soft_target
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.groups import parameter_groups
from model.pretrained import WeightsError, load_pretrained
from report import pictures
from sched import SHAPES, RelativeSchedule

INPUT_ERRORS = (CheckpointError, DataError, DeviceError, RunError, WeightsError)

# A recipe is a set of flag values; a flag on the command line wins over it.
RECIPES = {
    "baseline": {},
    "augmented": dict(freq_mask=15, time_mask=35, specaug_p=0.8, mixup_alpha=0.4, mixup_p=0.6),
    "demo": dict(weights="none", dim=128, depth=4, heads=4, epochs=32, patience=32, effective_batch=4,
                 lr_backbone=8e-4, lr_head=8e-4, weight_decay=5e-2, freq_mask=15, time_mask=35, mixup_alpha=0.4,
                 mixup_p=0.3, shift_p=1.0),
}
# Flags that may differ when a run is resumed: they change where and how fast it runs, not what comes out.
FREE_ON_RESUME = {"resume", "run_dir", "workers", "device", "tensorboard", "eval_batch_size"}


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: sys.exit(fail(f"{message} (see --help)"))
    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", help="class folders, a CSV with path,label, an ESC-50 or UrbanSound8K folder, or demo")
    add("--audio-dir", help="folder that the paths of a CSV are relative to (default: the CSV's own)")
    add("--fold", type=int, help="test on this fold, validate on the next, train on the rest")
    add("--min-clips", type=int, default=1, help="leave out classes with fewer clips than this")
    add("--max-bad-share", type=float, default=0.05, help="refuse to start above this share of unreadable files")
    add("--scan", default="auto", choices=("auto", "full", "headers"), help="decode every file once before training, "
        "or read headers only (auto: full up to 5,000 files)")
    add("--seconds", type=float, default=4.0, help="length of a training crop and of an evaluation tile")
    add("--short", default="repeat", choices=("repeat", "pad"), help="what becomes of clips shorter than that")
    add("--workers", type=int, default=-1, help="processes that decode (-1: one per core, at most 8, with a GPU; 0 "
        "without)")
    add = parser.add_argument_group("model").add_argument
    add("--weights", default="audioset", help="audioset, imagenet, none, or a .pth, .safetensors or .pt file")
    add("--size", default="base", choices=("tiny", "small", "base"), help="AST size")
    add("--dim", type=int, help="any size: embedding dimension")
    add("--depth", type=int, help="any size: number of blocks")
    add("--heads", type=int, help="any size: attention heads")
    add("--drop-path", type=float, default=0.0, help="stochastic depth rate of the last block")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, about a third slower")
    add("--frontend", default="logmel", choices=("logmel", "fbank"), help="logmel: 22,050 Hz, standardised per clip; "
        "fbank: AudioSet's, 16 kHz")
    add("--fmin", type=float, help="lowest mel frequency in Hz (default: the front end's)")
    add("--fmax", type=float, help="highest mel frequency in Hz (default: the front end's)")
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=tuple(RECIPES), help="a set of flag values (default: demo for the demo, else baseline)")
    add("--epochs", type=int, default=50, help="most epochs")
    add("--patience", type=int, default=7, help="stop after so many epochs without a better one")
    add("--monitor", default="val_acc", choices=("val_acc", "val_macro_f1", "val_map", "val_loss"), help="what best is")
    add("--batch-size", type=int, default=4, help="clips on the device at once")
    add("--effective-batch", type=int, help="clips per optimiser step, by accumulation (default: 32, or the next "
        "multiple of the batch size)")
    add("--eval-batch-size", type=int, default=16, help="tiles at once in evaluation")
    add("--warmup-epochs", type=float, default=0.0, help="epochs in which every group's LR rises to its own base")
    add("--schedule", default="cosine", choices=SHAPES, help="shape after the warm-up")
    add("--min-lr-ratio", type=float, default=0.0, help="where the schedule ends, as a share of the base LR")
    add("--lr-backbone", type=float, default=5e-5, help="base LR of the transformer")
    add("--lr-head", type=float, default=1e-3, help="base LR of the classifier")
    add("--weight-decay", type=float, default=1e-2, help="AdamW's, none on biases, norms, tokens, positions")
    add("--clip-grad", type=float, default=1.0, help="largest gradient norm (0: no clipping)")
    add("--loss", default="focal", choices=("focal", "ce", "bce"), help="loss")
    add("--gamma", type=float, default=2.0, help="focal loss: focus")
    add("--alpha", default="none", help="focal loss: class weight: none, a number, or balanced by class frequency")
    add("--label-smoothing", type=float, default=0.0, help="cross-entropy: share of the target spread over all classes")
    add = parser.add_argument_group("augmentation, in training only").add_argument
    add("--freq-mask", type=int, default=0, help="SpecAugment: widest mel mask")
    add("--time-mask", type=int, default=0, help="SpecAugment: widest frame mask")
    add("--specaug-p", type=float, default=0.8, help="SpecAugment: probability per clip")
    add("--mixup-alpha", type=float, default=0.0, help="MixUp: Beta(alpha, alpha); 0 is off")
    add("--mixup-p", type=float, default=0.6, help="MixUp: probability per clip")
    add("--shift-p", type=float, default=0.0, help="circular shift in time: probability per clip")
    add = parser.add_argument_group("run").add_argument
    add("--run-dir", help="folder of this run (default: runs/<time>-<data>)")
    add("--resume", nargs="?", const="auto", help="continue: the run in --run-dir (default: the newest), or a FILE")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="mixed precision")
    add("--tensorboard", action="store_true", help="write TensorBoard events into the run folder")
    add("--smoke", action="store_true", help="check data, model and speed in under two minutes, then stop")

    given = parser.parse_args(argv, argparse.Namespace(**{a.dest: None for a in parser._actions if a.dest != "help"}))
    given = {name: value for name, value in vars(given).items() if value is not None}
    recipe = given.get("recipe") or ("demo" if given.get("data", "demo") == "demo" else "baseline")
    parser.set_defaults(recipe=recipe, **RECIPES[recipe])
    args = parser.parse_args(argv)
    check_flags(parser, args, given)
    return args, given


def check_flags(parser, args, given):
    micro_batches = -(-(args.effective_batch or 32) // max(1, args.batch_size))  # rounded up
    if "effective_batch" not in given:  # the default or a recipe's, made to fit the batch size
        args.effective_batch = micro_batches * args.batch_size
    at_least = [("batch_size", 1), ("effective_batch", 1), ("eval_batch_size", 1), ("epochs", 1), ("patience", 1), ("min_clips", 1),
                ("seconds", 0.1), ("warmup_epochs", 0), ("lr_backbone", 0), ("lr_head", 0), ("weight_decay", 0),
                ("clip_grad", 0), ("gamma", 0), ("freq_mask", 0), ("time_mask", 0), ("mixup_alpha", 0), ("workers", -1)]
    for name, low in at_least:
        if not getattr(args, name) >= low:
            parser.error(f"{flag(name)} {getattr(args, name)}: must be at least {low}")
    for name in ("max_bad_share", "min_lr_ratio", "specaug_p", "mixup_p", "shift_p", "label_smoothing", "drop_path"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"{flag(name)} {getattr(args, name)}: must lie in 0 to 1")
    if args.effective_batch % args.batch_size:
        parser.error(f"--effective-batch {args.effective_batch}: not a multiple of --batch-size {args.batch_size}; "
                     f"use {micro_batches * args.batch_size}")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g}: longer than the run of --epochs {args.epochs}; lower it")
    if args.alpha not in ("none", "balanced"):
        try:
            args.alpha = float(args.alpha)
        except ValueError:
            parser.error(f"--alpha {args.alpha}: none, a number, or balanced")
    try:
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


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    return 2


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


@torch.no_grad()
def model_input(t, batch, epoch):
    """Waveforms -> augmented spectrograms (B, n_mels, frames) and soft labels (B, classes), on the device."""
    wave = batch.wave.to(t.precision.device, non_blocking=True)
    target = soft_target(batch.target.to(t.precision.device, non_blocking=True), t.model.config.n_classes)
    wave = t.augment.shift(wave, epoch, batch.rows)
    wave, target = t.augment.mixup(wave, target, epoch, batch.rows)
    spec = t.frontend(wave)
    return t.augment.spec_augment(spec, t.frontend.silence(spec), epoch, batch.rows), target


def drop_path_noise(t, batch, epoch):
    config = t.model.config
    if config.drop_path == 0:
        return None
    noise = uniform(t.augment.seed, epoch, batch.rows, DROP_PATH, 2 * config.depth)
    return torch.as_tensor(noise, dtype=torch.float32).to(t.precision.device, non_blocking=True)


def train_step(t, window, epoch):
    """One optimiser step over a window of micro-batches: the gradient of the mean loss over all its clips,
    whatever their number and grouping. Returns tensors: loss sum, correct clips, gradient norm, stepped."""
    scaler = t.precision.scaler
    clips = sum(len(batch.rows) for batch in window)
    loss_sum = correct = 0.0
    for batch in window:
        spec, target = model_input(t, batch, epoch)
        with t.precision.autocast():
            logits = t.model(spec, drop_path_noise(t, batch, epoch))
        loss = t.loss_fn(logits, target).sum()  # per clip, float32
        scaler.scale(loss / clips).backward()
        loss_sum = loss_sum + loss.detach()
        correct = correct + (logits.argmax(dim=1) == target.argmax(dim=1)).sum()
    scaler.unscale_(t.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), t.clip_grad)
    finite = torch.isfinite(grad_norm) & torch.isfinite(loss_sum)
    fused = t.optimizer.defaults.get("fused")
    if fused and not scaler.is_enabled():  # for fp16 the scaler does the same
        t.optimizer.found_inf = (~finite).float()  # the fused step leaves weights and moments alone where this is 1
    if fused or finite:
        scaler.step(t.optimizer)
    scaler.update()
    t.optimizer.zero_grad(set_to_none=True)
    if finite:
        t.schedule.step()
    return loss_sum, correct, grad_norm, finite


# --- the run ---

def open_run(args, given):
    """The folder of a new run, not yet made, or the one to continue, locked -> (folder, its lock, checkpoint or
    None, flags in force)."""
    if args.resume is None:
        run_dir = Path(args.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{Path(args.data).stem}")
        check_new(run_dir)
        return run_dir, None, None, args
    if args.resume == "auto":
        last = newest_run("runs", "last.pt")
        run_dir = Path(args.run_dir) if args.run_dir else last and last.parent
        if run_dir is None or not run_dir.is_dir():
            raise RunError(f"--resume: no run {args.run_dir or 'under runs/'} to continue; start one without --resume")
        lock = lock_run(run_dir)
        state, notes = load_newest(run_dir)
        if state is None:
            raise RunError(f"--resume: {run_dir} has no checkpoint yet; remove it and start without --resume")
        print("\n".join(notes + [f"resuming {run_dir}"]))
    else:
        run_dir = Path(args.run_dir) if args.run_dir else Path(args.resume).parent
        state = load_checkpoint(args.resume)
        lock = lock_run(run_dir)
    stored = dict(state["flags"])
    for name, value in given.items():
        if name in FREE_ON_RESUME:
            stored[name] = value
        elif stored[name] != getattr(args, name):
            raise RunError(f"{flag(name)} {value}: the run was started with {stored[name]}; leave the flag out, or start "
                           f"a new run with --weights {run_dir}/last.pt")
    return run_dir, lock, state, argparse.Namespace(**stored)


def main(argv=None):
    args, given = parse(argv)
    stop = StopRequest()
    device = pick_device(args.device)
    run_dir, lock, state, args = open_run(args, given)  # the lock is held as long as it is referred to
    precision = choose_precision(device, args.amp)
    print(f"device: {device}, {precision.name} ({precision.reason})")

    # data
    if state is None:
        manifest, bad_files = prepare(args.data, args.audio_dir, args.fold, args.min_clips, args.max_bad_share, args.scan,
                                      args.seed)
    else:
        manifest, bad_files = Manifest.from_dict(state["manifest"]), [tuple(pair) for pair in state["bad_files"]]
    rows = {split: manifest.rows(split) for split in ("train", "val", "test")}
    print(f"  {len(manifest.classes)} classes; " + ", ".join(f"{len(rows[split])} {split}" for split in rows))

    # model
    torch.manual_seed(args.seed)
    frontend = build_frontend(FrontendConfig.of(args.frontend, args.fmin, args.fmax)).to(device)
    samples = round(args.seconds * frontend.config.sample_rate)
    model = AST(ast_config(args, len(manifest.classes)))
    weights = f"none (random, seed {args.seed})"
    if state is not None:
        weights = state["weights"]
        model.load_state_dict(state["model"])
    elif args.weights != "none":
        report = load_pretrained(model, args.weights)
        weights = f"{report.source}, sha256 {report.sha256}"
        print("\n".join(report.lines()))
    model.to(device).checkpointing = args.checkpointing
    n_params = sum(p.numel() for p in model.parameters())
    frames = frontend.config.frames(samples)
    grid = model.config.patches(frames)
    print(f"model: AST, dim {model.config.dim}, depth {model.config.depth}, {n_params / 1e6:.1f}M parameters, weights "
          f"{args.weights}\n  input ({model.config.n_mels}, {frames}) from {args.seconds:g} s at "
          f"{frontend.config.sample_rate} Hz; {grid[0]} x {grid[1]} patches + 2 = {grid[0] * grid[1] + 2} tokens")

    # loss, optimiser, schedule
    alpha = None if args.alpha == "none" else args.alpha
    if alpha == "balanced":
        alpha = balanced_alpha(manifest.take(rows["train"]).counts()).tolist()
    loss = {"name": args.loss, "gamma": args.gamma, "alpha": alpha, "label_smoothing": args.label_smoothing}
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr_backbone, args.lr_head, args.weight_decay), fused=True)
    clips = Clips(manifest, frontend.config.sample_rate, samples, args.short, args.seed)
    workers = args.workers if args.workers >= 0 else min(8, torch.get_num_threads()) if device.type == "cuda" else 0
    loading = {"workers": workers, "pin": device.type == "cuda"}
    loader = TrainLoader(clips, rows["train"], args.batch_size, args.effective_batch, args.seed, **loading)
    warmup_steps = round(args.warmup_epochs * loader.steps_per_epoch)
    total_steps = args.epochs * loader.steps_per_epoch
    schedule = RelativeSchedule(optimizer, warmup_steps, total_steps, args.schedule, args.min_lr_ratio)
    augment = Augment(args.freq_mask, args.time_mask, args.specaug_p, args.mixup_alpha, args.mixup_p, args.shift_p, args.seed)
    t = Training(model, frontend, augment, build_loss(**loss).to(device), optimizer, schedule, precision,
                 args.clip_grad or float("inf"))
    print(f"step: {args.effective_batch // args.batch_size} x {args.batch_size} = {args.effective_batch} clips, "
          f"{loader.steps_per_epoch} steps an epoch, {warmup_steps} of {total_steps} steps warm-up, then {args.schedule}")
    curves = [(group["name"], [group["initial_lr"] * schedule.factor(step) for step in range(total_steps)])
              for group in optimizer.param_groups]
    for group, (name, lrs) in zip(optimizer.param_groups, curves, strict=True):
        print(f"  {name:<18} LR base {group['initial_lr']:.1e}, peak {max(lrs):.1e}, final {lrs[-1]:.1e}; weight decay "
              f"{group['weight_decay']:g}; {sum(p.numel() for p in group['params']):,} parameters")

    if args.smoke:
        return smoke_test(t, loader, args, bad_files)

    # run folder
    progress = Progress()
    if state is None:
        run_dir, lock = create_run(run_dir)
        write_bad_files(bad_files, run_dir / "bad_files.csv")
        write_split(manifest, run_dir / "split.csv")
        write_json(run_dir / "run.json", {
            "flags": vars(args), "classes": manifest.classes, "clips": {split: len(rows[split]) for split in rows},
            "unreadable": len(bad_files), "split_sha256": split_hash(manifest), "weights": weights, "parameters": n_params,
            "model": model.config.to_dict(), "frontend": frontend.config.to_dict(), "precision": precision.name,
            "steps_per_epoch": loader.steps_per_epoch, "warmup_steps": warmup_steps, **describe_machine(device)})
        pictures.schedule(curves, warmup_steps, loader.steps_per_epoch, run_dir / "schedule.png")
        draw_first_batch(t, loader, run_dir / "batch.png")
    else:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        precision.scaler.load_state_dict(state["scaler"])
        progress = Progress(**state["progress"])
        print(f"resumed after step {progress.step}, in epoch {progress.epoch + 1}")
    log = RunLog(run_dir, progress, args.tensorboard)

    def save():
        log.sync()  # the rows are on disk before a checkpoint says so
        save_checkpoint(run_dir / "last.pt", {
            "model": model.state_dict(), "config": model.config.to_dict(), "frontend": frontend.config.to_dict(),
            "clip": {"samples": samples, "short": args.short}, "classes": manifest.classes, "loss": loss,
            "manifest": manifest.to_dict(), "bad_files": bad_files, "flags": vars(args), "weights": weights,
            "progress": progress.to_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "scaler": precision.scaler.state_dict()})

    def interrupted():
        save()
        print(f"saved after step {progress.step}; continue with:\n  python train.py --resume --run-dir "
              f"{shlex.quote(str(run_dir))}", flush=True)
        return stop.exit_code

    # the loop
    stop.armed = True
    for epoch in range(progress.epoch, args.epochs):
        if progress.stale >= args.patience:
            print(f"early stop: {args.patience} epochs without a better {args.monitor}")
            break
        model.train()
        started = time.perf_counter() - progress.seconds
        bar = tqdm(loader.windows(epoch, progress.window), desc=f"epoch {epoch + 1}/{args.epochs}", unit="step",
                   total=loader.steps_per_epoch, initial=progress.window, leave=False, disable=not sys.stderr.isatty())
        for window in bar:
            leave_out(window, manifest, bad_files, run_dir)
            lrs = group_lrs(optimizer)
            window = [batch for batch in window if len(batch.rows)]
            if not window:  # not one of its clips can be read
                progress.window += 1
                continue
            n = sum(len(batch.rows) for batch in window)
            loss_sum, correct, grad_norm, stepped = [value.item() for value in train_step(t, window, epoch)]
            progress.count(loss_sum, correct, n, stepped)
            progress.seconds = time.perf_counter() - started
            log.step(step=progress.step, epoch=epoch + 1, loss=loss_sum / n, grad_norm=grad_norm, clips=n,
                     scale=precision.scaler.get_scale(), **lrs)
            bar.set_postfix_str(f"loss {progress.loss:.3f}, acc {progress.accuracy:.1%}, LR {lrs['lr_backbone']:.1e} "
                                f"{lrs['lr_head']:.1e}, {progress.clips_per_second:.1f} clips/s", refresh=False)
            if stop():
                return interrupted()

        batches = evaluation_batches(clips, rows["val"], args.eval_batch_size, **loading)
        result = evaluate(model, frontend, batches, manifest, rows["val"], t.loss_fn, precision, stop, "validation")
        if result is None:
            return interrupted()
        figures = point_metrics(result.scores, result.labels)
        row = {"epoch": epoch + 1, "train_loss": progress.loss, "train_acc": progress.accuracy,
               "val_loss": float(result.losses.mean()), "val_acc": figures["accuracy"], "val_macro_f1":
               figures["macro_f1"], "val_map": figures["map"], **group_lrs(optimizer), "seconds": progress.seconds,
               "clips_per_second": progress.clips_per_second, "peak_memory_mb": peak_memory_mb(device),
               "skipped_steps": progress.skipped}
        better = progress.end_epoch(row[args.monitor], lower_is_better=args.monitor == "val_loss")
        log.epoch(progress.step, **row)
        save()
        if better:
            link(run_dir / "last.pt", run_dir / "best.pt")
        pictures.curves(run_dir / "history.csv", run_dir / "curves.png", args.monitor)
        print(f"epoch {epoch + 1:>2}/{args.epochs}  train loss {row['train_loss']:.3f} acc {row['train_acc']:.1%}  "
              f"val loss {row['val_loss']:.3f} acc {row['val_acc']:.1%} F1 {row['val_macro_f1']:.3f} mAP "
              f"{row['val_map']:.3f}  {row['clips_per_second']:.1f} clips/s  best {args.monitor[4:]} {progress.best:.3f} "
              f"(epoch {progress.best_epoch})" + " *" * better, flush=True)
        if stop():
            return interrupted()

    # the test
    print(f"test: best.pt, epoch {progress.best_epoch}")
    model, frontend = restore(load_checkpoint(run_dir / "best.pt"), device)
    batches = evaluation_batches(clips, rows["test"], args.eval_batch_size, **loading)
    result = evaluate(model, frontend, batches, manifest, rows["test"], t.loss_fn, precision, stop, "test")
    if result is None:
        return interrupted()
    print("\n".join(result_lines(write_results(run_dir / "test", result, manifest, manifest.classes, "test"))))
    print(f"written: {run_dir}\nnext: python evaluate.py --ckpt {shlex.quote(str(run_dir / 'best.pt'))}")
    return 0


def group_lrs(optimizer):
    """The LR of the backbone and of the head, as the optimiser's next step will use them."""
    lrs = {group["name"].removesuffix("_no_decay"): group["lr"] for group in optimizer.param_groups}
    return {"lr_backbone": lrs.get("backbone", 0.0), "lr_head": lrs.get("head", 0.0)}


def leave_out(window, manifest, bad_files, run_dir):
    """Name the clips that turned out to be unreadable on the way, once each; they are not in the batches."""
    known = {path for path, _ in bad_files}
    new = [(manifest.paths[row], reason) for batch in window for row, reason in batch.broken]
    new = [pair for pair in new if pair[0] not in known]
    for path, reason in new:
        tqdm.write(f"left out: {path}: {reason}")
    if new:
        bad_files += new
        write_bad_files(bad_files, run_dir / "bad_files.csv")


def draw_first_batch(t, loader, out):
    """batch.png: the first training micro-batches as the model sees them, augmentation included."""
    window = next(loader.windows(0))
    specs, titles = [], []
    for batch in window:
        spec, target = model_input(t, batch, 0)
        manifest = loader.clips.manifest
        for row, one, share in zip(batch.rows, spec.cpu().numpy(), target.cpu(), strict=True):
            own = manifest.classes[manifest.labels[row]]
            mixed = [f"{manifest.classes[i]} {share[i]:.0%}" for i in share.argsort(descending=True)[:2] if share[i] > 0]
            specs.append(one)
            titles.append(own if len(mixed) == 1 else "\n".join(mixed))
    c = t.frontend.config
    pictures.batch(specs, titles, out, c.sample_rate, c.hop_length, t.frontend.mel_hz.numpy(), t.frontend.unit)


def smoke_test(t, loader, args, bad_files):
    """Overfit one batch, train a short stretch, price the full run; exit code 0 if all is well, else 3."""
    windows = loader.windows(0)
    window = next(windows)
    spec, target = model_input(t, window[0], 0)
    t.model.train()
    first, last, correct, wrong = overfit(t.model, t.loss_fn, spec, target, t.precision.autocast)
    learnt = last < 0.5 * first
    print(f"smoke: one batch of {len(spec)}: loss {first:.3f} to {last:.4f}, {correct:.0%} correct; gradients "
          + (f"missing or not finite in {', '.join(wrong[:3])}" if wrong else "all finite"))
    times, clips, started = [], 0, time.perf_counter()
    while window and time.perf_counter() - started < 20 and len(times) < 20:
        before = time.perf_counter()
        values = [value.item() for value in train_step(t, window, 0)]
        times.append((time.perf_counter() - before) / sum(len(batch.rows) for batch in window))
        clips += sum(len(batch.rows) for batch in window)
        window = next(windows, None)
    speed = clips / (time.perf_counter() - started)  # with the loading of the data
    n_train, n_val = len(loader.rows), sum(len(loader.clips.tiles(row)) for row in loader.clips.manifest.rows("val"))
    epoch = n_train / speed + n_val / (3 * speed)  # forward alone is a third of a training step
    print(f"smoke: {speed:.1f} clips/s, peak memory {peak_memory_mb(t.precision.device):.0f} MiB; about "
          f"{duration(epoch)} an epoch, {duration(epoch * args.epochs)} for all {args.epochs}")
    verdict = learnt and not wrong and values[3]
    print(f"smoke: {'passed' if verdict else 'FAILED'}" + f", {len(bad_files)} unreadable files" * bool(bad_files))
    return 0 if verdict else 3


if __name__ == "__main__":
    try:
        sys.exit(main())
    except INPUT_ERRORS as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(130)
