"""Clips per second of an optimizer step with accumulation, side by side on the same spectrograms.

    pip install -r bench/requirements.txt
    python bench/train_step.py --frames 173 --micro-batch 4 --micro-batches 8 --rounds 5

Sides:

* this project's train_step, and the same with all clips in one micro-batch;
* the hub's model (transformers) at the native length, with the same accumulation, precision and
  fused AdamW, and as its Trainer drives it;
* a timm ViT with as many tokens;
* with --compile, --patchout and --earlier: this project's compiled model, its patchout, and the
  hub's model as in the system that this one replaces (padded to 1024 frames, float32 without CUDA).

Weights are random: values do not change the time. The peak memory of each side is measured in a
process of its own. All sides are in memory at once: several times 1.5 GB with --size base, so use
--size small on a small GPU.
"""

import argparse
import subprocess
import sys
from functools import partial

import sides
import torch
from common import in_turn, matrix_rate, median_range, ratios, report, spread

from core.device.memory import peak_memory_mb
from core.device.precision import choose_precision, pick_device

BASELINE = "this project"
PARTS = ("step", "forward", "forward_backward")
COLUMNS = ["side", "clips/s, median (range)", "speed-up of this project", "forward, ms per clip",
           "backward, ms per clip", "peak MiB"]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", default="base", choices=sides.SIZES)
    add("--frames", type=int, default=173)
    add("--micro-batch", type=int, default=4)
    add("--micro-batches", type=int, default=8, help="micro-batches per step")
    add("--rounds", type=int, default=5)
    add("--earlier", action="store_true",
        help="add the earlier system's way, which takes minutes per step")
    add("--compile", choices=("default", "graphs"),
        help="add this project's compiled model, as train.py --compile")
    add("--patchout", type=float,
        help="add this project with this share of the patches left out, which changes training")
    add("--profile", action="store_true",
        help="print where a step of this project spends its time, and stop")
    add("--device", default="auto")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"))
    add("--memory-of", metavar="SIDE", help=argparse.SUPPRESS)
    add("--out", default="bench/results/train_step.jsonl")
    return parser.parse_args()


def builders(args):
    """Return name -> function that builds the side."""
    found = {BASELINE: sides.ours}
    if args.micro_batches > 1:
        n_clips = args.micro_batches * args.micro_batch
        found[f"this project, {n_clips} at once"] = sides.ours_at_once
    if args.compile:
        found[f"this project, compiled ({args.compile})"] = partial(
            sides.ours, compiled=args.compile)
    if args.patchout:
        found[f"this project, --patchout {args.patchout}"] = partial(
            sides.ours, patchout=args.patchout)
    found["hub"] = sides.hub
    found["hub, as its Trainer"] = sides.hub_with_trainer_steps
    found["plain timm ViT"] = sides.plain_vit
    if args.earlier:
        found["hub, padded to 1024 (earlier system)"] = sides.earlier_system
    return found


def peak_memory(name):
    """Peak MiB of a new process that takes two steps of one side."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def main():
    args = parse()
    device = pick_device(args.device)
    precision = choose_precision(device, args.amp)
    torch.manual_seed(0)
    specs = [torch.randn(args.micro_batch, sides.N_MELS, args.frames, device=device)
             for _ in range(args.micro_batches)]
    target = torch.randint(sides.N_CLASSES, (args.micro_batch,), device=device)

    def build(name):
        return builders(args)[name](specs, target, args.size, precision)

    if args.memory_of:
        side = build(args.memory_of)
        side.step()
        side.step()
        print(peak_memory_mb(device))
        return
    if args.profile:
        print("\n".join(sides.costliest_operations(build(BASELINE), device)))
        return
    memory = {name: peak_memory(name) for name in builders(args)}
    built = {name: build(name) for name in builders(args)}
    work = {(name, part): getattr(side, part) for name, side in built.items() for part in PARTS}
    times = in_turn(work, args.rounds, device)
    rows = [table_row(name, side, args, times, memory[name]) for name, side in built.items()]
    tokens = sides.n_tokens(args.frames)
    settings = vars(args) | {"precision": precision.name, "tokens": tokens}
    note = floor_note(args, precision, tokens, times[BASELINE, "step"])
    report("train_step", settings, COLUMNS, rows, [note], device, args.out)


def table_row(name, side, args, times, memory):
    n_clips = args.micro_batch * args.micro_batches
    seconds = times[name, "step"]
    speed_up = ratios(seconds, times[BASELINE, "step"])
    forward, both = (1000 * spread(times[name, part])[0] / len(side.spec)  # ms per clip
                     for part in ("forward", "forward_backward"))
    return [name, median_range(n_clips / s for s in seconds), median_range(speed_up),
            f"{forward:.1f}", f"{both - forward:.1f}", f"{memory:,.0f}"]


def floor_note(args, precision, tokens, seconds):
    """Compare with the floor: the time of the matrix products alone."""
    n_clips = args.micro_batch * args.micro_batches
    rate = matrix_rate(precision.device, precision.dtype or torch.float32,
                       rows=args.micro_batch * tokens)
    floor = rate / sides.operations(args.size, tokens)
    used = n_clips / spread(seconds)[0] / floor
    return (f"{precision.name}, {tokens} tokens, {args.micro_batches} x {args.micro_batch} clips "
            f"per step, {args.rounds} rounds in turn; matrix products reach {rate / 1e12:.3f} "
            f"TFLOP/s here: floor {floor:.2f} clips/s, of which this project uses {used:.0%}")


if __name__ == "__main__":
    main()
