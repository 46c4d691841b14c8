"""Augmentation of training batches, on the training device.

To add an augmentation, add a method and its field here, with its place in `waves` or
`spectrograms`, and a flag of the field's name in flags.py. Draw random numbers with `_uniform`
only, for a purpose of your own (any name): they belong to the clips, so a result does not depend on
the batch or on an interruption.
"""
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from .clip_rng import Purpose, uniform

SILENCE_POWER = 1e-9  # mean square below which background noise counts as digital silence


@dataclass(frozen=True)
class Augment:
    """Settings and methods of all augmentations. The fields are named like the flags.

    A probability, width, alpha or gain of 0 turns its augmentation off. Every method takes `epoch`
    and `clip_ids` (B,), which decide the random numbers. Tensors keep their shape and device.
    """
    freq_mask: int = 0  # widest frequency mask, in mel bands
    time_mask: int = 0  # widest time mask, in frames
    specaug_p: float = 1.0  # probability that a clip is masked
    mixup_alpha: float = 0.0  # of Beta(alpha, alpha)
    mixup_p: float = 1.0  # probability that a clip is mixed
    shift_p: float = 0.0  # probability that a clip is shifted
    gain: float = 0.0  # largest change of level, in dB
    noise_snr: tuple[float, float] = (5.0, 30.0)  # lowest and highest signal-to-noise ratio, in dB
    filter_p: float = 0.0  # probability that a clip is filtered
    sample_rate: int = 22050  # Hz
    seed: int = 0

    @classmethod
    def from_flags(cls, flags: dict, sample_rate: int) -> "Augment":
        """The settings among `flags` (name -> value), whose names are those of the fields."""
        names = {field.name for field in fields(cls)}
        settings = {name: value for name, value in flags.items() if name in names}
        low, high = settings["noise_snr"].split(",")
        return cls(**(settings | {"noise_snr": (float(low), float(high)),
                                  "sample_rate": sample_rate}))

    def waves(
        self, wave: torch.Tensor, target: torch.Tensor, noise: torch.Tensor | None, epoch: int,
        clip_ids: ArrayLike,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment waveforms (B, samples) and their soft labels (B, classes).

        noise: (B, samples) background noise, or None.
        """
        wave = self.random_gain(wave, epoch, clip_ids)
        wave = self.random_shift(wave, epoch, clip_ids)
        wave = self.add_noise(wave, noise, epoch, clip_ids)
        wave = self.random_filter(wave, epoch, clip_ids)
        return self.mixup(wave, target, epoch, clip_ids)

    def spectrograms(
        self, spec: torch.Tensor, silence: torch.Tensor, epoch: int, clip_ids: ArrayLike
    ) -> torch.Tensor:
        """Augment spectrograms (B, n_mels, frames). silence: (B, 1, 1), a silent cell's value."""
        return self.spec_augment(spec, silence, epoch, clip_ids)

    def random_gain(self, wave: torch.Tensor, epoch: int, clip_ids: ArrayLike) -> torch.Tensor:
        """Change the level of each clip by Uniform(-gain, gain) dB. wave: (B, samples)."""
        if self.gain == 0:
            return wave
        db = self.gain * (2 * self._uniform(epoch, clip_ids, Purpose.GAIN, 1) - 1)  # (B, 1)
        return wave * _on_device(10 ** (db / 20), wave)

    def random_shift(self, wave: torch.Tensor, epoch: int, clip_ids: ArrayLike) -> torch.Tensor:
        """Shift clips circularly in time by Uniform{0, ..., samples - 1}, with probability shift_p.

        wave: (B, samples). Samples that leave at the end come back at the beginning.
        """
        if self.shift_p == 0:
            return wave
        samples = wave.shape[1]
        u = self._uniform(epoch, clip_ids, Purpose.SHIFT, 2)  # (B, 2)
        shift = (u[:, 0] * samples).astype(np.int64)
        shift[u[:, 1] >= self.shift_p] = 0
        shift = _on_device(shift, wave)[:, None]
        source = torch.arange(samples, device=wave.device)[None, :] - shift  # (B, samples)
        return wave.gather(1, source.remainder(samples))

    def add_noise(
        self, wave: torch.Tensor, noise: torch.Tensor | None, epoch: int, clip_ids: ArrayLike
    ) -> torch.Tensor:
        """Add background noise at a signal-to-noise ratio of Uniform(*noise_snr) dB.

        wave, noise: (B, samples). The noise is the quietest eighth of each `noise` clip that is not
        digital silence, played forwards and backwards in turn. A clip keeps its samples if all of
        its noise is silent. `Clips` decides which clips get noise; None: no clip of the batch does.
        """
        if noise is None:
            return wave
        lowest, highest = self.noise_snr
        u = self._uniform(epoch, clip_ids, Purpose.NOISE, 4)[:, 3:]  # (B, 1); Clips uses 0 to 2
        snr = _on_device(lowest + (highest - lowest) * u, wave)
        quiet, noise_power = _quietest_eighth(noise)
        # The squared factor of the noise: 0 for silent noise, whose power is given as infinite.
        ratio = wave.square().mean(dim=1, keepdim=True) / noise_power / 10 ** (snr / 10)
        return wave + quiet * ratio.sqrt()

    def random_filter(self, wave: torch.Tensor, epoch: int, clip_ids: ArrayLike) -> torch.Tensor:
        """Filter clips with probability filter_p: half by a low-pass, half by a high-pass.

        wave: (B, samples). The cutoff is log-uniform: 1/8 to 2/3 of the Nyquist frequency for the
        low-pass, 50 to 1,000 Hz for the high-pass. The filter has the magnitude response of a
        second-order Butterworth filter, and no delay.
        """
        if self.filter_p == 0:
            return wave
        u = self._uniform(epoch, clip_ids, Purpose.FILTER, 3)  # (B, 3)
        nyquist = self.sample_rate / 2
        lowpass = u[:, 1] < 0.5
        lowest = np.where(lowpass, nyquist / 8, 50.0)
        highest = np.where(lowpass, nyquist * 2 / 3, 1000.0)
        cutoff = lowest * (highest / lowest) ** u[:, 2]  # (B,) Hz

        numbers = np.stack([cutoff, lowpass, u[:, 0] < self.filter_p])[:, :, None]  # (3, B, 1)
        samples, seconds = wave.shape[1], 1 / self.sample_rate  # of a clip, of a sample
        if wave.device.type == "cpu":
            hz = np.fft.rfftfreq(samples, seconds)
            response = torch.from_numpy(_filter_response(hz, *numbers))
        else:  # computed there: the whole response would be a large copy, which the host waits for
            hz = torch.fft.rfftfreq(samples, seconds, dtype=torch.float64, device=wave.device)
            numbers = torch.from_numpy(numbers).to(wave.device, non_blocking=True)
            response = _filter_response(hz, *numbers)
        return torch.fft.irfft(torch.fft.rfft(wave) * response.float(), samples)

    def mixup(
        self, wave: torch.Tensor, target: torch.Tensor, epoch: int, clip_ids: ArrayLike
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix each clip with the next clip of the batch, with probability mixup_p.

        wave: (B, samples); target: (B, classes) soft labels. The share of the clip itself is the
        larger part of a Beta(mixup_alpha, mixup_alpha) split. A class that is unknown (NaN) in one
        of the two clips is unknown in the mix. Source: H. Zhang et al., "mixup", 2018.
        """
        if self.mixup_alpha == 0 or len(wave) < 2:
            return wave, target
        from scipy.special import betaincinv  # imported late: it takes half a second

        u = self._uniform(epoch, clip_ids, Purpose.MIXUP, 2)  # (B, 2)
        share = betaincinv(self.mixup_alpha, self.mixup_alpha, u[:, 0])  # inverse of the Beta CDF
        share = np.where(u[:, 1] < self.mixup_p, np.maximum(share, 1 - share), 1.0)
        share = _on_device(share, wave)[:, None]  # (B, 1)
        mixed_wave = share * wave + (1 - share) * wave.roll(-1, 0)
        mixed_target = share * target + (1 - share) * target.roll(-1, 0)
        # 0 * NaN is NaN, so a clip that is not mixed must keep its own labels.
        return mixed_wave, torch.where(share < 1, mixed_target, target)

    def spec_augment(
        self, spec: torch.Tensor, silence: torch.Tensor, epoch: int, clip_ids: ArrayLike
    ) -> torch.Tensor:
        """Mask a band of mels and a range of frames of each clip, with probability specaug_p.

        spec: (B, n_mels, frames); silence: (B, 1, 1), the value that replaces masked cells. Widths
        are Uniform{0, ..., freq_mask} and Uniform{0, ..., time_mask}, places are uniform.
        Source: D. S. Park et al., "SpecAugment", 2019.
        """
        if self.freq_mask == 0 and self.time_mask == 0:
            return spec
        u = self._uniform(epoch, clip_ids, Purpose.SPEC_AUGMENT, 5)  # (B, 5)
        n_mels, frames = spec.shape[1:]
        chosen = u[:, 4] < self.specaug_p
        mels = _on_device(_random_range(u[:, 0:2], self.freq_mask, n_mels, chosen), spec)
        times = _on_device(_random_range(u[:, 2:4], self.time_mask, frames, chosen), spec)
        return torch.where(mels[:, :, None] | times[:, None, :], silence, spec)

    def _uniform(self, epoch, clip_ids, purpose, count):
        """(B, count) uniform random numbers in [0, 1)."""
        return uniform(self.seed, epoch, clip_ids, purpose, count)


def _on_device(values, like):
    """A NumPy array as a tensor on the device of `like`, floats as float32."""
    tensor = torch.from_numpy(values)
    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.to(like.device, non_blocking=True)


def _filter_response(hz, cutoff, is_lowpass, is_filtered):
    """Magnitudes of second-order Butterworth filters, (B, frequencies) float64; 1 for no filter.

    hz: (frequencies,); the others (B, 1), flags as 0 or 1. All are arrays or all are tensors.
    """
    ratio = (hz / cutoff) ** 4
    response = (is_lowpass + (1 - is_lowpass) * ratio ** 0.5) / (1 + ratio) ** 0.5
    return is_filtered * response + (1 - is_filtered)


def _quietest_eighth(noise):
    """Fill each clip with its quietest eighth, played forwards and backwards in turn.

    noise: (B, samples). Returns (B, samples) and its power (B, 1), infinite for digital silence.
    """
    samples = noise.shape[1]
    block = max(1, samples // 32)
    power = F.avg_pool1d(noise.square()[:, None], block)  # (B, 1, 32), of single blocks
    eighth_power = F.avg_pool1d(power, 4, 1)[:, 0]  # (B, 29), of runs of four blocks
    lowest_power = -F.max_pool1d(-power, 4, 1)[:, 0]  # of the quietest block in each run
    usable = torch.where(lowest_power > SILENCE_POWER, eighth_power, torch.inf)
    best_power, best = usable.min(dim=1, keepdim=True)  # (B, 1)

    forwards = torch.arange(samples, device=noise.device) % (8 * block)
    backwards = 8 * block - 1 - forwards
    offset = torch.minimum(forwards, backwards)  # with a block of 1: 0 1 2 3 3 2 1 0 0 1 2 3 ...
    return noise.gather(1, best * block + offset), best_power


def _random_range(u, widest, size, chosen):
    """Mark a range of 0 to `widest` places, anywhere among `size`, if the clip is chosen.

    u: (B, 2) uniform numbers; chosen: (B,) bool. Returns (B, size) bool.
    """
    width = np.minimum((u[:, 0] * (widest + 1)).astype(np.int64), size)
    width[~chosen] = 0
    first = (u[:, 1] * (size - width + 1)).astype(np.int64)
    place = np.arange(size)[None, :]
    return (place >= first[:, None]) & (place < (first + width)[:, None])
