"""Augmentation of a batch on the training device; the random numbers belong to the clips (draws.py)."""
from dataclasses import dataclass

import numpy as np
import torch

from .draws import MIX, SHIFT, SPECAUGMENT, uniform


@dataclass(frozen=True)
class Augment:
    """Circular shift, SpecAugment and MixUp. A probability, width or alpha of 0 turns that part off.

    freq_mask (mels), time_mask (frames): widest mask, one of each per clip, drawn from 0 to that width;
    specaug_p: probability per clip that it is masked at all. mixup_alpha: of Beta(alpha, alpha) for the
    share; mixup_p: probability per clip that it is mixed. shift_p: probability per clip that it is turned.
    """
    freq_mask: int = 0
    time_mask: int = 0
    specaug_p: float = 1.0
    mixup_alpha: float = 0.0
    mixup_p: float = 1.0
    shift_p: float = 0.0
    seed: int = 0

    def shift(self, wave, epoch, clips):
        """Turn clips in time by any amount, what leaves at the end coming back at the start.

        wave (B, samples), clips: B clip numbers -> (B, samples).
        """
        if self.shift_p == 0:
            return wave
        samples = wave.shape[1]
        u = uniform(self.seed, epoch, clips, SHIFT, 2)  # (B, 2)
        by = (u[:, 0] * samples).astype(np.int64) * (u[:, 1] < self.shift_p)
        by = torch.from_numpy(by).to(wave.device, non_blocking=True)
        place = torch.arange(samples, device=wave.device)[None, :] - by[:, None]
        return wave.gather(1, place.remainder(samples))

    def mixup(self, wave, target, epoch, clips):
        """Mix each clip with the next one of the batch (H. Zhang et al., "mixup", 2018).

        wave (B, samples), target (B, classes) soft labels, clips: B clip numbers -> the same shapes.
        """
        if self.mixup_alpha == 0 or len(wave) < 2:
            return wave, target
        from scipy.special import betaincinv  # half a second, which --help need not wait for

        u = uniform(self.seed, epoch, clips, MIX, 2)  # (B, 2)
        share = betaincinv(self.mixup_alpha, self.mixup_alpha, u[:, 0])  # of the clip itself
        share = np.where(u[:, 1] < self.mixup_p, np.maximum(share, 1 - share), 1.0)
        share = torch.as_tensor(share, dtype=torch.float32).to(wave.device, non_blocking=True)[:, None]
        return (share * wave + (1 - share) * wave.roll(-1, 0),
                share * target + (1 - share) * target.roll(-1, 0))

    def spec_augment(self, spec, silence, epoch, clips):
        """Cover a band of mels and a stretch of frames of each clip (D. S. Park et al., "SpecAugment",
        2019) with what silence reads there, not with an arbitrary zero.

        spec (B, n_mels, frames), silence (B, 1, 1), clips: B clip numbers -> (B, n_mels, frames).
        """
        if self.freq_mask == 0 and self.time_mask == 0:
            return spec
        u = uniform(self.seed, epoch, clips, SPECAUGMENT, 5)  # (B, 5)
        n_mels, frames = spec.shape[1:]
        masked = u[:, 4] < self.specaug_p
        mels = _stretch(u[:, 0:2], self.freq_mask, n_mels, masked).to(spec.device, non_blocking=True)
        times = _stretch(u[:, 2:4], self.time_mask, frames, masked).to(spec.device, non_blocking=True)
        return torch.where(mels[:, :, None] | times[:, None, :], silence, spec)


def _stretch(u, widest, size, masked):
    """(B, 2) uniforms -> (B, size) bool: a stretch of 0 to `widest` places, anywhere that it fits."""
    width = np.minimum((u[:, 0] * (widest + 1)).astype(np.int64), size) * masked
    first = (u[:, 1] * (size - width + 1)).astype(np.int64)
    place = np.arange(size)[None, :]
    return torch.from_numpy((place >= first[:, None]) & (place < (first + width)[:, None]))
