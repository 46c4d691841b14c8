"""Do the patches that `model/relevance.py` ranks highest matter to the answer?

    python bench/relevance.py CKPT

Removes the tenth (and the fifth) of each test clip's patches that a method ranks highest, and
measures what share of the answer's probability is left. The lower the share, the better the method.

Methods: gradient-weighted attention rollout (what the report shows), attention rollout (S. Abnar,
W. Zuidema, 2020), gradient times input, removing each patch in turn, and random patches. All see
the same clips; 95% intervals by bootstrap over the clips.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from common import report

from core.run.checkpoint import load_checkpoint
from core.scoring import restore
from data.clips import Clips, evaluation_batches
from evaluate import evaluation_data
from model.relevance import patch_relevance

BATCH = 16
SHARES = (0.1, 0.2)  # of the patches that are removed

# A method: (model, spec (B, n_mels, frames), target (B,)) -> scores (B, patches).
# A high score means that the patch matters.


def gradient_weighted_rollout(model, spec, target):
    return patch_relevance(model, spec, target).flatten(1)


def attention_rollout(model, spec, target):
    """Attention averaged over heads, mixed evenly with the residual, multiplied over the blocks."""
    x = model.embed(spec)
    rollout = torch.eye(x.shape[1])
    for block in model.blocks:
        x, attention = block(x, return_attention=True)
        attention = attention.mean(dim=1)  # (B, n_outputs, N)
        rollout = (attention + torch.eye(*attention.shape[1:])) / 2 @ rollout
    return rollout[:, :2, 2:].mean(dim=1)


@torch.enable_grad()
def gradient_times_input(model, spec, target):
    tokens = model.embed(spec).detach().requires_grad_()
    x = tokens
    for block in model.blocks:
        x = block(x)
    logits = model.head(model.pool(x))
    gradient, = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), tokens)
    patches = model.patch_embed(spec[:, None]).flatten(2).transpose(1, 2)  # without positions
    return (gradient[:, 2:] * patches).sum(dim=2).detach()


def each_patch_removed(model, spec, target):
    n = n_patches(model, spec)
    drops, whole = [], score(model(spec), target)
    for patch in range(n):
        others = torch.tensor([i for i in range(n) if i != patch]).expand(len(spec), -1)
        drops.append(whole - score(model(spec, patch_ids=others), target))
    return torch.stack(drops, dim=1)


def random_patches(model, spec, target):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(spec), n_patches(model, spec), generator=generator)


METHODS = {
    "gradient-weighted attention rollout": gradient_weighted_rollout,
    "attention rollout": attention_rollout,
    "gradient times input": gradient_times_input,
    "each patch removed in turn": each_patch_removed,
    "random patches": random_patches,
}


def n_patches(model, spec):
    rows, columns = model.config.patches(spec.shape[2])
    return rows * columns


def score(values, target):
    """(B, classes) -> (B,): each clip's value for its target class."""
    return values.gather(1, target[:, None])[:, 0]


def probability_left(model, spec, target, order, share):
    """The target's probability without the first `share` of `order`, over that with all: (B,)."""
    remaining = order[:, round(order.shape[1] * share):].sort(dim=1)[0]
    without = score(model(spec, patch_ids=remaining).softmax(dim=1), target)
    return without / score(model(spec).softmax(dim=1), target)


def mean_with_interval(values, rng):
    means = values[rng.integers(0, len(values), (1000, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def test_spectrograms(checkpoint, frontend, n_clips):
    """The first tile of up to `n_clips` test clips, as batches (B, n_mels, frames)."""
    manifest, test_rows, _, _ = evaluation_data(checkpoint, None, None, "test")
    clip = checkpoint["clip"]
    clips = Clips(manifest, frontend.config.sample_rate, clip["samples"], clip["short"])
    waves = [batch.wave for batch in evaluation_batches(clips, test_rows, BATCH)]
    return torch.cat([frontend(wave) for wave in waves])[:n_clips].split(BATCH)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ckpt")
    parser.add_argument("--clips", type=int, default=200, help="at most this many, one tile each")
    parser.add_argument("--out", default="bench/results/relevance.jsonl")
    args = parser.parse_args()
    checkpoint = load_checkpoint(Path(args.ckpt))
    model, frontend = restore(checkpoint, torch.device("cpu"))
    model.eval()
    specs = test_spectrograms(checkpoint, frontend, args.clips)
    batches = [(spec, model(spec).argmax(dim=1)) for spec in specs]
    n = sum(len(spec) for spec in specs)
    rng = np.random.default_rng(0)
    rows = []
    for name, method in METHODS.items():
        started = time.perf_counter()
        orders = [method(model, *batch).argsort(dim=1, descending=True) for batch in batches]
        seconds = time.perf_counter() - started
        cells = []
        for share in SHARES:
            left = [probability_left(model, *batch, order, share)
                    for batch, order in zip(batches, orders, strict=True)]
            cells.append(mean_with_interval(torch.cat(left).numpy(), rng))
        rows.append([name, *cells, f"{1000 * seconds / n:.1f}"])
    columns = ["patches by", "probability left without 10%", "without 20%", "ms a tile"]
    note = (f"dim {model.config.dim}, depth {model.config.depth}, {n} tiles of test clips of "
            f"{checkpoint['manifest']['name']}; means with 95% bootstrap intervals over the clips")
    report("relevance", {"clips": args.clips}, columns, rows, [note], torch.device("cpu"), args.out)


if __name__ == "__main__":
    main()
