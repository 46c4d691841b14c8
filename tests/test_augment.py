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
