"""Clips per second in evaluation, from waveforms in memory to scores.

    pip install -r bench/requirements.txt
    python bench/evaluate.py --size base --clips 48

Sides: this project's evaluate() with Fbank; the hub's feature extractor and model (transformers) at the same length,
batched alike; the same as it comes, padded to 1024 frames. Random weights, 4 s of noise a clip.
"""
import argparse
from types import SimpleNamespace

import numpy as np
import torch
from common import in_turn, matrix_rate, report, spread
from train_step import CLASSES, SIZES, hub_model, operations
from transformers import ASTFeatureExtractor

from core.precision import choose_precision, pick_device
from data.clips import Batch
from evaluate import evaluate
from losses import CrossEntropy
from model.ast import AST, ASTConfig
from model.frontend import Fbank

FRAMES, SAMPLES = 398, 64000  # 4 s at 16 kHz


def ours(waves, args, precision):
    dim, depth, heads = SIZES[args.size]
    model = AST(ASTConfig(CLASSES, dim=dim, depth=depth, heads=heads)).to(precision.device)
    frontend, loss_fn = Fbank().to(precision.device), CrossEntropy()
    manifest = SimpleNamespace(labels=np.zeros(len(waves), np.int32), multi_label=False)
    batches = [Batch(waves[i:i + args.batch], torch.zeros(len(waves[i:i + args.batch]), dtype=torch.long),
                     np.arange(i, min(i + args.batch, len(waves))), []) for i in range(0, len(waves), args.batch)]
    return lambda: evaluate(model, frontend, batches, manifest, np.arange(len(waves)), loss_fn, precision)


def hub(waves, args, precision, frames):
    model = hub_model(args.size, frames, precision.device).eval()
    extractor = ASTFeatureExtractor(max_length=frames)
    clips = list(waves.numpy())

    @torch.inference_mode()
    def work():
        for i in range(0, len(clips), args.batch):
            spec = extractor(clips[i:i + args.batch], sampling_rate=16000, return_tensors="pt")["input_values"]
            with precision.autocast():
                logits = model(input_values=spec.to(precision.device)).logits
            logits.float().softmax(1).cpu()
    return work


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"))
    parser.add_argument("--out", default="bench/results/evaluate.jsonl")
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = choose_precision(device, args.amp)
    torch.manual_seed(0)
    waves = 0.1 * torch.randn(args.clips, SAMPLES)
    sides = {"this project": ours(waves, args, precision), "hub, native length": hub(waves, args, precision, FRAMES),
             "hub, padded to 1024": hub(waves, args, precision, 1024)}
    times = in_turn(sides, args.rounds, device)
    tokens = 12 * ((FRAMES - 16) // 10 + 1) + 2
    floor = matrix_rate(device, precision.dtype or torch.float32, rows=args.batch * tokens) / (operations(args.size, tokens) / 3)
    rows = []
    for name, seconds in times.items():
        speed = spread([args.clips / s for s in seconds])
        ratio = spread([s / own for s, own in zip(seconds, times["this project"], strict=True)])
        rows.append([name, f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})", f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"])
    report("evaluate", vars(args) | {"precision": precision.name}, ["side", "clips/s, median (range)", "this project is faster by"],
           rows, [f"{precision.name}, {tokens} tokens, batch {args.batch}, {args.rounds} rounds in turn; floor {floor:.2f} clips/s "
                  f"by matrix products alone, of which {args.clips / spread(times['this project'])[0] / floor:.0%} is used"],
           device, args.out)


if __name__ == "__main__":
    main()
