"""Steps that are not finite, a scaler that skips, divergence (faults 8 to 10)."""
import math

import numpy as np
import pytest
import torch
from harness import ScaledPrecision, both, program, rows

import train
from core.divergence import find_divergence
from core.learner import Learner
from core.run.checkpoint import load_checkpoint
from sched import RelativeSchedule

# --- not finite (fault 8) ---

class Spoiler:
    """Makes something not finite in some steps, counted from 1.

    how: "nan" or "inf" in the spectrogram of the second clip of the step's first micro-batch, or
    "gradient" for an infinite gradient although all losses are finite.
    """

    def __init__(self, steps, how):
        self.steps, self.how = steps, how
        self.rows = {}  # step -> row of the clip that was spoilt
        self.step = 0

    def prepare(self, patch):
        real_step, real_input = train.train_step, Learner.model_input

        def train_step(learner, *rest):
            self.step += 1
            if self.how != "gradient" or self.step not in self.steps:
                return real_step(learner, *rest)
            weight = learner.model.head[1].weight
            hook = weight.register_hook(lambda gradient: gradient * math.inf)
            try:
                return real_step(learner, *rest)
            finally:
                hook.remove()

        def model_input(learner, batch, epoch):
            spec, target = real_input(learner, batch, epoch)
            is_first = self.step not in self.rows
            if self.how != "gradient" and self.step in self.steps and is_first:
                self.rows[self.step] = batch.rows[1]
                spec[1] = math.nan if self.how == "nan" else math.inf
            return spec, target
        patch.setattr(train, "train_step", train_step)
        patch.setattr(Learner, "model_input", model_input)


def check_rates(steps, skipped):
    """Each row's rate is the warm-up and cosine at the number of steps applied before it."""
    n_applied = 0
    for row in steps:
        if n_applied < 3:
            factor = (n_applied + 1) / 3
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (n_applied - 3) / 9))
        lr_head, lr_backbone = float(row["lr_head"]), float(row["lr_backbone"])
        assert lr_head == pytest.approx(2e-3 * factor)
        assert lr_head == pytest.approx(2 * lr_backbone)
        if int(row["step"]) not in skipped:
            n_applied += 1


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_step_that_is_not_finite_is_skipped_named_and_counted(how, tones, tmp_path, monkeypatch):
    spoiler = Spoiler((2, 8), how)
    assert program(monkeypatch, tmp_path, data=tones, prepare=spoiler.prepare) == 0
    run = tmp_path / "run"
    checkpoint = load_checkpoint(run / "last.pt")
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    assert [row["skipped_steps"] for row in rows(run / "history.csv")] == ["1", "1"]
    assert checkpoint["schedule"]["steps"] == 10
    assert checkpoint["progress"]["step"] == 12
    events = rows(run / "events.csv")
    assert [(row["step"], row["event"]) for row in events] == [("2", "skipped"), ("8", "skipped")]
    paths = checkpoint["manifest"]["paths"]
    for event in events:
        named = [path for path in paths if path in event["detail"].replace(",", " ").split()]
        if how == "gradient":
            assert len(named) == 6  # all losses are finite, so every clip of the step
        else:
            assert named == [paths[spoiler.rows[int(event["step"])]]]
    steps = rows(run / "steps.csv")
    assert steps[1]["lr_head"] == steps[2]["lr_head"] != steps[3]["lr_head"]
    check_rates(steps, {2, 8})


def test_too_many_skips_in_a_row_end_the_run_with_exit_3(tones, tmp_path, monkeypatch, capsys):
    spoiler = Spoiler(range(8, 100), "nan")
    flags = ("--max-skips", 3)
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=spoiler.prepare) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--max-skips" in error
    assert "best.pt" in error
    assert load_checkpoint(tmp_path / "run" / "best.pt")["progress"]["step"] == 6
    assert program(monkeypatch, tmp_path, "--resume") == 0  # the cause is gone


def test_scattered_skips_do_not_end_the_run(tones, tmp_path, monkeypatch):
    spoiler = Spoiler((1, 2, 4, 5, 7, 8), "nan")
    flags = ("--max-skips", 3)
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=spoiler.prepare) == 0


def test_control_optimizer_that_applies_every_step_loses_the_weights(tones, tmp_path, monkeypatch):
    def apply_every_step(patch):
        real_step = torch.optim.AdamW.step

        def step(optimizer, *args):
            optimizer.found_inf = None
            return real_step(optimizer, *args)
        patch.setattr(torch.optim.AdamW, "step", step)
    prepare = both(Spoiler((3,), "nan").prepare, apply_every_step)
    assert program(monkeypatch, tmp_path, data=tones, prepare=prepare) == 3
    assert not (tmp_path / "run" / "best.pt").exists()


# --- the scaler (fault 9) ---

def overflowing_scale(patch):
    """prepare: scale losses so far up that gradients overflow, until the scale was halved often."""
    patch.setattr(train, "choose_precision", lambda *_: ScaledPrecision(init_scale=2.0**126))


def skipped_steps(run):
    return {int(row["step"]) for row in rows(run / "events.csv")}


def test_schedule_waits_for_a_step_that_the_scaler_skips(tones, tmp_path, monkeypatch):
    flags, run = ("--max-skips", 50), tmp_path / "run"
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=overflowing_scale) == 0
    steps = rows(run / "steps.csv")
    n_skipped = sum(int(row["skipped_steps"]) for row in rows(run / "history.csv"))
    assert n_skipped >= 1
    assert load_checkpoint(run / "last.pt")["schedule"]["steps"] == len(steps) - n_skipped
    check_rates(steps, skipped_steps(run))


def test_overflow_at_a_high_loss_scale_is_no_fault_of_the_clips(tones, tmp_path, monkeypatch):
    flags, run = ("--max-skips", 50), tmp_path / "run"
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=overflowing_scale) == 0
    events = rows(run / "events.csv")
    scales = [float(row["scale"]) for row in rows(run / "steps.csv")]
    assert len(events) >= 1
    for event in events:
        assert event["event"] == "scale"
        assert f"{scales[int(event['step']) - 1]:g}" in event["detail"]
        assert ".wav" not in event["detail"]


def test_control_schedule_that_does_not_wait_is_detected(tones, tmp_path, monkeypatch):
    def step_always(patch):
        real_step = RelativeSchedule.step
        patch.setattr(RelativeSchedule, "step", lambda schedule, *_: real_step(schedule))
    flags, prepare = ("--max-skips", 50), both(overflowing_scale, step_always)
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=prepare) == 0
    with pytest.raises(AssertionError):
        check_rates(rows(tmp_path / "run" / "steps.csv"), skipped_steps(tmp_path / "run"))


def rates_of_a_schedule(device):
    """26 steps with some skipped and a rollback -> rates (26, 2), weights (2, 3)."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (5e-5, 1e-3))]
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = RelativeSchedule(optimizer, 4, 20, device=device)
    rates = []
    for step in range(26):
        if step == 12:
            schedule.rescale(0.5)
        for p in parameters:
            p.grad = torch.full((3,), 0.1)
        optimizer.step()
        schedule.step(torch.tensor(step % 5 != 2))
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    restored = RelativeSchedule(optimizer, 4, 20, device=device)
    restored.load_state_dict(schedule.state_dict())
    assert [float(group["lr"]) for group in optimizer.param_groups] == rates[-1]
    return np.array(rates), torch.stack([p.detach() for p in parameters])


def test_rates_in_tensors_equal_rates_in_numbers():
    """A GPU has step count and rates in tensors; they are used on the CPU here."""
    rates, weights = rates_of_a_schedule(None)
    tensor_rates, tensor_weights = rates_of_a_schedule("cpu")
    np.testing.assert_allclose(tensor_rates, rates, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(tensor_weights, weights)
    ratios = rates[:, 1] / np.maximum(rates[:, 0], 1e-30)
    np.testing.assert_allclose(ratios, np.where(rates[:, 0] > 0, 20, 0), rtol=1e-9)


# --- divergence (fault 10) ---

@pytest.mark.parametrize("percentages, n_clips, first_epoch", [
    ([40.6, 29.8, 25.0, 19.4, 13.4], 500, 3),  # the earlier system: at the second falling epoch
    ([40.6, 29.8, 25.0, 19.4, 13.4], 80, 3),
    ([60, 62, 20], 300, 3),  # a collapse in one epoch
    ([30, 45, 52, 50, 49, 53, 52, 51], 300, None),  # the ups and downs of a good run
    ([70, 60, 55, 70], 40, None),  # few clips: noise
    ([100, 75, 25], 8, 3),
    ([10, 12, 8, 5], 60, None),  # near chance there is nothing to fall from
    ([50, 40, 45, 38, 44, 36], 300, None),  # lower, but not in a row
])
def test_divergence_is_found_when_it_begins_and_not_before(percentages, n_clips, first_epoch):
    accuracies = [value / 100 for value in percentages]
    epochs = [n for n in range(1, len(accuracies) + 1) if find_divergence(accuracies[:n], n_clips)]
    assert (epochs[0] if epochs else None) == first_epoch


def accuracies_of_epochs(accuracies):
    """-> prepare: validation accuracy takes these values, whatever the model does."""
    def prepare(patch):
        real, remaining = train.point_metrics, list(accuracies)

        def point_metrics(*args):
            return real(*args) | {"accuracy": remaining.pop(0)}
        patch.setattr(train, "point_metrics", point_metrics)
    return prepare


FALLING = accuracies_of_epochs([0.9, 0.5, 0.2, 0.1, 0.6, 0.7])
FALLING_ONCE = accuracies_of_epochs([0.9, 0.5, 0.2, 0.6, 0.8, 0.7])


def test_diverged_run_stops_with_exit_3_and_its_best_checkpoint(tones, tmp_path, monkeypatch,
                                                                capsys):
    assert program(monkeypatch, tmp_path, "--epochs", 6, data=tones, prepare=FALLING) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for value in ("20.0%", "90.0%", "best.pt", "--on-divergence"):
        assert value in error
    assert len(rows(tmp_path / "run" / "history.csv")) == 3
    assert load_checkpoint(tmp_path / "run" / "best.pt")["progress"]["epoch"] == 1


def test_control_run_without_the_check_does_not_stop(tones, tmp_path, monkeypatch):
    def never_find_divergence(patch):
        patch.setattr(train, "find_divergence", lambda *_: None)
    prepare = both(FALLING, never_find_divergence)
    assert program(monkeypatch, tmp_path, "--epochs", 6, data=tones, prepare=prepare) == 0


def test_on_divergence_warn_reports_it_and_continues(tones, tmp_path, monkeypatch, capsys):
    flags = ("--epochs", 6, "--on-divergence", "warn")
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=FALLING) == 0
    events = rows(tmp_path / "run" / "events.csv")
    assert [row["event"] for row in events] == ["diverged"] * 2
    out = capsys.readouterr().out
    assert all(row["detail"] in out for row in events)
    assert "20.0%" in events[0]["detail"]


def test_rollback_restores_the_best_epoch_and_scales_all_rates_by_one_factor(
        tones, tmp_path, monkeypatch):
    rolled_back = []  # the weights after the rollback

    def record_weights(patch):
        real = RelativeSchedule.rescale

        def rescale(schedule, factor):
            real(schedule, factor)
            rolled_back.extend(p.detach().clone() for group in schedule.optimizer.param_groups
                               for p in group["params"])
        patch.setattr(RelativeSchedule, "rescale", rescale)
    flags = ("--epochs", 6, "--on-divergence", "rollback", "--schedule", "constant",
             "--warmup-epochs", 0)
    prepare, run = both(FALLING_ONCE, record_weights), tmp_path / "run"
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=prepare) == 0
    best = load_checkpoint(run / "best.pt")
    assert best["progress"]["epoch"] == 1
    best_sums = sorted(value.double().sum().item() for value in best["model"].values())
    sums = sorted(value.double().sum().item() for value in rolled_back)
    assert sums == pytest.approx(best_sums)
    history = rows(run / "history.csv")
    assert [row["lr_backbone"] for row in history] == ["0.001"] * 3 + ["0.0005"] * 3
    assert [row["lr_head"] for row in history] == ["0.002"] * 3 + ["0.001"] * 3
    events = rows(run / "events.csv")
    assert [(row["epoch"], row["event"]) for row in events] == [
        ("3", "diverged"), ("3", "rollback")]
    assert load_checkpoint(run / "last.pt")["schedule"]["scale"] == 0.5
