"""Waveforms to spectrograms on the training device: (B, samples) -> (B, n_mels, frames).

`LogMel` agrees with librosa. `Fbank` has AudioSet's features and agrees with
`torchaudio.compliance.kaldi.fbank`. To add a front end, write a subclass of `Frontend` and list it
in `FRONTENDS`; the command line takes its choices from there.
"""
import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FrontendConfig:
    """Settings of a front end; `build_frontend(FrontendConfig(**config.to_dict()))` rebuilds it."""
    kind: str = "logmel"  # a key of FRONTENDS
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
    def of(cls, kind: str, fmin: float | None = None,
           fmax: float | None = None) -> "FrontendConfig":
        """The defaults of the front end `kind`; `fmin` and `fmax` in Hz replace its band."""
        band = {"fmin": fmin, "fmax": fmax}
        band = {name: float(hz) for name, hz in band.items() if hz is not None}
        return replace(_class_of(kind).defaults, **band)

    def to_dict(self) -> dict:
        return asdict(self)

    def frames(self, samples: int) -> int:
        """Number of frames that a clip of `samples` samples gives."""
        return _class_of(self.kind).n_frames(self, samples)


class Frontend(nn.Module):
    """Base class: (B, samples) in [-1, 1] -> (B, n_mels, frames) with a mean of about 0.

    Computes in float32 even under autocast. The result for a clip does not depend on its neighbours
    in the batch. A subclass has `defaults`, `unit`, `n_frames`, `compute` and `silence`, and sets
    `mel_hz` when it is built.
    """
    defaults: FrontendConfig
    unit: str  # of the values, for pictures
    mel_hz: Tensor  # (n_mels,) centre frequencies in Hz

    def __init__(self, config: FrontendConfig | None = None):
        super().__init__()
        self.config = config or self.defaults

    @staticmethod
    def n_frames(config: FrontendConfig, samples: int) -> int:
        raise NotImplementedError

    def compute(self, wave: Tensor) -> Tensor:
        """(B, samples) float32 -> (B, frames, n_mels)."""
        raise NotImplementedError

    def silence(self, spec: Tensor) -> Tensor:
        """The value that silence has in each clip: (B, n_mels, frames) -> (B, 1, 1)."""
        raise NotImplementedError

    def forward(self, wave: Tensor) -> Tensor:
        with torch.autocast(wave.device.type, enabled=False):
            wave = wave.float()
            # A GPU takes the batch at once, but no FFT takes an empty one. An exported graph must
            # work for any batch size, which a Python loop would fix.
            at_once = wave.device.type != "cpu" and len(wave) > 0
            if at_once or torch.compiler.is_exporting():
                features = self.compute(wave)
            else:
                features = self._compute_in_chunks(wave)
        return features.transpose(1, 2)

    def _compute_in_chunks(self, wave, size=4):
        """For a CPU: larger chunks fall out of its cache, smaller ones leave cores idle."""
        frames = self.config.frames(wave.shape[1])
        out = wave.new_empty(len(wave), frames, self.config.n_mels)
        for i in range(0, len(wave), size):
            out[i:i + size] = self.compute(wave[i:i + size])
        return out


class LogMel(Frontend):
    """(B, samples) at 22,050 Hz -> (B, 128, 1 + samples // 512), standardised per clip.

    128 Slaney mels of the power spectrum, in dB relative to the clip's maximum, floor at -80 dB.
    Agrees with librosa 0.11: `power_to_db(melspectrogram(y, sr=22050, n_fft=2048, hop_length=512,
    n_mels=128), ref=np.max)`, then `(x - x.mean()) / (x.std() + 1e-6)`. Digital silence becomes 0.
    """
    defaults = FrontendConfig()
    unit = "standardised dB"

    def __init__(self, config: FrontendConfig | None = None):
        super().__init__(config)
        window = torch.hann_window(self.config.win_length)
        bank, self.mel_hz = slaney_bank(self.config)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("bank", bank, persistent=False)  # (n_fft / 2 + 1, n_mels)

    @staticmethod
    def n_frames(config: FrontendConfig, samples: int) -> int:
        return 1 + samples // config.hop_length  # windows are centred, so the first is half padding

    def compute(self, wave: Tensor) -> Tensor:
        c = self.config
        spec = torch.stft(wave, c.n_fft, c.hop_length, c.win_length, self.window, center=True,
                          pad_mode="constant", return_complex=True)  # (B, n_fft / 2 + 1, frames)
        power = spec.real.square() + spec.imag.square()
        db = 10 * torch.matmul(power.transpose(1, 2), self.bank).clamp(min=1e-10).log10()
        peak = db.amax(dim=(1, 2), keepdim=True)  # per clip: its neighbours must not matter
        db = (db - peak).clamp(min=-80.0)
        centred = db - db.mean(dim=(1, 2), keepdim=True)
        return centred / (centred.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-6)

    def silence(self, spec: Tensor) -> Tensor:
        """The clip's minimum: after standardisation per clip, silence has no fixed value."""
        return spec.amin(dim=(1, 2), keepdim=True)


class Fbank(Frontend):
    """(B, samples) at 16 kHz -> (B, 128, 1 + (samples - 400) // 160): AudioSet's features.

    Agrees with `torchaudio.compliance.kaldi.fbank(htk_compat=True, sample_frequency=16000,
    use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)`, then
    normalised by the AudioSet statistics of the AST authors: (x + 4.2677393) / (2 * 4.5689974).
    """
    defaults = FrontendConfig(kind="fbank", sample_rate=16000, n_fft=512, win_length=400,
                              hop_length=160, fmin=20.0, fmax=8000.0)
    unit = "normalised log energy"
    mean, std = -4.2677393, 4.5689974
    epsilon = torch.finfo(torch.float32).eps  # Kaldi's floor of the energy

    def __init__(self, config: FrontendConfig | None = None):
        super().__init__(config)
        window = torch.hann_window(self.config.win_length, periodic=False)
        bank, self.mel_hz = kaldi_bank(self.config)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("bank", bank, persistent=False)  # (n_fft / 2 + 1, n_mels)

    @staticmethod
    def n_frames(config: FrontendConfig, samples: int) -> int:
        return 1 + (samples - config.win_length) // config.hop_length  # whole windows only

    def compute(self, wave: Tensor) -> Tensor:
        c = self.config
        frames = wave.unfold(1, c.win_length, c.hop_length)  # (B, frames, win_length)
        frames = frames - frames.mean(dim=2, keepdim=True)
        frames[..., 1:] -= 0.97 * frames[..., :-1]  # pre-emphasis; the window zeroes sample 0
        spec = torch.fft.rfft(frames.mul_(self.window), c.n_fft)
        power = spec.real.square() + spec.imag.square()
        mel = torch.matmul(power, self.bank).clamp(min=self.epsilon).log()
        return (mel - self.mean) / (2 * self.std)

    def silence(self, spec: Tensor) -> Tensor:
        """Digital silence after normalisation: -1.2776."""
        value = (math.log(self.epsilon) - self.mean) / (2 * self.std)
        return spec.new_full((len(spec), 1, 1), value)


FRONTENDS: dict[str, type[Frontend]] = {"logmel": LogMel, "fbank": Fbank}


def build_frontend(config: FrontendConfig) -> Frontend:
    return _class_of(config.kind)(config)


def _class_of(kind):
    if kind not in FRONTENDS:
        raise ValueError(f"front end {kind!r}: use {' or '.join(FRONTENDS)}")
    return FRONTENDS[kind]


def slaney_bank(config: FrontendConfig) -> tuple[Tensor, Tensor]:
    """Mel filters (n_fft / 2 + 1, n_mels) and their centres (n_mels,) in Hz, both float32.

    Triangles of unit area; the mel scale is linear below 1 kHz and logarithmic above (M. Slaney,
    Auditory Toolbox, 1998; librosa's default).
    """
    mel_of_1khz = 15.0  # 3 mels are 200 Hz below
    log_step = math.log(6.4) / 27

    def hz_to_mel(hz: float) -> float:
        if hz < 1000:
            return hz * 3 / 200
        return mel_of_1khz + math.log(hz / 1000) / log_step

    low, high = hz_to_mel(config.fmin), hz_to_mel(config.fmax)
    mel = torch.linspace(low, high, config.n_mels + 2, dtype=torch.float64)
    above = 1000 * torch.exp(log_step * (mel - mel_of_1khz))
    edges = torch.where(mel < mel_of_1khz, mel * 200 / 3, above)
    bank = _triangles(_bin_hz(config), edges) * (2 / (edges[2:] - edges[:-2]))
    return bank.float(), edges[1:-1].float()


def kaldi_bank(config: FrontendConfig) -> tuple[Tensor, Tensor]:
    """Mel filters (n_fft / 2 + 1, n_mels) and their centres (n_mels,) in Hz, both float32.

    Triangles on the mel axis, mel = 1127 ln(1 + hz / 700), as in Kaldi's fbank.
    """
    def hz_to_mel(hz: float | Tensor) -> Tensor:
        return 1127 * torch.log1p(torch.as_tensor(hz, dtype=torch.float64) / 700)

    low, high = hz_to_mel(config.fmin), hz_to_mel(config.fmax)
    step = (high - low) / (config.n_mels + 1)
    edges = low + step * torch.arange(config.n_mels + 2, dtype=torch.float64)
    bank = _triangles(hz_to_mel(_bin_hz(config)), edges)
    bank[-1] = 0  # Kaldi ignores the Nyquist bin
    return bank.float(), (700 * torch.expm1(edges[1:-1] / 1127)).float()


def _bin_hz(config):
    """Frequencies of the FFT bins, (n_fft / 2 + 1,) float64."""
    bins = torch.arange(config.n_fft // 2 + 1, dtype=torch.float64)
    return bins * config.sample_rate / config.n_fft


def _triangles(bins, edges):
    """(bins, filters): filter i is 1 at edges[i + 1] and 0 at edges[i] and edges[i + 2]."""
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)
