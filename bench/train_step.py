"""Clips per second of forward, backward and accumulated optimiser step, side by side on the same spectrograms.

    pip install -r bench/requirements.txt
    python bench/train_step.py --frames 173 --micro-batch 4 --micro-batches 8 --rounds 5

Sides: this project's own train_step; the same with the window in one micro-batch; the hub's implementation
(transformers) at the native length, with the same accumulation, precision and fused AdamW; the same driven as its
Trainer does it (loss by the model, clipping, a scheduler step, the loss read every step); a plain timm ViT with as
many tokens; with --compile, this project's compiled; with --earlier, the hub's fed as in the system that this one
replaces: padded to 1024 frames, float32 where there is no CUDA. Random weights: values do not change the time. Peak
memory is of a process of its own for each side.
"""
import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import in_turn, matrix_rate, report, spread, wait
from transformers import ASTConfig as HubConfig
from transformers import ASTForAudioClassification

import train
from core.compiled import Compiled
from core.precision import Precision, choose_precision, pick_device
from core.smoke import peak_memory_mb
from data.augment import Augment
from data.clips import Batch
from losses import CrossEntropy
from model.ast import AST, ASTConfig
from model.groups import parameter_groups
from sched import RelativeSchedule

CLASSES = 50
SIZES = {"base": (768, 12, 12), "small": (384, 12, 6), "tiny": (192, 12, 3)}


class Through(torch.nn.Module):
    """Lets the spectrogram through where the front end would be."""

    def forward(self, spec):
        return spec

    def silence(self, spec):
        return spec


@dataclass
class Side:
    """What is timed: a whole step, and forward or forward and backward of one micro-batch."""
    step: Callable
    model: Callable
    spec: torch.Tensor
    target: torch.Tensor
    precision: Precision
    logits_of: Callable = staticmethod(lambda model, spec: model(spec))

    def forward(self):
        with self.precision.autocast():
            return self.logits_of(self.model, self.spec)

    def both(self):
        F.cross_entropy(self.forward().float(), self.target).backward()
        self.model.zero_grad(set_to_none=True)


def ours(specs, target, size, precision, compiled=None, patchout=0.0):
    dim, depth, heads = SIZES[size]
    model = AST(ASTConfig(CLASSES, dim=dim, depth=depth, heads=heads)).to(precision.device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 5e-5, 1e-3, 0.01), fused=True)
    schedule = RelativeSchedule(optimizer, 0, 10**4, device=precision.device if precision.device.type == "cuda" else None)
    t = train.Training(model, Through(), Augment(), CrossEntropy(), optimizer, schedule, precision, 1.0,
                       patchout=patchout)
    if compiled:
        t.compiled = Compiled(model, len(specs[0]), compiled == "graphs")
    window = [Batch(spec, target, np.arange(len(spec)), []) for spec in specs]
    return Side(lambda: train.train_step(t, window, 0), t.compiled or model, specs[0], target, precision)


def ours_at_once(specs, target, size, precision):
    return ours([torch.cat(specs)], target.repeat(len(specs)), size, precision)


def accumulated(model, specs, target, precision, logits_of):
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


def hub_model(size, frames, device):
    dim, depth, heads = SIZES[size]
    config = HubConfig(hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * dim,
                       max_length=frames, num_mel_bins=128, num_labels=CLASSES, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0, attn_implementation="sdpa")
    return ASTForAudioClassification(config).to(device).train()


def hub(specs, target, size, precision):
    model = hub_model(size, specs[0].shape[2], precision.device)
    turned = [spec.transpose(1, 2).contiguous() for spec in specs]
    return accumulated(model, turned, target, precision, lambda model, spec: model(input_values=spec).logits)


def hub_as_its_trainer(specs, target, size, precision):
    model = hub_model(size, specs[0].shape[2], precision.device)
    turned = [spec.transpose(1, 2).contiguous() for spec in specs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def step():
        total = 0.0
        for spec in turned:
            with precision.autocast():
                loss = model(input_values=spec, labels=target).loss / len(turned)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        return total
    return Side(step, model, turned[0], target, precision, lambda model, spec: model(input_values=spec, labels=target).logits)


def earlier(specs, target, size, precision):
    padded = [F.pad(spec, (0, 1024 - spec.shape[2])) for spec in specs]
    if precision.device.type != "cuda":
        precision = choose_precision(precision.device, "off")
    return hub(padded, target, size, precision)


def plain_vit(specs, target, size, precision):
    rows, columns = (128 - 16) // 10 + 1, (specs[0].shape[2] - 16) // 10 + 1
    model = timm.create_model(f"vit_{size}_patch16_224", img_size=(16 * rows, 16 * columns), in_chans=1, num_classes=CLASSES)
    images = [torch.randn(len(spec), 1, 16 * rows, 16 * columns, device=precision.device) for spec in specs]
    return accumulated(model.to(precision.device).train(), images, target, precision, lambda model, image: model(image))


def operations(size, tokens):
    """Forward and backward of a clip: three times the products of the forward pass, two operations each."""
    dim, depth, _ = SIZES[size]
    return 3 * 2 * depth * (12 * dim * dim * tokens + 2 * dim * tokens * tokens) + 3 * 2 * 256 * dim * tokens


def makers(args):
    found = {"this project": ours}
    if args.micro_batches > 1:
        found[f"this project, {args.micro_batches * args.micro_batch} at once"] = ours_at_once
    if args.compile:
        found[f"this project, compiled ({args.compile})"] = lambda *how: ours(*how, compiled=args.compile)
    if args.patchout:
        found[f"this project, --patchout {args.patchout}"] = lambda *how: ours(*how, patchout=args.patchout)
    found |= {"hub": hub, "hub, as its Trainer": hub_as_its_trainer, "plain timm ViT": plain_vit}
    if args.earlier:
        found["hub, padded to 1024 (earlier system)"] = earlier
    return found


def peak_memory(name):
    """MiB of a fresh process that takes two steps of one side alone."""
    out = subprocess.run([sys.executable, *sys.argv, "--memory-of", name], capture_output=True, text=True, check=True).stdout
    return float(out.split()[-1])


def profiled(side, device):
    """Lines of the five operations that a step of one side spends the most time in."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    side.step()
    with torch.profiler.profile(activities=kinds) as seen:
        side.step()
        wait(device)
    spent = {event.key: event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
             for event in seen.key_averages()}
    total = sum(spent.values())
    return [f"  {name:<60} {time / total:.1%} of {total / 1e6:.2f} s" for name, time in
            sorted(spent.items(), key=lambda item: -item[1])[:5]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--frames", type=int, default=173)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8, help="in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--earlier", action="store_true", help="with the earlier system's way, which takes minutes a step")
    parser.add_argument("--compile", choices=("default", "graphs"), help="with this project's compiled, as train.py --compile")
    parser.add_argument("--patchout", type=float, help="with this share of the patches left out, which changes training")
    parser.add_argument("--profile", action="store_true", help="print where a step of this project spends its time, and stop")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"))
    parser.add_argument("--memory-of", metavar="SIDE", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="bench/results/train_step.jsonl")
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = choose_precision(device, args.amp)
    torch.manual_seed(0)
    specs = [torch.randn(args.micro_batch, 128, args.frames, device=device) for _ in range(args.micro_batches)]
    target = torch.randint(CLASSES, (args.micro_batch,), device=device)
    if args.memory_of:
        side = makers(args)[args.memory_of](specs, target, args.size, precision)
        for _ in range(2):
            side.step()
        print(peak_memory_mb(device))
        return
    if args.profile:
        print("\n".join(profiled(ours(specs, target, args.size, precision), device)))
        return
    memory = {name: peak_memory(name) for name in makers(args)}
    sides = {name: make(specs, target, args.size, precision) for name, make in makers(args).items()}
    work = {(name, part): getattr(side, part) for name, side in sides.items() for part in ("step", "forward", "both")}
    times = in_turn(work, args.rounds, device)
    clips = args.micro_batch * args.micro_batches
    tokens = ((128 - 16) // 10 + 1) * ((args.frames - 16) // 10 + 1) + 2
    rate = matrix_rate(device, precision.dtype or torch.float32, rows=args.micro_batch * tokens)
    floor = rate / operations(args.size, tokens)
    rows = []
    for name, side in sides.items():
        speed = spread([clips / s for s in times[name, "step"]])
        ratio = spread([s / own for s, own in zip(times[name, "step"], times["this project", "step"], strict=True)])
        forward, both = (1000 * spread(times[name, part])[0] / len(side.spec) for part in ("forward", "both"))
        rows.append([name, f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})",
                     f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})", f"{forward:.1f}", f"{both - forward:.1f}",
                     f"{memory[name]:,.0f}"])
    report("train_step", vars(args) | {"precision": precision.name, "tokens": tokens},
           ["side", "clips/s, median (range)", "this project is faster by", "forward, ms a clip", "backward, ms a clip",
            "peak MiB"], rows,
           [f"{precision.name}, {tokens} tokens, {args.micro_batches} x {args.micro_batch} clips a step, {args.rounds} rounds in "
            f"turn; matrix products reach {rate / 1e12:.3f} TFLOP/s here: floor {floor:.2f} clips/s, of which this project "
            f"uses {clips / spread(times['this project', 'step'])[0] / floor:.0%}"], device, args.out)


if __name__ == "__main__":
    main()
