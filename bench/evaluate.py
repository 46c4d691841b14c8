"""Clips per second of evaluation, from waveforms in memory to scores.

    pip install -r bench/requirements.txt
    python bench/evaluate.py --size base --clips 48

Sides: this project's evaluate() with Fbank; the hub's feature extractor and model (transformers) at
the same length and batch size; the same with its default padding to 1024 frames. Random weights,
4 s of noise per clip.
"""

import argparse
from types import SimpleNamespace

import numpy as np
import torch
from common import in_turn, matrix_rate, median_range, ratios, report, spread
from sides import EARLIER_FRAMES, SIZES, hub_model, n_tokens, operations, our_model
from transformers import ASTFeatureExtractor

from core.device.precision import choose_precision, pick_device
from core.scoring import Scorer, evaluate
from data.clips import Batch
from losses import CrossEntropy
from model.frontend import Fbank

FRAMES, SAMPLES, SAMPLE_RATE = 398, 64000, 16000  # 4 s
BASELINE = "this project"


def ours(waves, args, precision):
    """Return a function that scores waves (n, samples) with this project."""
    device = precision.device
    scorer = Scorer(our_model(args.size, device), Fbank().to(device), CrossEntropy(), precision)
    n = len(waves)
    manifest = SimpleNamespace(labels=np.zeros(n, np.int32), multi_label=False)
    batches = []
    for rows in torch.arange(n).split(args.batch):
        target = torch.zeros(len(rows), dtype=torch.long)
        batches.append(Batch(waves[rows], target, rows.numpy(), []))
    return lambda: evaluate(scorer, batches, manifest, np.arange(n))


def hub(waves, args, precision, frames):
    """Return a function that scores waves (n, samples) with the hub's model."""
    model = hub_model(args.size, frames, precision.device).eval()
    extractor = ASTFeatureExtractor(max_length=frames)
    clips = list(waves.numpy())

    @torch.inference_mode()
    def score():
        for i in range(0, len(clips), args.batch):
            batch = clips[i : i + args.batch]
            features = extractor(batch, sampling_rate=SAMPLE_RATE, return_tensors="pt")
            spec = features["input_values"].to(precision.device)
            with precision.autocast():
                logits = model(input_values=spec).logits
            logits.float().softmax(1).cpu()

    return score


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", default="base", choices=SIZES)
    add("--clips", type=int, default=48)
    add("--batch", type=int, default=16)
    add("--rounds", type=int, default=3)
    add("--device", default="auto")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"))
    add("--out", default="bench/results/evaluate.jsonl")
    return parser.parse_args()


def main():
    args = parse()
    device = pick_device(args.device)
    precision = choose_precision(device, args.amp)
    torch.manual_seed(0)
    waves = 0.1 * torch.randn(args.clips, SAMPLES)
    times = in_turn({
        BASELINE: ours(waves, args, precision),
        "hub, native length": hub(waves, args, precision, FRAMES),
        "hub, padded to 1024": hub(waves, args, precision, EARLIER_FRAMES),
    }, args.rounds, device)
    rows = [[name, median_range(args.clips / s for s in seconds),
             median_range(ratios(seconds, times[BASELINE]))]
            for name, seconds in times.items()]

    tokens = n_tokens(FRAMES)
    rate = matrix_rate(device, precision.dtype or torch.float32, rows=args.batch * tokens)
    floor = rate / (operations(args.size, tokens) / 3)  # a third is the forward pass
    used = args.clips / spread(times[BASELINE])[0] / floor
    note = (f"{precision.name}, {tokens} tokens, batch {args.batch}, {args.rounds} rounds in turn; "
            f"floor {floor:.2f} clips/s by matrix products alone, of which {used:.0%} is used")
    report("evaluate", vars(args) | {"precision": precision.name},
           ["side", "clips/s, median (range)", "speed-up of this project"], rows, [note], device,
           args.out)


if __name__ == "__main__":
    main()
