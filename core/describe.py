"""What a run prints, draws and writes down before its first step."""
from pathlib import Path

import numpy as np
import torch

from core.learner import Learner
from core.run.folder import describe_machine
from data.bandwidth import describe_unheard
from data.clips import Clips, TrainLoader
from data.manifest import Manifest
from data.sampling import SAMPLERS, quotas
from data.splits import split_hash
from report import pictures
from util import printable

FEW_STEPS = 10  # an epoch with fewer gets a hint


def n_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def print_model(learner: Learner, clips: Clips, weights: str) -> None:
    """The model, its input and its number of tokens."""
    config, frontend = learner.model.config, learner.frontend.config
    frames = frontend.frames(clips.samples)
    rows, columns = config.patches(frames)
    print(f"model: AST, dim {config.dim}, depth {config.depth}, "
          f"{n_parameters(learner.model) / 1e6:.1f}M parameters, weights {weights}")
    print(f"  input ({config.n_mels}, {frames}) from {clips.samples / clips.rate:g} s at "
          f"{clips.rate} Hz; {rows} x {columns} patches + 2 = {rows * columns + 2} tokens")
    for line in describe_unheard(clips.manifest, frontend.fmax, frontend.kind):
        print(f"  {line}")


def print_steps(learner: Learner, loader: TrainLoader) -> None:
    """Clips per step, steps, and the learning rates of each parameter group."""
    schedule, size = learner.schedule, loader.batch_size
    n_micro_batches = loader.effective_batch // size
    n_steps, n_ranks = loader.steps_per_epoch, learner.distributed.size
    steps = "1 step" if n_steps == 1 else f"{n_steps} steps"
    print(f"step: {n_micro_batches} x {size} = {loader.effective_batch} clips, {steps} per epoch, "
          f"{schedule.warmup_steps} of {schedule.total_steps} steps warm-up, then {schedule.shape}")
    if n_steps < FEW_STEPS and n_micro_batches > 1:
        print(f"  few steps: with so few clips use --effective-batch {size}, or --recipe best")
    if n_micro_batches < n_ranks:
        print(f"  {n_ranks} processes share {n_micro_batches} micro-batches per step, so some "
              "wait: lower --batch-size or raise --effective-batch")
    for group, (name, lrs) in zip(learner.optimizer.param_groups, lr_curves(learner)):
        size = sum(parameter.numel() for parameter in group["params"])
        print(f"  {name:<18} LR base {group['initial_lr']:.1e}, peak {max(lrs):.1e}, final "
              f"{lrs[-1]:.1e}; weight decay {group['weight_decay']:g}; {size:,} parameters")


def print_sampler(loader: TrainLoader, sampler: str) -> None:
    """How often the classes come up in an epoch, if not as often as they have clips."""
    if sampler == "shuffle":
        return
    manifest = loader.clips.manifest
    labels = manifest.labels[loader.labelled]  # of several labels the first
    counts = np.bincount(labels, minlength=len(manifest.classes))
    per_epoch = quotas(counts, len(loader.labelled), SAMPLERS[sampler])
    by_frequency = np.argsort(-counts, kind="stable")
    examples = by_frequency[[0, len(counts) // 2, -1]]
    changes = ", ".join(f"{manifest.classes[c]} {counts[c]} -> {per_epoch[c]}" for c in examples)
    print(f"sampler {sampler}: clips of a class in an epoch, {changes} (most frequent, middle, "
          f"rarest of {len(counts)} classes)")


def print_examples(manifest: Manifest, seed: int, n: int = 5, most: int = 30) -> None:
    """Some clips of each class by name, so that a person sees whether the labels were read right.

    n: clips of a class. most: classes.
    """
    clips, classes = manifest.strata(np.arange(len(manifest)))
    names = [*manifest.classes, "(none of them)"]
    print(f"examples: {n} clips of each class, at random")
    for c in np.unique(classes)[:most].tolist():
        rows = np.random.default_rng(seed).permutation(clips[classes == c])[:n]
        print(f"  {names[c]}: {', '.join(_clip_name(manifest, row) for row in sorted(rows))}")


def _clip_name(manifest, row):
    start, end = manifest.start[row], manifest.end[row]
    name = printable(manifest.paths[row])
    if start == 0 and np.isnan(end):
        return name
    return f"{name} from {start:g} s" + ("" if np.isnan(end) else f" to {end:g} s")


def lr_curves(learner: Learner) -> list[tuple[str, list[float]]]:
    """(group, learning rate at each step) of every parameter group."""
    schedule = learner.schedule
    factors = [schedule.factor(step) for step in range(schedule.total_steps)]
    return [(group["name"], [group["initial_lr"] * factor for factor in factors])
            for group in learner.optimizer.param_groups]


def draw_start(learner: Learner, loader: TrainLoader, folder: Path) -> None:
    """schedule.png, and batch.png: the first micro-batches as the model sees them."""
    pictures.schedule(lr_curves(learner), learner.schedule.warmup_steps, loader.steps_per_epoch,
                      folder / "schedule.png")
    batches = next(loader.steps(0))
    inputs = [learner.model_input(batch, 0) for batch in batches]
    specs = np.concatenate([spec.cpu().numpy() for spec, _ in inputs])
    targets = np.concatenate([target.cpu().numpy() for _, target in inputs])
    manifest, config = loader.clips.manifest, learner.frontend.config
    labels = manifest.labels[np.concatenate([batch.rows for batch in batches])]
    pictures.batch(specs, labels, targets, manifest.classes, folder / "batch.png",
                   config.sample_rate, config.hop_length, learner.frontend.mel_hz.numpy(),
                   learner.frontend.unit)


def run_info(learner: Learner, loader: TrainLoader, weights: str, flags: dict, n_unreadable: int
             ) -> dict:
    """The content of run.json."""
    manifest = loader.clips.manifest
    return {
        "flags": flags,
        "classes": manifest.classes,
        "multi_label": manifest.multi_label,
        "clips": {split: len(manifest.rows(split)) for split in ("train", "val", "test")},
        "data": {"root": str(manifest.root), "notes": manifest.notes},
        "unreadable": n_unreadable,
        "split_sha256": split_hash(manifest),
        "weights": weights,
        "parameters": n_parameters(learner.model),
        "model": learner.model.config.to_dict(),
        "frontend": learner.frontend.config.to_dict(),
        "precision": learner.precision.name,
        "steps_per_epoch": loader.steps_per_epoch,
        "warmup_steps": learner.schedule.warmup_steps,
        "processes": learner.distributed.size,
        **describe_machine(learner.device),
    }
