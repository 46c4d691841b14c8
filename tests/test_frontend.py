"""Front ends against librosa and torchaudio's Kaldi, on real and synthetic recordings."""
import librosa
import numpy as np
import pytest
import torch
import torchaudio

from data.audio import read
from model.frontend import FRONTENDS, Fbank, Frontend, FrontendConfig, LogMel, build_frontend


def librosa_logmel(wave, **band):
    mel = librosa.feature.melspectrogram(
        y=wave, sr=22050, n_fft=2048, hop_length=512, n_mels=128, **band)
    db = librosa.power_to_db(mel, ref=np.max)
    return (db - db.mean()) / (db.std() + 1e-6)


def kaldi_fbank(wave):
    fbank = torchaudio.compliance.kaldi.fbank(
        torch.as_tensor(wave)[None], htk_compat=True, sample_frequency=16000, use_energy=False,
        window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)
    return ((fbank + 4.2677393) / (2 * 4.5689974)).T.numpy()


def features(frontend, wave):
    return frontend(torch.from_numpy(wave)[None])[0].numpy()


def test_logmel_agrees_with_librosa(real_clips):
    for path in real_clips:
        wave = read(path, 22050, 0, 88200)
        ours = features(LogMel(), wave)
        assert ours.shape == (128, 1 + len(wave) // 512)
        np.testing.assert_allclose(ours, librosa_logmel(wave), atol=2e-3)


def test_logmel_of_a_band_agrees_with_librosa(real_clips):
    wave = read(real_clips[0], 22050, 0, 88200)
    ours = features(LogMel(FrontendConfig.of("logmel", fmin=300, fmax=8000)), wave)
    np.testing.assert_allclose(ours, librosa_logmel(wave, fmin=300, fmax=8000), atol=2e-3)


def test_fbank_agrees_with_kaldi(real_clips):
    for path in real_clips:
        wave = read(path, 16000, 0, 64000)
        np.testing.assert_allclose(features(Fbank(), wave), kaldi_fbank(wave), atol=1e-3)


def test_centre_frequencies_agree_with_librosa_and_kaldi():
    expected = librosa.mel_frequencies(130, fmin=0, fmax=11025)[1:-1]
    np.testing.assert_allclose(LogMel().mel_hz.numpy(), expected, rtol=1e-5)
    _, expected = torchaudio.compliance.kaldi.get_mel_banks(
        128, 512, 16000, 20.0, 8000.0, vtln_low=100.0, vtln_high=-500.0, vtln_warp_factor=1.0)
    np.testing.assert_allclose(Fbank().mel_hz.numpy(), expected[:, 0].numpy(), rtol=1e-4)


def test_shapes_of_a_4_second_clip():
    assert LogMel()(torch.randn(2, 88200)).shape == (2, 128, 173)
    assert Fbank()(torch.randn(2, 64000)).shape == (2, 128, 398)
    assert FrontendConfig.of("logmel").frames(88200) == 173
    assert FrontendConfig.of("fbank").frames(64000) == 398


@pytest.mark.parametrize("kind", FRONTENDS)
def test_a_clip_in_a_batch_equals_the_clip_alone(kind):
    frontend = build_frontend(FrontendConfig.of(kind))
    loudness = torch.tensor([1.0, 1e-3, 0.3, 1e-5]).repeat(10)
    wave = torch.randn(40, 40000) * loudness[:, None]
    alone = torch.cat([frontend(clip[None]) for clip in wave])
    for batch in (1, 7, 40):
        torch.testing.assert_close(frontend(wave[:batch]), alone[:batch], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", FRONTENDS)
def test_an_empty_batch(kind):
    config = FrontendConfig.of(kind)
    spec = build_frontend(config)(torch.zeros(0, 40000))
    assert spec.shape == (0, 128, config.frames(40000))


@pytest.mark.parametrize("kind", FRONTENDS)
def test_the_gradient_reaches_the_waveform_and_the_waveform_does_not_change(kind):
    wave = torch.randn(3, 8000, requires_grad=True)
    before = wave.detach().clone()
    build_frontend(FrontendConfig.of(kind))(wave).square().sum().backward()
    assert torch.isfinite(wave.grad).all() and (wave.grad != 0).any(dim=1).all()
    assert torch.equal(wave, before)


@pytest.mark.parametrize("kind", FRONTENDS)
def test_computes_in_float32_under_autocast(kind):
    frontend = build_frontend(FrontendConfig.of(kind))
    wave = torch.randn(2, 40000)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = frontend(wave)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, frontend(wave), atol=0, rtol=0)


@pytest.mark.parametrize("kind", FRONTENDS)
def test_digital_silence_is_finite(kind):
    frontend = build_frontend(FrontendConfig.of(kind))
    assert torch.isfinite(frontend(torch.zeros(1, 40000))).all()


def test_value_of_silence():
    wave = torch.cat([torch.zeros(1, 32000), torch.randn(1, 32000)], dim=1)
    spec = Fbank()(wave)
    assert Fbank().silence(spec).item() == pytest.approx(-1.2776, abs=1e-4)
    assert spec[0, :, 5].max().item() == pytest.approx(-1.2776, abs=1e-4)
    spec = LogMel()(wave)
    assert LogMel().silence(spec).item() == spec.min().item()


def test_config_round_trip_and_invalid_bands():
    config = FrontendConfig.of("fbank", fmax=7000)
    assert FrontendConfig(**config.to_dict()) == config
    for fmin, fmax in ((500, 400), (0, 9000), (-1, 4000)):
        with pytest.raises(ValueError, match="--fmin"):
            FrontendConfig.of("fbank", fmin, fmax)


def test_an_unknown_kind_is_refused():
    for use in (FrontendConfig.of, lambda kind: build_frontend(FrontendConfig(kind)),
                lambda kind: FrontendConfig(kind).frames(1000)):
        with pytest.raises(ValueError, match=r"wavelet.*logmel"):
            use("wavelet")


def test_a_front_end_of_ones_own_needs_only_an_entry_in_the_table(monkeypatch):
    class Energy(Frontend):
        defaults = FrontendConfig(kind="energy", sample_rate=8000, win_length=80, hop_length=80,
                                  n_mels=1, fmax=4000.0)
        unit = "energy"
        mel_hz = torch.tensor([2000.0])

        @staticmethod
        def n_frames(config, samples):
            return samples // config.hop_length

        def compute(self, wave):
            return wave.unfold(1, 80, 80).square().mean(dim=2, keepdim=True)

    monkeypatch.setitem(FRONTENDS, "energy", Energy)
    config = FrontendConfig.of("energy", fmax=3000)
    assert config.sample_rate == 8000 and config.fmax == 3000.0 and config.frames(8000) == 100
    spec = build_frontend(FrontendConfig(**config.to_dict()))(torch.ones(5, 8000))
    assert torch.equal(spec, torch.ones(5, 1, 100))
