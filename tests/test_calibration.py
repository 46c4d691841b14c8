"""Temperature, thresholds and reliability against torch, scikit-learn and a loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from metrics import (
    MAX_TEMPERATURE,
    apply_temperature,
    calibrate,
    check_calibration,
    error_by_chance,
    fit_temperature,
    fit_thresholds,
    point_metrics,
    predicted_classes,
    reliability,
)
from tests.test_metrics_multi_label import multi_label_data


def overconfident_logits(n=4000, classes=5, temperature=2.5, seed=0):
    """Logits multiplied by `temperature`, and labels drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.random((n, 1))).argmax(1)
    return temperature * logits, labels


def softmax(logits):
    return torch.from_numpy(logits).softmax(1).numpy()


# --- one label per clip ---

def test_temperature_divides_the_logits_of_a_softmax():
    logits, _ = overconfident_logits(50)
    scores = softmax(logits)
    np.testing.assert_allclose(apply_temperature(scores, 3.0), softmax(logits / 3), atol=1e-12)
    np.testing.assert_allclose(apply_temperature(scores, 1.0), scores, atol=1e-12)
    assert np.isfinite(apply_temperature(np.array([[1.0, 0.0]]), 0.05)).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_fit_finds_the_temperature_of_the_logits_as_gradient_descent_does(temperature):
    logits, labels = overconfident_logits(temperature=temperature)
    fitted = fit_temperature(softmax(logits), labels)
    assert fitted == pytest.approx(temperature, rel=0.08)
    log_t = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=50)

    def closure():
        optimizer.zero_grad()
        scaled = torch.from_numpy(logits) / log_t.exp()
        loss = F.cross_entropy(scaled, torch.from_numpy(labels), label_smoothing=1 / 4002)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fitted == pytest.approx(float(log_t.exp().detach()), rel=1e-3)


def test_temperature_is_finite_if_all_clips_are_right_or_all_scores_equal():
    rng = np.random.default_rng(2)
    all_right = np.sort(rng.dirichlet(np.ones(3), 60))  # the last class is the highest
    temperature = fit_temperature(all_right, np.full(60, 2))
    assert 1 / MAX_TEMPERATURE < temperature < 1
    assert 0.9 < apply_temperature(all_right, temperature)[:, 2].mean() < 0.999
    all_equal = fit_temperature(np.full((4, 2), 0.5), np.array([0, 1, 0, 1]))
    assert 1 / MAX_TEMPERATURE <= all_equal <= MAX_TEMPERATURE
    assert fit_temperature(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1])) > 1


def test_thresholds_have_the_best_f1():
    rng = np.random.default_rng(1)
    scores = rng.dirichlet(np.ones(4), 60).round(2)  # with ties
    labels = np.where(rng.random(60) < 0.6, scores.argmax(1), rng.integers(0, 3, 60))
    labels[labels == 3] = 0
    thresholds = fit_thresholds(scores, labels)
    assert thresholds[3] == 0.5  # a class without clips
    for c in range(3):
        tried = [f1_score(labels == c, scores[:, c] > t, zero_division=0)
                 for t in np.linspace(-0.005, 1, 202)]
        fitted = f1_score(labels == c, scores[:, c] > thresholds[c])
        assert fitted == pytest.approx(max(tried))


def loop_over_equal_shares(confidence, is_correct, bins=10):
    """Calibration error of pairs without equal confidences, in bins of n / bins each."""
    pairs = sorted(zip(confidence, is_correct, strict=True))
    total = 0.0
    for b in range(bins):
        inside = pairs[len(pairs) * b // bins:len(pairs) * (b + 1) // bins]
        total += abs(sum(p for p, _ in inside) - sum(y for _, y in inside))
    return total / len(pairs)


def test_reliability_equals_a_plain_loop_over_equally_filled_bins():
    logits, labels = overconfident_logits(503)
    scores = softmax(logits)
    rows, error = reliability(scores, labels)
    expected = loop_over_equal_shares(scores.max(1), scores.argmax(1) == labels)
    assert error == pytest.approx(expected)
    assert sum(row.n for row in rows) == 503 and {row.n for row in rows} == {50, 51}
    for row in rows:
        interval = binomtest(round(row.accuracy * row.n), row.n).proportion_ci(method="wilson")
        assert (row.low, row.high) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_equal_confidences_are_in_one_bin_in_any_order():
    scores = np.array([[0.9, 0.1]] * 60 + [[0.7, 0.3]] * 40)
    labels = np.array([0, 1] * 50)
    order = np.random.default_rng(0).permutation(100)
    for rows, error in (reliability(scores, labels), reliability(scores[order], labels[order])):
        assert [(row.confidence, row.n) for row in rows] == [
            (pytest.approx(0.7), 40), (pytest.approx(0.9), 60)]
        assert error == pytest.approx(0.4 * 0.2 + 0.6 * 0.4)
    assert reliability(scores[:1], labels[:1])[0][0].n == 1


def test_error_by_chance_holds_for_95_percent_of_calibrated_samples():
    below = []
    for seed in range(300):
        logits, labels = overconfident_logits(200, temperature=1.0, seed=seed)
        scores = softmax(logits)
        below.append(reliability(scores, labels)[1] <= error_by_chance(scores, labels))
    assert 0.91 < np.mean(below) < 0.985
    logits, labels = overconfident_logits(200)  # control: overconfident
    assert reliability(softmax(logits), labels)[1] > error_by_chance(softmax(logits), labels)


def test_temperature_is_used_only_if_it_helps_clips_it_was_not_fitted_on():
    used = []
    for seed in range(60):  # 12 clips and scores that are right as they are
        logits, labels = overconfident_logits(12, temperature=1.0, seed=seed)
        used.append(calibrate(softmax(logits), labels)["temperature"] != 1)
    assert np.mean(used) < 0.5
    logits, labels = overconfident_logits(100)
    fitted = fit_temperature(softmax(logits), labels)
    assert calibrate(softmax(logits), labels)["temperature"] == fitted
    assert calibrate(softmax(logits[:1]), labels[:1])["temperature"] == 1


def test_folds_of_the_temperature_hold_out_whole_groups():
    """Each group is right or wrong as a whole: only groups held out show that nothing is learnt."""
    scores = np.tile([[0.6, 0.4]], (300, 1))
    groups = np.repeat(np.arange(3), 100)
    labels = np.array([0, 0, 1])[groups]
    assert calibrate(scores, labels, np.arange(300))["temperature"] != 1
    assert calibrate(scores, labels, groups)["temperature"] == 1


def test_calibration_lowers_the_calibration_error_and_keeps_the_predictions():
    logits, labels = overconfident_logits(500)
    scores = softmax(logits)
    calibrated = apply_temperature(scores, calibrate(scores, labels)["temperature"])
    assert reliability(calibrated, labels)[1] < 0.5 * reliability(scores, labels)[1]
    assert (calibrated.argmax(1) == scores.argmax(1)).all()


# --- several labels per clip ---

def test_temperature_divides_the_logits_of_a_sigmoid():
    logits = torch.linspace(-30, 30, 60, dtype=torch.float64).view(20, 3)
    cooled = apply_temperature(logits.sigmoid().numpy(), 3.0, sigmoid=True)
    np.testing.assert_allclose(cooled, (logits / 3).sigmoid().numpy(), atol=1e-9)
    extreme = apply_temperature(np.array([[1.0, 0.0]]), 0.05, sigmoid=True)
    assert np.isfinite(extreme).all()


@pytest.mark.parametrize("temperature", [0.5, 2.5])
@pytest.mark.filterwarnings("error")
def test_fit_finds_the_temperature_of_sigmoid_scores(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(-0.5, 1.5, (3000, 4))
    labels = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
    labels[rng.random(logits.shape) < 0.1] = np.nan
    scores = 1 / (1 + np.exp(-temperature * logits))
    fitted = fit_temperature(scores, labels)
    assert fitted == pytest.approx(temperature, rel=0.05)
    known = ~np.isnan(labels)

    def loss(t):
        scaled = torch.from_numpy(temperature * logits[known] / t)
        return F.binary_cross_entropy_with_logits(scaled, torch.from_numpy(labels[known])).item()

    assert loss(fitted) <= min(loss(fitted * 1.01), loss(fitted / 1.01))
    calibrated = apply_temperature(scores, fitted, sigmoid=True)
    assert reliability(calibrated, labels)[1] < 0.3 * reliability(scores, labels)[1]


def test_multi_label_thresholds_have_the_best_f1_over_the_known_clips():
    scores, labels, _ = multi_label_data(n=60)
    scores = scores.round(2)
    thresholds = fit_thresholds(scores, labels)
    assert thresholds[5] == 0.5  # a class without clips
    for c in range(5):
        known = ~np.isnan(labels[:, c])
        truth, score = labels[known, c], scores[known, c]
        tried = [f1_score(truth, score >= t, zero_division=0) for t in np.unique(score)]
        assert f1_score(truth, score >= thresholds[c]) == pytest.approx(max(tried))


def test_multi_label_reliability_equals_a_plain_loop():
    scores, labels, _ = multi_label_data()
    scores = scores + 1e-9 * np.random.default_rng(0).random(scores.shape)  # no equal scores
    known = ~np.isnan(labels)
    rows, error = reliability(scores, labels)
    assert error == pytest.approx(loop_over_equal_shares(scores[known], labels[known]))
    assert sum(row.n for row in rows) == known.sum()


def test_thresholds_are_fitted_to_calibrated_scores_and_improve_macro_f1():
    scores, labels, _ = multi_label_data()
    calibration = calibrate(scores, labels)
    calibrated = apply_temperature(scores, calibration["temperature"], sigmoid=True)
    assert calibration["thresholds"] == fit_thresholds(calibrated, labels)
    predicted = predicted_classes(scores, calibration)
    assert (predicted == (calibrated >= calibration["thresholds"])).all()
    fitted = point_metrics(scores, labels, predicted)["macro_f1"]
    assert fitted >= point_metrics(scores, labels)["macro_f1"]


# --- a calibration from a file ---

@pytest.mark.parametrize("change, message", [
    ({"temperature": 1000.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"thresholds": [0.5]}, "1 thresholds for 2 classes"),
    ({"thresholds": [0.5, 1.5]}, "threshold"),
])
def test_stored_calibration_out_of_range_is_refused(change, message):
    valid = {"temperature": 2, "thresholds": [0, 0.5]}
    assert check_calibration(valid, 2) == {"temperature": 2.0, "thresholds": [0.0, 0.5]}
    with pytest.raises(ValueError, match=message):
        check_calibration({**valid, **change}, 2)
