"""Waveform -> log-mel spectrogram on the training device: (B, samples) -> (B, n_mels, frames).

`LogMel` is the baseline's and agrees with librosa; `Fbank` is AudioSet's and agrees with
`torchaudio.compliance.kaldi.fbank`. Both compute in float32 whatever the autocast, treat each clip as if
it were alone, and return what the model wants: mean about 0.
"""
import math
from dataclasses import asdict, dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class FrontendConfig:
    """What a front end is; `build_frontend(FrontendConfig(**config.to_dict()))` builds it again."""
    kind: str = "logmel"
    sample_rate: int = 22050  # Hz
    n_fft: int = 2048
    win_length: int = 2048  # samples
    hop_length: int = 512  # samples
    n_mels: int = 128
    fmin: float = 0.0  # Hz
    fmax: float = 11025.0  # Hz

    def __post_init__(self):
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(f"--fmin {self.fmin:g} --fmax {self.fmax:g}: need 0 <= fmin < fmax <= "
                             f"{self.sample_rate / 2:g} Hz, half the sample rate")

    @classmethod
    def of(cls, kind, fmin=None, fmax=None):
        """The named front end, `fmin` and `fmax` in Hz replacing its own band where given."""
        band = {key: float(value) for key, value in (("fmin", fmin), ("fmax", fmax)) if value is not None}
        if kind == "logmel":
            return cls(**band)
        if kind == "fbank":
            return cls(**{"kind": "fbank", "sample_rate": 16000, "n_fft": 512, "win_length": 400,
                          "hop_length": 160, "fmin": 20.0, "fmax": 8000.0, **band})
        raise ValueError(f"front end {kind!r}: logmel or fbank")

    def to_dict(self):
        return asdict(self)

    def frames(self, samples):
        """Frames of a clip of that many samples: LogMel centres its windows, Fbank has whole ones only."""
        if self.kind == "logmel":
            return 1 + samples // self.hop_length
        return 1 + (samples - self.win_length) // self.hop_length


class LogMel(nn.Module):
    """(B, samples) at 22,050 Hz -> (B, 128, 1 + samples // 512): 128 Slaney mels of the power spectrum, in
    dB against the clip's own maximum with an 80 dB floor, standardised per clip.

    Agrees with librosa 0.11: `power_to_db(melspectrogram(y, sr=22050, n_fft=2048, hop_length=512,
    n_mels=128), ref=np.max)`, then `(x - x.mean()) / (x.std() + 1e-6)`. Digital silence becomes all 0.
    """
    unit = "standardised dB"

    def __init__(self, config=FrontendConfig()):
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.win_length), persistent=False)
        bank, centres = slaney_bank(config)
        self.register_buffer("bank", bank, persistent=False)  # (n_fft / 2 + 1, n_mels)
        self.mel_hz = centres  # (n_mels,) centre frequencies

    def forward(self, wave):
        return _in_pieces(self._features, wave, self.config).transpose(1, 2)

    def _features(self, wave):
        """(B, samples) float32 -> (B, frames, n_mels)"""
        c = self.config
        spec = torch.stft(wave, c.n_fft, c.hop_length, c.win_length, self.window, center=True,
                          pad_mode="constant", return_complex=True)  # (B, n_fft / 2 + 1, frames)
        power = spec.real.square() + spec.imag.square()
        db = 10 * torch.matmul(power.transpose(1, 2), self.bank).clamp(min=1e-10).log10()
        peak = db.amax(dim=(1, 2), keepdim=True)  # each clip's own, so that its neighbours do not matter
        db = (db - peak).clamp(min=-80.0)
        centred = db - db.mean(dim=(1, 2), keepdim=True)
        return centred / (centred.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-6)

    def silence(self, spec):
        """What the quietest bin of each clip reads, (B, n_mels, frames) -> (B, 1, 1). Standardised per
        clip, there is no fixed value for silence."""
        return spec.amin(dim=(1, 2), keepdim=True)


class Fbank(nn.Module):
    """(B, samples) at 16 kHz in [-1, 1] -> (B, 128, 1 + (samples - 400) // 160): AudioSet's features.

    Agrees with `torchaudio.compliance.kaldi.fbank(htk_compat=True, sample_frequency=16000,
    use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)`, normalised
    with the AudioSet statistics of the authors' code: (x + 4.2677393) / (2 * 4.5689974).
    """
    unit = "normalised log energy"
    mean, std = -4.2677393, 4.5689974
    epsilon = torch.finfo(torch.float32).eps  # Kaldi's floor

    def __init__(self, config=FrontendConfig.of("fbank")):
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.win_length, periodic=False), persistent=False)
        bank, centres = kaldi_bank(config)
        self.register_buffer("bank", bank, persistent=False)  # (n_fft / 2 + 1, n_mels)
        self.mel_hz = centres

    def forward(self, wave):
        return _in_pieces(self._features, wave, self.config).transpose(1, 2)

    def _features(self, wave):
        """(B, samples) float32 -> (B, frames, n_mels)"""
        c = self.config
        frames = wave.unfold(1, c.win_length, c.hop_length)  # (B, frames, win_length)
        frames = frames - frames.mean(dim=2, keepdim=True)
        frames[..., 1:] -= 0.97 * frames[..., :-1]  # pre-emphasis; on the first sample the window is 0
        spec = torch.fft.rfft(frames.mul_(self.window), c.n_fft)
        power = spec.real.square() + spec.imag.square()
        mel = torch.matmul(power, self.bank).clamp(min=self.epsilon).log()
        return (mel - self.mean) / (2 * self.std)

    def silence(self, spec):
        """Digital silence after normalisation, -1.2776: (B, n_mels, frames) -> (B, 1, 1)."""
        return spec.new_full((len(spec), 1, 1), (math.log(self.epsilon) - self.mean) / (2 * self.std))


def build_frontend(config):
    return {"logmel": LogMel, "fbank": Fbank}[config.kind](config)


def _in_pieces(features, wave, config):
    """`features` of (B, samples) -> (B, frames, n_mels), in float32 whatever the autocast. A CPU takes a few clips
    at a time: a whole batch's spectra do not fit its cache."""
    with torch.autocast(wave.device.type, enabled=False):
        wave = wave.float()
        if torch.compiler.is_exporting():  # for batches of any size, and a loop over pieces is for one
            return features(wave)
        if wave.device.type != "cpu" and len(wave):  # no FFT takes an empty batch
            return features(wave)
        out = wave.new_empty(len(wave), config.frames(wave.shape[1]), config.n_mels)
        for i in range(0, len(wave), 4):  # more fall out of the cache, fewer leave two cores waiting for each other
            out[i:i + 4] = features(wave[i:i + 4])
        return out


def slaney_bank(config):
    """Triangular mel filters, (n_fft / 2 + 1, n_mels) float32, and their centres in Hz: linear below 1 kHz,
    logarithmic above, each of unit area (M. Slaney, Auditory Toolbox, 1998; librosa's default)."""
    log_step, edge = math.log(6.4) / 27, 15.0  # edge: 1 kHz in mel

    def to_mel(hz):
        return hz * 3 / 200 if hz < 1000 else edge + math.log(hz / 1000) / log_step

    mel = torch.linspace(to_mel(config.fmin), to_mel(config.fmax), config.n_mels + 2, dtype=torch.float64)
    hz = torch.where(mel < edge, mel * 200 / 3, 1000 * torch.exp(log_step * (mel - edge)))
    bins = torch.arange(config.n_fft // 2 + 1, dtype=torch.float64) * config.sample_rate / config.n_fft
    bank = _triangles(bins, hz) * (2 / (hz[2:] - hz[:-2]))
    return bank.float(), hz[1:-1].float()


def kaldi_bank(config):
    """Kaldi's mel filters, (n_fft / 2 + 1, n_mels) float32, and their centres in Hz: triangles that are
    straight on the mel axis, mel = 1127 ln(1 + hz / 700); the Nyquist bin is not used."""
    def to_mel(hz):
        return 1127 * torch.log1p(torch.as_tensor(hz, dtype=torch.float64) / 700)

    low, high = to_mel(config.fmin), to_mel(config.fmax)
    mel = low + (high - low) / (config.n_mels + 1) * torch.arange(config.n_mels + 2, dtype=torch.float64)
    bins = to_mel(torch.arange(config.n_fft // 2 + 1) * config.sample_rate / config.n_fft)
    bank = _triangles(bins, mel)
    bank[-1] = 0
    return bank.float(), (700 * torch.expm1(mel[1:-1] / 1127)).float()


def _triangles(bins, edges):
    """(len(bins), len(edges) - 2): 0 at edges[i], 1 at edges[i + 1], 0 at edges[i + 2]."""
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)
