"""Fine-tune an audio spectrogram transformer on labelled recordings.

    python train.py --warmup-epochs 0 --batch-size 4                  the built-in demo, on a CPU
    python train.py --data FOLDER_OR_CSV --warmup-epochs 0 --batch-size 4      your own recordings

Read it from top to bottom: the step, the epoch, the run. The flags are in flags.py; what a step
reads and changes is a `Learner` (core/learner.py); what is on disk is a `Run` (core/run/run.py).
"""
import contextlib
import math
import os
import shlex
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin
from util import require_working_directory

require_working_directory()
import torch

import flags
from build import (
    build_model,
    fingerprint_of,
    fit_to_device,
    load_data,
    loading,
    open_clips,
    reads_late,
    run_folds,
)
from core import describe
from core.device.distributed import Distributed
from core.device.memory import is_out_of_memory, peak_memory_mb
from core.device.precision import choose_precision, pick_device, use_deterministic
from core.divergence import TrainingError, find_divergence
from core.ema import EMA
from core.exits import OK, TRAINING_FAILED, run_script
from core.learner import Learner
from core.run import Run, StepResult, StopRequest
from core.run.checkpoint import load_checkpoint
from core.scoring import Evaluation, calibration_of, evaluate, weights_of
from core.scoring.report_page import write_report
from core.smoke import smoke_test
from data.augment import Augment
from data.clips import Batch, Clips, TrainLoader, evaluation_batches
from data.manifest import DataError
from data.sampling import epoch_size, write_coverage
from losses import SIGMOID_LOSSES, balanced_alpha, build_loss, has_label, is_correct
from metrics import HISTORY_COLUMNS, MONITORS, calibrate, point_metrics, predicted_classes
from model.groups import parameter_groups
from report import pictures
from report.results import result_lines, write_results
from sched import RelativeSchedule

ROLLBACK_FACTOR = 0.5  # learning rates are multiplied by this at a rollback
MAX_ROLLBACKS = 5


# --- one optimizer step ---

def train_step(learner: Learner, micro_batches: list[Batch], epoch: int,
               n_clips: int | None = None) -> StepResult:
    """One optimizer step: the gradient of the mean loss over all clips of the micro-batches.

    n_clips: how many there are over all ranks (default: there is one rank). The result is the same
    on all ranks, and need not have been computed yet on a GPU.
    """
    n_clips = n_clips or sum(len(batch.rows) for batch in micro_batches)
    scaler, lrs = learner.precision.scaler, learner.lrs()
    loss_scale = scaler.scale(torch.ones((), device=learner.device))  # update() may change it
    sums, losses = accumulate_or_split(learner, micro_batches, epoch, n_clips)
    learner.distributed.sum_gradients(learner.model.parameters())
    loss_sum, n_labelled, n_correct = learner.distributed.sum_tensor(sums)
    scaler.unscale_(learner.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), learner.clip_grad)
    is_finite = torch.isfinite(grad_norm) & torch.isfinite(loss_sum)  # a tensor: no wait for a GPU
    step_if_finite(learner, is_finite)
    scaler.update()
    learner.zero_grad()
    learner.schedule.step(is_finite)
    if learner.ema:
        learner.ema.update(is_finite)
    numbers = torch.stack([loss_sum, n_labelled, n_correct, grad_norm, is_finite, loss_scale])
    return StepResult(numbers, losses, n_clips, lrs)


def accumulate_or_split(learner, micro_batches, epoch, n_clips):
    """`accumulate`; if memory runs out, again in smaller parts with the same random numbers."""
    while True:
        try:
            return accumulate(learner, micro_batches, epoch, n_clips)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except block the error no longer holds the failed attempt's tensors.
        learner.zero_grad()
        learner.splitter.halve(max(len(batch.rows) for batch in micro_batches))


def accumulate(learner, micro_batches, epoch, n_clips):
    """Forward and backward: add up the gradient of the mean loss over the step's `n_clips` clips.

    Returns the sums of (loss, clips with a label, correct ones) and [(rows, loss of each clip)] of
    this rank.
    """
    sums, losses = torch.zeros(3, device=learner.device), []
    with learner.precision.cast_weights_once():
        for batch in micro_batches:
            spec, target = learner.model_input(batch, epoch)  # (B, n_mels, frames), (B, classes)
            draws = learner.model_draws(batch, epoch, spec.shape[2])
            for part in learner.splitter.slices(len(spec)):  # all of it, unless memory ran out
                drop_noise, patch_ids = (None if draw is None else draw[part] for draw in draws)
                with learner.precision.autocast():
                    logits = learner.forward(spec[part], drop_noise, patch_ids)
                loss = learner.loss_fn(logits, target[part])  # (B,) float32, one per clip
                learner.precision.scaler.scale(loss.sum() / n_clips).backward()
                n_labelled = has_label(target[part], logits.shape[1]).sum()
                n_correct = is_correct(logits, target[part]).sum()
                sums = sums + torch.stack([loss.detach().sum(), n_labelled, n_correct]).float()
                losses.append((batch.rows[part], loss.detach()))
    return sums, losses


def step_if_finite(learner, is_finite):
    """The optimizer's step, or nothing if loss or gradients are not finite."""
    optimizer, scaler = learner.optimizer, learner.precision.scaler
    if not optimizer.defaults.get("fused"):
        if is_finite:  # waits for the GPU
            scaler.step(optimizer)
        return
    if not scaler.is_enabled():
        # The fused AdamW leaves weights and moments alone if found_inf is 1, so the GPU decides
        # by itself. GradScaler sets this attribute in the same way, but only for fp16.
        optimizer.found_inf = (~is_finite).float()
    scaler.step(optimizer)


# --- one epoch ---

def train_epoch(args, run: Run, learner: Learner, loader: TrainLoader, epoch: int) -> None:
    """Train the rest of an epoch. Raises Interrupted after a signal, when the run is saved."""
    learner.model.train()
    learner.loss_fn.train()
    learner.freeze_backbone(epoch < args.freeze_epochs)
    ranks = learner.distributed
    steps = loader.steps(epoch, run.progress.step_in_epoch, ranks.rank, ranks.size)
    for micro_batches in run.progress_bar(steps, epoch, args.epochs, loader.steps_per_epoch):
        broken = [pair for batch in micro_batches for pair in batch.broken]
        run.report_cache_problems(batch.cache_problem for batch in micro_batches)
        micro_batches = [batch for batch in micro_batches if len(batch.rows)]
        n_clips = sum(len(batch.rows) for batch in micro_batches)
        # Summed over the ranks, so that all of them decide alike.
        n_clips, n_broken, stop, save = ranks.all_reduce_sum(
            n_clips, len(broken), int(run.stop.requested), int(run.is_save_due()))
        if n_broken:
            run.report_unreadable(broken, learner)
        if stop:
            run.interrupt(learner)
        if save:
            run.save(learner)
        if n_clips == 0:
            run.pass_over_step()
            continue
        run.add_step(train_step(learner, micro_batches, epoch, n_clips))
    run.read_pending_steps()


def evaluate_split(args, run: Run, learner: Learner, clips: Clips, split: str) -> Evaluation:
    """Score every clip of a split, each on one of the ranks. Raises Interrupted after a signal."""
    manifest, ranks = clips.manifest, learner.distributed
    rows = manifest.rows(split)[ranks.rank::ranks.size]
    batches = evaluation_batches(clips, rows, args.eval_batch_size, **loading(args, learner.device))
    # Validation uses averaged weights, if there are any. The model has its own weights again
    # before anything below can save it. In the test it has those of best.pt: nothing to save.
    is_test = split == "test"
    with contextlib.nullcontext() if is_test else learner.averaged_weights():
        part = evaluate(learner, batches, manifest, rows, lambda: run.stop.requested, split)
    parts = ranks.all_gather(part)
    to_save = None if is_test else learner
    if any(part is None for part in parts):
        run.interrupt(to_save)
    result = Evaluation.merge(parts)
    if result.broken:
        run.report_unreadable(list(result.broken.items()) if ranks.is_first else [], to_save)
    if len(result.rows) == 0:
        raise DataError(f"{manifest.root}: none of the {split} clips can be read any more; "
                        "repair them, then continue with --resume")
    return result


def validate(args, run: Run, learner: Learner, clips: Clips) -> tuple[dict, int]:
    """Evaluate and calibrate on the validation clips -> (row of history.csv, number of clips)."""
    result = evaluate_split(args, run, learner, clips, "val")
    labels = clips.manifest.targets(result.rows) if learner.sigmoid else result.labels
    run.calibration = calibrate(result.scores, labels, clips.manifest.group[result.rows])
    predicted = None
    if clips.manifest.multi_label:  # at thresholds that were fitted on these very clips
        predicted = predicted_classes(result.scores, run.calibration)
    metrics = point_metrics(result.scores, result.labels, predicted)
    progress = run.progress
    return {
        "epoch": progress.epoch + 1,
        "train_loss": progress.loss,
        "train_acc": progress.accuracy,
        "val_loss": float(result.losses.mean()),
        **{column: metrics[metric.name] for column, metric in HISTORY_COLUMNS.items()},
        **{name: float(lr) for name, lr in learner.lrs().items()},
        "seconds": progress.seconds,
        "clips_per_second": progress.clips_per_second,
        "peak_memory_mb": peak_memory_mb(learner.device),
        "skipped_steps": progress.skipped,
    }, len(result.rows)


def end_epoch(args, run: Run, learner: Learner, row: dict, n_clips: int) -> None:
    """Decide whether the epoch is the best, log it, save it, and act on divergence."""
    is_best = run.progress.end_epoch(row[args.monitor], MONITORS[args.monitor].higher_is_better,
                                     row["val_acc"])
    print(epoch_line(args, run, row, is_best), flush=True)
    if run.log:
        run.log.epoch(run.progress.step, **row)
    divergence = find_divergence(run.progress.accuracies, n_clips)
    if divergence:
        run.event("diverged", divergence)
    if is_best:  # saved before a rollback changes the weights
        run.save(learner)
        run.link_best()
    rolls_back = divergence is not None and args.on_divergence == "rollback"
    if rolls_back:
        roll_back(run, learner)
    if rolls_back or not is_best:
        run.save(learner)
    if learner.distributed.is_first:
        pictures.curves(run.folder / "history.csv", run.folder / "curves.png", args.monitor)
    if divergence and args.on_divergence == "stop":
        raise TrainingError(
            f"diverged: {divergence}; {run.best_note()}; lower --lr-backbone and --lr-head, or "
            "continue with --resume --on-divergence rollback (or warn)")


def epoch_line(args, run, row, is_best):
    metrics = "  ".join(f"{metric.label} {row[column]:.3f}"
                        for column, metric in HISTORY_COLUMNS.items())
    skipped = f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
    return (f"epoch {row['epoch']:>2}/{args.epochs}  train loss {row['train_loss']:.3f} acc "
            f"{row['train_acc']:.3f}  val loss {row['val_loss']:.3f} {metrics}  "
            f"{row['clips_per_second']:.1f} clips/s  best {args.monitor} {run.progress.best:.3f} "
            f"(epoch {run.progress.best_epoch}){skipped}{' *' if is_best else ''}")


def roll_back(run, learner):
    """Go back to the best epoch's weights and moments, with lower learning rates from here on."""
    if learner.schedule.scale <= ROLLBACK_FACTOR**MAX_ROLLBACKS:  # each rollback multiplies it
        raise TrainingError(f"diverged again after {MAX_ROLLBACKS} rollbacks; {run.best_note()}; "
                            "the data or the labels are the likelier cause")
    best = learner.distributed.on_first_rank(lambda: load_checkpoint(run.folder / "best.pt"))
    learner.load_best(best)
    learner.schedule.rescale(ROLLBACK_FACTOR)
    # find_divergence compares with the best epoch from here on.
    run.progress.accuracies = best["progress"]["accuracies"][-1:]
    run.event("rollback", f"to epoch {run.progress.best_epoch}, all learning rates x "
                          f"{learner.schedule.scale:g} from here on")


# --- the run ---

def main(argv: list[str] | None = None, resume_command: str | None = None) -> int:
    """Train, validate and test one run -> exit code. Errors are raised; see core/exits.py.

    resume_command: what to print when the run is interrupted, if it is part of something larger.
    """
    args, given = flags.parse(argv)
    if args.folds and args.fold is None:
        return run_folds(args, given, main)
    distributed = Distributed()
    stop = StopRequest(has_launcher=distributed.size > 1)
    device = pick_device(args.device, distributed.local_rank)
    distributed.start(device)
    run, checkpoint = Run.open(args.run_dir, args.resume, Path(args.data).stem, distributed, stop)
    run.command = resume_command
    if checkpoint is not None:
        args = flags.resumed(args, given, checkpoint)
        device = pick_device(args.device, distributed.local_rank)
    if args.deterministic:
        use_deterministic()
    manifest, bad_files = load_data(args, checkpoint, distributed)
    learner, loss, weights = build_learner(args, manifest, checkpoint, device, distributed)
    clips = open_clips(args, manifest, learner)  # first, because a cache in memory takes some
    args.batch_size = fit_to_device(args, learner, accumulate)  # tries passes of rising size
    loader = TrainLoader(clips, manifest.rows("train"), args.batch_size, args.effective_batch,
                         args.seed, sampler=args.sampler, negative_share=args.negative_share,
                         **loading(args, device))
    describe.print_model(learner, clips, args.weights)
    describe.print_steps(learner, loader)
    describe.print_sampler(loader, args.sampler)
    if args.smoke:
        describe.print_examples(manifest, args.seed)
        n_val_tiles = sum(len(clips.tiles(row)) for row in manifest.rows("val"))
        passed = smoke_test(learner, loader.steps(0), lambda step: train_step(learner, step, 0),
                            loader.clips_per_epoch, n_val_tiles, args.epochs, len(bad_files))
        return OK if passed else TRAINING_FAILED
    info = describe.run_info(learner, loader, weights, vars(args), len(bad_files))
    info["augmentations"] = flags.active_augmentations(vars(args))
    if checkpoint is None:
        # --resume auto may find the folder of a run that died before its first checkpoint.
        run.create(manifest, bad_files, info, may_exist=args.resume is not None)
        if distributed.is_first:
            describe.draw_start(learner, loader, run.folder)
    else:
        learner.load_state_dict(checkpoint)
        run.load_state(checkpoint, calibration_of(checkpoint))
        run.update_info(info)
    constant = constant_parts(learner, clips, checkpoint, loss, weights, vars(args))
    run.begin(manifest, bad_files, constant, save_every=args.save_every, max_skips=args.max_skips,
              max_bad_share=args.max_bad_share, read_late=reads_late(args, device),
              tensorboard=args.tensorboard)
    checkpoint = None  # free its memory
    with run.guarded(learner):
        for epoch in range(run.progress.epoch, args.epochs):
            if run.progress.epochs_without_improvement >= args.patience:
                print(f"early stop: {args.patience} epochs without a better {args.monitor}")
                break
            train_epoch(args, run, learner, loader, epoch)
            end_epoch(args, run, learner, *validate(args, run, learner, clips))
    with run.guarded():
        test_best(args, run, learner, loader)
    return OK


def constant_parts(learner, clips, checkpoint, loss, weights, flag_values) -> dict:
    """The parts of the checkpoint that stay the same during a run."""
    return {
        "config": learner.model.config.to_dict(), "frontend": learner.frontend.config.to_dict(),
        "clip": {"samples": clips.samples, "short": clips.short},
        "classes": clips.manifest.classes,
        "fingerprint": fingerprint_of(clips.manifest, checkpoint),
        "loss": loss, "weights": weights, "flags": flag_values}


def build_learner(args, manifest, checkpoint, device, distributed) -> tuple[Learner, dict, str]:
    """The learner, the settings of its loss, and where its weights come from."""
    # A resumed run keeps its precision, which --amp auto measures, unless the device is another.
    same_device = checkpoint is not None and checkpoint["device"] == device.type
    amp = checkpoint["amp"] if same_device else args.amp
    precision = distributed.on_first_rank(lambda: choose_precision(device, amp))
    precision = precision.on(device, args.plain)
    ranks = f", {distributed.size} processes" if distributed.size > 1 else ""
    print(f"device: {device}, {precision.name} ({precision.reason}){ranks}")

    model, frontend, weights = build_model(args, manifest, checkpoint, device, distributed)
    train_rows = manifest.rows("train")
    counts = manifest.select(train_rows).counts()
    n_clips = epoch_size(manifest, train_rows, args.negative_share)
    alpha = None if args.alpha == "none" else args.alpha
    if alpha == "balanced":
        alpha = balanced_alpha(counts).tolist()
    loss = {"name": args.loss, "gamma": args.gamma, "alpha": alpha, "tau": args.logit_adjust,
            "label_smoothing": args.label_smoothing, "frequency": counts.tolist()}
    groups = parameter_groups(model, args.lr_backbone, args.lr_head, args.weight_decay,
                              args.layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=not args.plain, foreach=False)
    steps_per_epoch = math.ceil(n_clips / args.effective_batch)
    schedule = RelativeSchedule(
        optimizer, round(args.warmup_epochs * steps_per_epoch), args.epochs * steps_per_epoch,
        args.schedule, args.min_lr_ratio, device if reads_late(args, device) else None)
    augment = Augment.from_flags(vars(args), frontend.config.sample_rate)
    learner = Learner(model, frontend, augment, build_loss(**loss).to(device), optimizer, schedule,
                      precision, args.clip_grad or math.inf, args.patchout,
                      EMA(model, args.ema) if args.ema else None, distributed,
                      sigmoid=args.loss in SIGMOID_LOSSES and manifest.needs_matrix)
    return learner, loss, weights


def test_best(args, run: Run, learner: Learner, loader: TrainLoader) -> None:
    """Evaluate best.pt on the test clips and write results and report."""
    path, folder, clips = run.folder / "best.pt", run.folder / "test", loader.clips
    again = f"python evaluate.py --ckpt {shlex.quote(str(path))}"
    print(f"test: {path.name}, epoch {run.progress.best_epoch}")
    best = learner.distributed.on_first_rank(lambda: load_checkpoint(path))
    learner.model.load_state_dict(weights_of(best))
    calibration = calibration_of(best)
    del best  # it also holds the optimizer's moments
    result = evaluate_split(args, run, learner, clips, "test")
    if learner.distributed.is_first:
        print(write_coverage(loader, run.progress.epoch, run.folder / "coverage.csv"))
        metrics = write_results(folder, result, clips.manifest, clips.manifest.classes, "test",
                                calibration)
        run.stop.armed = False  # nothing is left to save: a signal ends the process at once
        print("\n".join(result_lines(metrics)))
        print(write_report(run.folder / "report.html", path, calibration, run.progress.best_epoch,
                           folder, "test", result, learner, clips, args.eval_batch_size, again))
        run.log.finish(run.progress.step, vars(args), metrics)
    print(f"written: {run.folder}\nnext: {again}")


if __name__ == "__main__":
    run_script(main)
