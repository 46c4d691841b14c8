"""Augmentation of a batch on the training device; the random numbers belong to the clips (draws.py)."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .draws import FILTER, GAIN, MIX, NOISE, SHIFT, SPECAUGMENT, uniform


@dataclass(frozen=True)
class Augment:
    """Gain, background noise, filters, circular shift, MixUp and SpecAugment. A probability, width or alpha of 0
    turns that part off.

    freq_mask (mels), time_mask (frames): widest mask, one of each per clip, drawn from 0 to that width;
    specaug_p: probability per clip that it is masked at all. mixup_alpha: of Beta(alpha, alpha) for the
    share; mixup_p: probability per clip that it is mixed. shift_p: probability per clip that it is turned.
    gain: up to so many dB louder or softer. noise_snr: (lowest, highest) dB of the clip over the noise; which clips get
    noise is decided where it is read. filter_p: probability per clip of a high-pass or low-pass at `rate` Hz.
    """
    freq_mask: int = 0
    time_mask: int = 0
    specaug_p: float = 1.0
    mixup_alpha: float = 0.0
    mixup_p: float = 1.0
    shift_p: float = 0.0
    gain: float = 0.0
    noise_snr: tuple = (5.0, 30.0)
    filter_p: float = 0.0
    rate: int = 22050
    seed: int = 0

    def louder(self, wave, epoch, clips):
        """Each clip by up to `gain` dB louder or softer. wave (B, samples), clips: B clip numbers -> (B, samples)."""
        if self.gain == 0:
            return wave
        db = self.gain * (2 * uniform(self.seed, epoch, clips, GAIN, 1) - 1)  # (B, 1)
        return wave * torch.from_numpy(10 ** (db / 20)).float().to(wave.device, non_blocking=True)

    def background(self, wave, noise, epoch, clips):
        """Add the quietest stretch of other clips, played to and fro, at a random signal-to-noise ratio.

        wave, noise (B, samples), clips: B clip numbers -> (B, samples). A stretch is an eighth of the clip; digital
        silence is not one. A clip whose noise is silent, or None for all, stays as it is.
        """
        if noise is None:
            return wave
        low, high = self.noise_snr
        snr = low + (high - low) * uniform(self.seed, epoch, clips, NOISE, 4)[:, 3:]  # (B, 1); three are drawn in reading
        snr = torch.from_numpy(snr).float().to(wave.device, non_blocking=True)
        samples = wave.shape[1]
        step = max(1, samples // 32)
        level = F.avg_pool1d(noise.square()[:, None], step)  # (B, 1, 32)
        power, least = F.avg_pool1d(level, 4, 1)[:, 0], -F.max_pool1d(-level, 4, 1)[:, 0]
        power, place = torch.where(least > 1e-9, power, torch.inf).min(dim=1, keepdim=True)
        to_and_fro = torch.arange(samples, device=wave.device) % (8 * step)
        to_and_fro = torch.minimum(to_and_fro, 8 * step - 1 - to_and_fro)
        quiet = noise.gather(1, place * step + to_and_fro)
        ratio = wave.square().mean(dim=1, keepdim=True) / power / 10 ** (snr / 10)  # 0 where there is no stretch
        return wave + quiet * ratio.sqrt()

    def filtered(self, wave, epoch, clips):
        """Half of the chosen clips through a low-pass between 1/8 and 2/3 of the highest frequency, half through a
        high-pass between 50 and 1,000 Hz, drawn evenly in octaves: the magnitude of a second-order Butterworth, without
        its delay. wave (B, samples), clips: B clip numbers -> (B, samples)."""
        if self.filter_p == 0:
            return wave
        u = uniform(self.seed, epoch, clips, FILTER, 3)  # (B, 3)
        lowpass, top = u[:, 1] < 0.5, self.rate / 2
        low, high = np.where(lowpass, top / 8, 50.0), np.where(lowpass, top * 2 / 3, 1000.0)
        cutoff = low * (high / low) ** u[:, 2]
        hz = np.fft.rfftfreq(wave.shape[1], 1 / self.rate)
        ratio = (hz[None, :] / cutoff[:, None]) ** 4
        response = np.where(lowpass[:, None], 1.0, np.sqrt(ratio)) / np.sqrt(1 + ratio)
        response[u[:, 0] >= self.filter_p] = 1.0
        response = torch.from_numpy(response).float().to(wave.device, non_blocking=True)
        return torch.fft.irfft(torch.fft.rfft(wave) * response, wave.shape[1])

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

        wave (B, samples), target (B, classes) soft labels, clips: B clip numbers -> the same shapes. A class that is
        unknown (NaN) in either clip of a mix stays so.
        """
        if self.mixup_alpha == 0 or len(wave) < 2:
            return wave, target
        from scipy.special import betaincinv  # half a second, which --help need not wait for

        u = uniform(self.seed, epoch, clips, MIX, 2)  # (B, 2)
        share = betaincinv(self.mixup_alpha, self.mixup_alpha, u[:, 0])  # of the clip itself
        share = np.where(u[:, 1] < self.mixup_p, np.maximum(share, 1 - share), 1.0)
        share = torch.as_tensor(share, dtype=torch.float32).to(wave.device, non_blocking=True)[:, None]
        mixed = share * target + (1 - share) * target.roll(-1, 0)
        return (share * wave + (1 - share) * wave.roll(-1, 0),
                torch.where(share < 1, mixed, target))  # 0 * NaN is NaN: a clip that is not mixed keeps its labels

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
