"""Whether the patches that `model/relevance.py` names matter: python bench/relevance.py CKPT

Of each test clip of the run the tenth (and the fifth) of the patches that a method names first are left out, and the
probability of the answer is taken as a share of what it was: the lower, the more the method was right. Sides: gradient-weighted
attention rollout (what the report shows), attention rollout (S. Abnar, W. Zuidema, 2020), gradient times input, leaving out
each patch in turn, and patches at random. Every side on the same clips; 95% intervals by bootstrap over the clips.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from common import report

from core.checkpoint import load_checkpoint
from data.clips import Clips, evaluation_batches
from evaluate import evaluation_data, restore
from model.relevance import _explicit, patch_relevance


def rollout(model, spec, target):
    """Attention averaged over the heads, half of it the residual, multiplied through the blocks."""
    x = model.patch_embed(spec[:, None])
    positions = model._positions(*x.shape[2:])
    tokens = torch.cat([model.cls_token, model.dist_token], dim=1).expand(len(spec), -1, -1)
    x = torch.cat([tokens, x.flatten(2).transpose(1, 2)], dim=1) + positions
    through = torch.eye(x.shape[1])
    for block in model.blocks:
        x, attention = _explicit(block, x, None)
        through = (attention.mean(dim=1) + torch.eye(x.shape[1])) / 2 @ through
    return through[:, :2, 2:].mean(dim=1)


@torch.enable_grad()
def gradient_times_input(model, spec, target):
    held = {}
    hook = model.patch_embed.register_forward_hook(lambda module, inputs, out: held.update(patches=out))
    score = model(spec.clone().requires_grad_()).gather(1, target[:, None]).sum()
    hook.remove()
    slope, = torch.autograd.grad(score, held["patches"])
    return (slope * held["patches"]).sum(dim=1).flatten(1).detach()


def each_left_out(model, spec, target):
    n = int(np.prod(model.config.patches(spec.shape[2])))
    whole, falls = model(spec).gather(1, target[:, None])[:, 0], []
    for patch in range(n):
        kept = torch.tensor([i for i in range(n) if i != patch]).expand(len(spec), -1)
        falls.append(whole - model(spec, None, kept).gather(1, target[:, None])[:, 0])
    return torch.stack(falls, dim=1)


def at_random(model, spec, target):
    return torch.rand(len(spec), int(np.prod(model.config.patches(spec.shape[2]))), generator=torch.Generator().manual_seed(0))


SIDES = {"gradient-weighted attention rollout": lambda *args: patch_relevance(*args).flatten(1), "attention rollout": rollout,
         "gradient times input": gradient_times_input, "each patch left out in turn": each_left_out, "at random": at_random}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ckpt")
    parser.add_argument("--clips", type=int, default=200, help="at most so many, one tile of each")
    parser.add_argument("--out", default="bench/results/relevance.jsonl")
    args = parser.parse_args()
    state = load_checkpoint(Path(args.ckpt))
    model, frontend = restore(state, torch.device("cpu"))
    model.eval()
    manifest, tested, _, _ = evaluation_data(state, None, None, "test")
    clips = Clips(manifest, frontend.config.sample_rate, state["clip"]["samples"], state["clip"]["short"])
    first = [batch.wave for batch in evaluation_batches(clips, tested, 16)]
    specs = torch.cat([frontend(wave) for wave in first])[:args.clips].split(16)
    targets = [model(spec).argmax(dim=1) for spec in specs]
    n, rows, draws = sum(map(len, specs)), [], np.random.default_rng(0)
    for name, side in SIDES.items():
        began = time.perf_counter()
        orders = [side(model, spec, target).argsort(dim=1, descending=True) for spec, target in zip(specs, targets, strict=True)]
        took, cells = time.perf_counter() - began, []
        for share in (0.1, 0.2):
            left = []
            for spec, target, order in zip(specs, targets, orders, strict=True):
                kept = order[:, round(order.shape[1] * share):].sort(dim=1)[0]
                found, whole = (model(spec, None, k).softmax(dim=1).gather(1, target[:, None])[:, 0] for k in (kept, None))
                left.append((found / whole).numpy())
            left = np.concatenate(left)
            means = left[draws.integers(0, len(left), (1000, len(left)))].mean(axis=1)
            low, high = np.percentile(means, (2.5, 97.5))
            cells.append(f"{left.mean():.2f} ({low:.2f} to {high:.2f})")
        rows.append([name, *cells, f"{1000 * took / n:.1f}"])
    report("relevance", {"clips": args.clips}, ["patches by", "probability left without 10%", "without 20%", "ms a tile"], rows,
           [f"dim {model.config.dim}, depth {model.config.depth}, {n} tiles of test clips of {state['manifest']['name']}; means with 95% "
            "bootstrap intervals over the clips"], torch.device("cpu"), args.out)


if __name__ == "__main__":
    main()
