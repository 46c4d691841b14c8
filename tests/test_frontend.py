"""Front ends against librosa and torchaudio's Kaldi on real recordings and made ones."""
import librosa
import numpy as np
import pytest
import torch
import torchaudio

from data.audio import read
from model.frontend import Fbank, FrontendConfig, LogMel, build_frontend


def librosa_logmel(wave, **band):
    mel = librosa.feature.melspectrogram(y=wave, sr=22050, n_fft=2048, hop_length=512, n_mels=128, **band)
    db = librosa.power_to_db(mel, ref=np.max)
    return (db - db.mean()) / (db.std() + 1e-6)


def kaldi_fbank(wave):
    fbank = torchaudio.compliance.kaldi.fbank(
        torch.as_tensor(wave)[None], htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning",
        num_mel_bins=128, dither=0.0, frame_shift=10)
    return ((fbank + 4.2677393) / (2 * 4.5689974)).T.numpy()


def test_logmel_is_librosas(real_clips):
    for path in real_clips:
        wave = read(path, 22050, 0, 88200)
        ours = LogMel()(torch.from_numpy(wave)[None])[0].numpy()
        assert ours.shape == (128, 1 + len(wave) // 512)
        np.testing.assert_allclose(ours, librosa_logmel(wave), atol=2e-3)


def test_logmel_band(real_clips):
    wave = read(real_clips[0], 22050, 0, 88200)
    ours = LogMel(FrontendConfig.of("logmel", fmin=300, fmax=8000))(torch.from_numpy(wave)[None])[0].numpy()
    np.testing.assert_allclose(ours, librosa_logmel(wave, fmin=300, fmax=8000), atol=2e-3)


def test_fbank_is_kaldis(real_clips):
    for path in real_clips:
        wave = read(path, 16000, 0, 64000)
        ours = Fbank()(torch.from_numpy(wave)[None])[0].numpy()
        np.testing.assert_allclose(ours, kaldi_fbank(wave), atol=1e-3)


def test_shapes_of_a_4_second_clip():
    assert LogMel()(torch.randn(2, 88200)).shape == (2, 128, 173)
    assert Fbank()(torch.randn(2, 64000)).shape == (2, 128, 398)
    assert FrontendConfig.of("logmel").frames(88200) == 173
    assert FrontendConfig.of("fbank").frames(64000) == 398


@pytest.mark.parametrize("kind", ["logmel", "fbank"])
def test_a_clip_in_a_batch_equals_the_clip_alone(kind):
    frontend = build_frontend(FrontendConfig.of(kind))
    wave = torch.randn(40, 40000) * torch.tensor([1.0, 1e-3, 0.3, 1e-5]).repeat(10)[:, None]
    alone = torch.cat([frontend(clip[None]) for clip in wave])
    for batch in (1, 7, 40):
        torch.testing.assert_close(frontend(wave[:batch]), alone[:batch], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["logmel", "fbank"])
def test_an_empty_batch(kind):
    config = FrontendConfig.of(kind)
    assert build_frontend(config)(torch.zeros(0, 40000)).shape == (0, 128, config.frames(40000))


@pytest.mark.parametrize("kind", ["logmel", "fbank"])
def test_the_gradient_reaches_the_waveform_and_the_waveform_stays(kind):
    wave = torch.randn(3, 8000, requires_grad=True)
    before = wave.detach().clone()
    build_frontend(FrontendConfig.of(kind))(wave).square().sum().backward()
    assert torch.isfinite(wave.grad).all() and (wave.grad != 0).any(dim=1).all()
    assert torch.equal(wave, before)


@pytest.mark.parametrize("kind", ["logmel", "fbank"])
def test_float32_inside_autocast(kind):
    frontend = build_frontend(FrontendConfig.of(kind))
    wave = torch.randn(2, 40000)
    with torch.autocast("cpu", torch.bfloat16):
        inside = frontend(wave)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, frontend(wave), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["logmel", "fbank"])
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


def test_config_round_trip_and_bad_bands():
    config = FrontendConfig.of("fbank", fmax=7000)
    assert FrontendConfig(**config.to_dict()) == config
    for fmin, fmax in ((500, 400), (0, 9000), (-1, 4000)):
        with pytest.raises(ValueError, match="--fmin"):
            FrontendConfig.of("fbank", fmin, fmax)
