"""Random numbers that belong to the clip, SpecAugment and MixUp."""
import numpy as np
import torch
from scipy import stats

from data.augment import Augment
from data.draws import CROP, MIX, uniform


def test_draws_are_uniform_and_independent():
    u = uniform(0, 3, np.arange(5000), CROP, 4)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(np.c_[u, uniform(0, 4, np.arange(5000), CROP, 2), uniform(0, 3, np.arange(5000), MIX, 2),
                                    uniform(1, 3, np.arange(5000), CROP, 2), np.roll(u[:, :1], 1)].T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.06
    assert len(np.unique(uniform(0, 0, np.arange(100000), CROP, 1))) == 100000


def test_draws_belong_to_the_clip():
    together = uniform(7, 2, [5, 9, 1000000], CROP, 3)
    assert np.array_equal(together[1:2], uniform(7, 2, [9], CROP, 3))
    assert np.array_equal(together[:, :1], uniform(7, 2, [5, 9, 1000000], CROP, 1))
    assert uniform(0, 0, [0], CROP, 1)[0, 0] == 0.8704734066832014  # frozen: a change would break every resume


def test_spec_augment_covers_one_band_and_one_stretch_with_silence():
    augment = Augment(freq_mask=15, time_mask=35, specaug_p=0.8)
    spec = torch.rand(400, 128, 173) + 1
    silence = -torch.arange(1, 401.0)[:, None, None]
    out = augment.spec_augment(spec, silence, 0, np.arange(400))
    changed = out != spec
    assert torch.equal(out[changed], silence.expand_as(spec)[changed])
    bands, stretches = changed.all(dim=2), changed.all(dim=1)  # (400, 128), (400, 173)
    assert torch.equal(changed, bands[:, :, None] | stretches[:, None, :])
    for mask, widest in ((bands, 15), (stretches, 35)):
        assert mask.sum(1).max() == widest
        starts = (mask & ~mask.roll(1, 1)).sum(1)  # one stretch each
        assert starts.max() == 1
    share = changed.flatten(1).any(1).float().mean().item()
    assert 0.70 < share < 0.86  # 0.8, less the few of width 0 twice
    assert torch.equal(out[3:5], augment.spec_augment(spec[3:5], silence[3:5], 0, [3, 4]))


def test_mixup_mixes_waves_and_labels_alike():
    augment = Augment(mixup_alpha=0.4, mixup_p=0.6, seed=1)
    n = 1000
    wave = torch.eye(n)  # clip i is 1 at sample i, so that the share can be read off
    target = torch.eye(n)
    mixed, soft = augment.mixup(wave, target, 5, np.arange(n))
    assert torch.equal(mixed, soft)
    torch.testing.assert_close(soft.sum(1), torch.ones(n))
    own = soft.diagonal()
    torch.testing.assert_close(soft[torch.arange(n), (torch.arange(n) + 1) % n], 1 - own)
    assert own.min() >= 0.5 and 0.54 < (own < 1).float().mean() < 0.66
    shares = own[own < 1].numpy()
    draw = stats.beta(0.4, 0.4).rvs(5000, random_state=0)
    assert stats.ks_2samp(shares, np.maximum(draw, 1 - draw)).pvalue > 1e-3


def test_off_is_off():
    wave, target, spec = torch.rand(3, 50), torch.eye(3), torch.rand(3, 8, 9)
    mixed, soft = Augment().mixup(wave, target, 0, [0, 1, 2])
    assert mixed is wave and soft is target and Augment().spec_augment(spec, None, 0, [0, 1, 2]) is spec
    one = Augment(mixup_alpha=1.0, mixup_p=1.0).mixup(wave[:1], target[:1], 0, [0])
    assert one[0] is not None and torch.equal(one[0], wave[:1])


def test_shift_turns_each_clip_by_its_own_amount():
    wave = torch.arange(50.0).expand(300, 50)
    out = Augment(shift_p=0.5).shift(wave, 2, np.arange(300))
    by = out.argmin(1)  # where sample 0 went
    assert all(torch.equal(o, torch.roll(w, int(k))) for o, w, k in zip(out, wave, by, strict=True))
    assert 0.42 < (by > 0).float().mean() < 0.58 and len(by.unique()) > 40
    assert torch.equal(out[7:9], Augment(shift_p=0.5).shift(wave[7:9], 2, [7, 8]))


def test_gain_lies_within_its_decibels():
    wave = torch.randn(500, 100)
    out = Augment(gain=6.0).louder(wave, 0, np.arange(500))
    db = 20 * (out / wave).mean(1).log10()
    torch.testing.assert_close(out, wave * 10 ** (db / 20)[:, None])
    assert stats.kstest(db.numpy(), stats.uniform(-6, 12).cdf).pvalue > 1e-3


def test_background_is_the_quietest_stretch_at_the_drawn_ratio():
    generator = torch.Generator().manual_seed(0)
    wave = torch.randn(200, 8000, generator=generator)
    noise = torch.randn(200, 8000, generator=generator)
    noise[:, 3000:4500] *= 0.01
    noise[100:, 3000:4500] = 0  # digital silence is no noise
    noise[150:] = 0
    augment = Augment(noise_snr=(0.0, 20.0))
    added = (augment.background(wave, noise, 2, np.arange(200)) - wave).double()
    snr = 10 * (wave.double().square().mean(1) / added.square().mean(1)).log10()
    assert -0.6 < snr[:150].min() and snr[:150].max() < 20.6 and snr[:150].std() > 4
    assert (added[150:] == 0).all()
    stretch = added[:, :1000] / added[:, :1000].abs().amax(1, keepdim=True)
    for i in (0, 7, 120):  # found again in the noise, and turned around after it
        places = noise[i].double().unfold(0, 1000, 1)  # (7001, 1000)
        fits = torch.nonzero(torch.cosine_similarity(places, stretch[i][None], dim=1) > 0.99)[:, 0].tolist()
        assert len(fits) == 1 and (3000 <= fits[0] <= 3500 if i < 100 else not 2000 < fits[0] < 4500)
        torch.testing.assert_close(added[i, 1000:2000].flip(0), added[i, :1000], atol=1e-4, rtol=1e-3)
    assert torch.equal(augment.background(wave, None, 2, np.arange(200)), wave)


def test_filters_against_scipys_butterworth():
    from scipy.signal import butter, freqz
    rate, samples = 16000, 16000
    impulse = torch.zeros(300, samples)
    impulse[:, 0] = 1
    out = Augment(filter_p=0.7, rate=rate).filtered(impulse, 0, np.arange(300))
    response = torch.fft.rfft(out.double()).abs().numpy()
    hz = np.arange(samples // 2 + 1)
    untouched = np.abs(response - 1).max(1) < 1e-4
    assert 0.2 < untouched.mean() < 0.4
    kinds = {"low": 0, "high": 0}
    for one in response[~untouched]:
        kind = "low" if one[0] > 0.5 else "high"
        cutoff = hz[np.argmin(np.abs(one - 0.5**0.5))]
        assert (1000 <= cutoff <= 5334) if kind == "low" else (49 <= cutoff <= 1001)
        kinds[kind] += 1
        at = hz[(hz > 10) & (hz < 6000)]  # above, the digital filter's response is warped
        b, a = butter(2, cutoff, kind, fs=rate)
        want = np.abs(freqz(b, a, at, fs=rate)[1])
        if cutoff < 1500:
            assert np.abs(one[at] - want).max() < 0.06
    assert min(kinds.values()) > 70


def test_what_is_off_changes_nothing():
    wave = torch.randn(3, 1000)
    assert Augment().louder(wave, 0, np.arange(3)) is wave and Augment().filtered(wave, 0, np.arange(3)) is wave
