"""The models that the benchmarks compare: this project's, the hub's (transformers) and timm's."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import synchronize
from transformers import ASTConfig as HubConfig
from transformers import ASTForAudioClassification

import train
from core.device.compiled import compile_for
from core.device.precision import Precision, choose_precision
from core.learner import Learner
from data.augment import Augment
from data.clips import Batch
from losses import CrossEntropy
from model.ast import AST, ASTConfig
from model.groups import parameter_groups
from sched import RelativeSchedule

N_CLASSES, N_MELS, PATCH, STRIDE = 50, 128, 16, 10
SIZES = {"base": (768, 12, 12), "small": (384, 12, 6), "tiny": (192, 12, 3)}  # dim, depth, heads
EARLIER_FRAMES = 1024  # an earlier system padded every clip to this


def call_model(model, spec):
    return model(spec)


@dataclass
class Side:
    """A model and its optimizer step, with one micro-batch to time forward and backward passes."""

    step: Callable[[], None]
    model: Callable
    spec: torch.Tensor  # (B, n_mels, frames), or the shape that the model takes
    target: torch.Tensor  # (B,)
    precision: Precision
    logits_of: Callable = call_model
    zero_grad: Callable | None = None  # default: drop the model's gradients

    def forward(self) -> torch.Tensor:
        with self.precision.autocast():
            return self.logits_of(self.model, self.spec)

    def forward_backward(self) -> None:
        F.cross_entropy(self.forward().float(), self.target).backward()
        if self.zero_grad:
            self.zero_grad()
        else:
            self.model.zero_grad(set_to_none=True)


class NoFrontend(torch.nn.Module):
    """Returns its input, so that a step starts from spectrograms."""

    def forward(self, spec):
        return spec

    def silence(self, spec):
        return spec


# A function from here on takes specs: [(B, n_mels, frames)], target: (B,), size, precision.

def ours(specs, target, size, precision, compiled=None, patchout=0.0) -> Side:
    """This project's own train_step."""
    device = precision.device
    model = our_model(size, device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 5e-5, 1e-3, 0.01), fused=True)
    schedule = RelativeSchedule(optimizer, 0, 10**4,
                                device=device if device.type == "cuda" else None)
    learner = Learner(model, NoFrontend(), Augment(), CrossEntropy(), optimizer, schedule,
                      precision, clip_grad=1.0, patchout=patchout)
    micro_batches = [Batch(spec, target, np.arange(len(spec)), []) for spec in specs]

    def attempt(size):
        train.accumulate(learner, micro_batches[:1], 0, size)
        learner.zero_grad()

    if compiled:
        compile_for(learner, len(specs[0]), compiled == "graphs", attempt)
    return Side(lambda: train.train_step(learner, micro_batches, 0), learner.compiled or model,
                specs[0], target, precision, zero_grad=learner.zero_grad)


def ours_at_once(specs, target, size, precision) -> Side:
    """This project's train_step with all clips in one micro-batch."""
    return ours([torch.cat(specs)], target.repeat(len(specs)), size, precision)


def our_model(size, device) -> AST:
    dim, depth, heads = SIZES[size]
    return AST(ASTConfig(N_CLASSES, dim=dim, depth=depth, heads=heads)).to(device)


def hub(specs, target, size, precision) -> Side:
    """The hub's model, with the same accumulation, precision and fused AdamW."""
    model = hub_model(size, specs[0].shape[2], precision.device)
    specs = [spec.transpose(1, 2).contiguous() for spec in specs]  # (B, frames, n_mels)
    return accumulated(model, specs, target, precision,
                       lambda model, spec: model(input_values=spec).logits)


def hub_with_trainer_steps(specs, target, size, precision) -> Side:
    """The hub's model, driven as its Trainer does.

    The model computes the loss, which is read after every micro-batch; a scheduler makes a step.
    """
    model = hub_model(size, specs[0].shape[2], precision.device)
    specs = [spec.transpose(1, 2).contiguous() for spec in specs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def step():
        total = 0.0
        for spec in specs:
            with precision.autocast():
                loss = model(input_values=spec, labels=target).loss / len(specs)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return total

    return Side(step, model, specs[0], target, precision,
                lambda model, spec: model(input_values=spec, labels=target).logits)


def hub_model(size, frames, device) -> torch.nn.Module:
    dim, depth, heads = SIZES[size]
    config = HubConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * dim, max_length=frames, num_mel_bins=N_MELS, num_labels=N_CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa")
    return ASTForAudioClassification(config).to(device).train()


def earlier_system(specs, target, size, precision) -> Side:
    """The hub's model as the earlier system used it: padded clips, float32 without CUDA."""
    padded = [F.pad(spec, (0, EARLIER_FRAMES - spec.shape[2])) for spec in specs]
    if precision.device.type != "cuda":
        precision = choose_precision(precision.device, "off")
    return hub(padded, target, size, precision)


def plain_vit(specs, target, size, precision) -> Side:
    """A timm ViT with as many tokens, from patches that do not overlap."""
    rows, columns = patches(specs[0].shape[2])
    image_size = (PATCH * rows, PATCH * columns)
    model = timm.create_model(f"vit_{size}_patch16_224", img_size=image_size, in_chans=1,
                              num_classes=N_CLASSES)
    device = precision.device
    images = [torch.randn(len(spec), 1, *image_size, device=device) for spec in specs]
    return accumulated(model.to(device).train(), images, target, precision, call_model)


def accumulated(model, specs, target, precision, logits_of) -> Side:
    """The ordinary accumulation loop around any model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)

    def step():
        for spec in specs:
            with precision.autocast():
                logits = logits_of(model, spec)
            (F.cross_entropy(logits.float(), target) / len(specs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Side(step, model, specs[0], target, precision, logits_of)


# --- costs ---

def patches(frames: int) -> tuple[int, int]:
    """Rows and columns of patches of a spectrogram with this many frames."""
    return (N_MELS - PATCH) // STRIDE + 1, (frames - PATCH) // STRIDE + 1


def n_tokens(frames: int) -> int:
    rows, columns = patches(frames)
    return rows * columns + 2


def operations(size: str, tokens: int) -> int:
    """Operations of a clip's forward and backward pass: three times the forward products."""
    dim, depth, _ = SIZES[size]
    block = 12 * dim * dim * tokens + 2 * dim * tokens * tokens
    patch_embedding = PATCH * PATCH * dim * tokens
    return 3 * 2 * (depth * block + patch_embedding)


def costliest_operations(side: Side, device: torch.device, most: int = 5) -> list[str]:
    """Lines about the operations in which a step of one side spends the most time."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    side.step()
    with torch.profiler.profile(activities=activities) as profile:
        side.step()
        synchronize(device)
    # Only operations on the host's side, which have the time of the kernels that they started: the
    # kernels are listed too, and would count twice.
    operations = [event for event in profile.key_averages()
                  if event.device_type == torch.autograd.DeviceType.CPU]
    spent = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
             for event in operations}
    total = sum(spent.values())
    costliest = sorted(spent.items(), key=lambda item: -item[1])[:most]
    return [f"  {name:<60} {time / total:.1%} of {total / 1e6:.2f} s" for name, time in costliest]
