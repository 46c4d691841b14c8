"""Random numbers of clips, and the augmentations."""
import numpy as np
import torch
from scipy import stats
from scipy.signal import butter, freqz

from data.augment import Augment, _filter_response
from data.clip_rng import Purpose, uniform


def test_random_numbers_are_uniform_and_independent():
    clip_ids = np.arange(5000)
    u = uniform(0, 3, clip_ids, Purpose.CROP, 4)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    columns = np.c_[
        u,
        uniform(0, 4, clip_ids, Purpose.CROP, 2),  # another epoch
        uniform(0, 3, clip_ids, Purpose.MIXUP, 2),  # another purpose
        uniform(1, 3, clip_ids, Purpose.CROP, 2),  # another seed
        np.roll(u[:, :1], 1),  # another clip
    ]
    correlation = np.corrcoef(columns.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.06
    assert len(np.unique(uniform(0, 0, np.arange(100000), Purpose.CROP, 1))) == 100000


def test_random_numbers_do_not_depend_on_the_batch():
    together = uniform(7, 2, [5, 9, 1000000], Purpose.CROP, 3)
    assert np.array_equal(together[1:2], uniform(7, 2, [9], Purpose.CROP, 3))
    assert np.array_equal(together[:, :1], uniform(7, 2, [5, 9, 1000000], Purpose.CROP, 1))


def test_random_numbers_are_frozen():
    """A change would change the results of every run that is resumed."""
    assert uniform(0, 0, [0], Purpose.CROP, 1)[0, 0] == 0.8704734066832014
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "CROP": 0, "MIXUP": 1, "SPEC_AUGMENT": 2, "DROP_PATH": 3, "ORDER": 4, "SHIFT": 5,
        "PATCHOUT": 6, "GAIN": 7, "NOISE": 8, "FILTER": 9,
    }


def test_spec_augment_masks_one_band_and_one_range_of_frames():
    augment = Augment(freq_mask=15, time_mask=35, specaug_p=0.8)
    spec = torch.rand(400, 128, 173) + 1
    silence = -torch.arange(1, 401.0)[:, None, None]
    out = augment.spec_augment(spec, silence, 0, np.arange(400))
    changed = out != spec
    assert torch.equal(out[changed], silence.expand_as(spec)[changed])
    bands, frames = changed.all(dim=2), changed.all(dim=1)  # (400, 128), (400, 173)
    assert torch.equal(changed, bands[:, :, None] | frames[:, None, :])
    for mask, widest in ((bands, 15), (frames, 35)):
        assert mask.sum(1).max() == widest
        n_ranges = (mask & ~mask.roll(1, 1)).sum(1)
        assert n_ranges.max() == 1
    share = changed.flatten(1).any(1).float().mean().item()
    assert 0.70 < share < 0.86  # 0.8, less a few clips whose masks both have width 0
    assert torch.equal(out[3:5], augment.spec_augment(spec[3:5], silence[3:5], 0, [3, 4]))


def test_mixup_mixes_waves_and_labels_alike():
    n = 1000
    wave = target = torch.eye(n)  # clip i is 1 at sample i, so the samples show the shares
    mixed, soft = Augment(mixup_alpha=0.4, mixup_p=0.6, seed=1).mixup(wave, target, 5, np.arange(n))
    assert torch.equal(mixed, soft)
    torch.testing.assert_close(soft.sum(1), torch.ones(n))
    own = soft.diagonal()
    following = soft[torch.arange(n), (torch.arange(n) + 1) % n]
    torch.testing.assert_close(following, 1 - own)
    assert own.min() >= 0.5
    assert 0.54 < (own < 1).float().mean() < 0.66
    beta = stats.beta(0.4, 0.4).rvs(5000, random_state=0)
    assert stats.ks_2samp(own[own < 1].numpy(), np.maximum(beta, 1 - beta)).pvalue > 1e-3


def test_mixup_leaves_a_batch_of_one_clip():
    wave, target = torch.rand(1, 50), torch.eye(3)[:1]
    mixed, soft = Augment(mixup_alpha=1.0, mixup_p=1.0).mixup(wave, target, 0, [0])
    assert torch.equal(mixed, wave)
    assert torch.equal(soft, target)


def test_by_default_every_augmentation_is_off():
    augment, ids = Augment(), [0, 1, 2]
    wave, target, spec = torch.rand(3, 50), torch.eye(3), torch.rand(3, 8, 9)
    assert augment.random_gain(wave, 0, ids) is wave
    assert augment.random_shift(wave, 0, ids) is wave
    assert augment.add_noise(wave, None, 0, ids) is wave
    assert augment.random_filter(wave, 0, ids) is wave
    mixed, soft = augment.mixup(wave, target, 0, ids)
    assert mixed is wave
    assert soft is target
    assert augment.spec_augment(spec, None, 0, ids) is spec


def test_random_shift_rolls_each_clip_by_its_own_amount():
    wave = torch.arange(50.0).expand(300, 50)
    out = Augment(shift_p=0.5).random_shift(wave, 2, np.arange(300))
    shifts = out.argmin(1)  # where sample 0 is now
    for shifted, original, shift in zip(out, wave, shifts.tolist()):
        assert torch.equal(shifted, torch.roll(original, shift))
    assert 0.42 < (shifts > 0).float().mean() < 0.58
    assert len(shifts.unique()) > 40
    assert torch.equal(out[7:9], Augment(shift_p=0.5).random_shift(wave[7:9], 2, [7, 8]))


def test_random_gain_is_uniform_in_decibels():
    wave = torch.randn(500, 100)
    out = Augment(gain=6.0).random_gain(wave, 0, np.arange(500))
    db = 20 * (out / wave).mean(1).log10()
    torch.testing.assert_close(out, wave * 10 ** (db / 20)[:, None])
    assert stats.kstest(db.numpy(), stats.uniform(-6, 12).cdf).pvalue > 1e-3


def test_noise_is_the_quietest_eighth_at_the_drawn_ratio():
    generator = torch.Generator().manual_seed(0)
    wave = torch.randn(200, 8000, generator=generator)
    noise = torch.randn(200, 8000, generator=generator)
    noise[:, 3000:4500] *= 0.01
    noise[100:, 3000:4500] = 0  # digital silence does not count as noise
    noise[150:] = 0
    augment = Augment(noise_snr=(0.0, 20.0))
    added = (augment.add_noise(wave, noise, 2, np.arange(200)) - wave).double()
    snr = 10 * (wave.double().square().mean(1) / added.square().mean(1)).log10()
    assert snr[:150].min() > -0.6
    assert snr[:150].max() < 20.6
    assert snr[:150].std() > 4
    assert (added[150:] == 0).all()
    eighth = added[:, :1000] / added[:, :1000].abs().amax(1, keepdim=True)
    for i in (0, 7, 120):
        places = noise[i].double().unfold(0, 1000, 1)  # (7001, 1000)
        similarity = torch.cosine_similarity(places, eighth[i][None], dim=1)
        matches = torch.nonzero(similarity > 0.99)[:, 0].tolist()
        assert len(matches) == 1
        if i < 100:
            assert 3000 <= matches[0] <= 3500
        else:
            assert not 2000 < matches[0] < 4500
        backwards = added[i, 1000:2000].flip(0)
        torch.testing.assert_close(backwards, added[i, :1000], atol=1e-4, rtol=1e-3)


def test_filters_against_scipys_butterworth():
    rate, samples = 16000, 16000
    impulse = torch.zeros(300, samples)
    impulse[:, 0] = 1
    out = Augment(filter_p=0.7, sample_rate=rate).random_filter(impulse, 0, np.arange(300))
    responses = torch.fft.rfft(out.double()).abs().numpy()  # (300, samples // 2 + 1)
    hz = np.arange(samples // 2 + 1)
    unfiltered = np.abs(responses - 1).max(1) < 1e-4
    assert 0.2 < unfiltered.mean() < 0.4
    n_filters = {"low": 0, "high": 0}
    for response in responses[~unfiltered]:
        kind = "low" if response[0] > 0.5 else "high"
        n_filters[kind] += 1
        cutoff = hz[np.argmin(np.abs(response - 0.5**0.5))]
        lowest, highest = (1000, 5334) if kind == "low" else (49, 1001)
        assert lowest <= cutoff <= highest
        if cutoff < 1500:
            compared = hz[(hz > 10) & (hz < 6000)]  # above, scipy's digital filter is warped
            b, a = butter(2, cutoff, kind, fs=rate)
            expected = np.abs(freqz(b, a, compared, fs=rate)[1])
            assert np.abs(response[compared] - expected).max() < 0.06
    assert min(n_filters.values()) > 70


def test_filters_on_a_gpu_are_those_on_a_cpu():
    """The formula takes arrays on a CPU and tensors on a GPU."""
    rng = np.random.default_rng(0)
    numbers = np.stack([rng.uniform(50, 7000, 40), rng.integers(0, 2, 40), rng.integers(0, 2, 40)])
    numbers = numbers[:, :, None]
    expected = _filter_response(np.fft.rfftfreq(16001, 1 / 16000), *numbers)
    hz = torch.fft.rfftfreq(16001, 1 / 16000, dtype=torch.float64)
    response = _filter_response(hz, *torch.from_numpy(numbers))
    assert response.shape == expected.shape == (40, 8001)
    np.testing.assert_allclose(response.numpy(), expected, rtol=1e-12, atol=1e-15)
