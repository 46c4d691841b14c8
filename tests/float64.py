"""A training step in float64, where equal gradients agree to ten digits."""
import numpy as np
import torch

from data.clips import Batch


class Through(torch.nn.Module):
    """A front end that keeps float64: (B, samples) folded to (B, 32, frames)."""

    def forward(self, wave):
        return wave.view(len(wave), 32, -1)

    def silence(self, spec):
        return spec.amin((1, 2), keepdim=True)


class DoubleFocal(torch.nn.Module):
    """Focal loss with class weights in float64; `losses` computes in float32."""

    def forward(self, logits, target):
        p = logits.softmax(1)
        weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
        return -(target.double() * weights * (1 - p) ** 2 * p.log()).sum(1)


def cut(wave, target, sizes):
    """Clips -> micro-batches of these sizes, in order."""
    micro_batches, first = [], 0
    for size in sizes:
        rows = slice(first, first + size)
        micro_batches.append(Batch(wave[rows], target[rows], np.arange(len(wave))[rows], []))
        first += size
    return micro_batches
