"""Values that are not finite, a scaler that skips, divergence, memory (faults 8 to 11)."""
import math

import numpy as np
import pytest
import torch
from harness import Scaled, both, outcome, program, rows

import train
from core.checkpoint import load_checkpoint
from core.guard import diverged
from core.memory import OutOfMemory, Pieces, largest_batch, ran_out
from core.precision import Precision
from data.augment import Augment
from model.ast import AST, ASTConfig
from model.groups import parameter_groups
from sched import RelativeSchedule
from test_train import DoubleFocal, Through, cut


# --- not finite (fault 8)

def spoil(steps, how):
    """-> prepare: in these steps (from 1) something is not finite; -> the clip that it is put into."""
    spoilt, seen = [], [0]

    def prepare(patch):
        real_step, real_input = train.train_step, train.model_input

        def train_step(t, window, *rest):
            seen[0] += 1
            if how == "gradient" and seen[0] in steps:
                hook = t.model.head[1].weight.register_hook(lambda grad: grad * math.inf)
                try:
                    return real_step(t, window, *rest)
                finally:
                    hook.remove()
            return real_step(t, window, *rest)

        def model_input(t, batch, epoch):
            spec, target = real_input(t, batch, epoch)
            if seen[0] in steps and how != "gradient" and seen[0] not in [step for step, _ in spoilt]:
                spoilt.append((seen[0], batch.rows[1]))
                spec[1] = math.nan if how == "nan" else math.inf
            return spec, target
        patch.setattr(train, "train_step", train_step)
        patch.setattr(train, "model_input", model_input)
    return prepare, spoilt


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_named_and_counted(how, tones, tmp_path, monkeypatch):
    prepare, spoilt = spoil((2, 8), how)
    assert program(monkeypatch, tmp_path, data=tones, prepare=prepare) == 0
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert [row["skipped_steps"] for row in rows(tmp_path / "run" / "history.csv")] == ["1", "1"]
    assert state["schedule"]["steps"] == 10 and state["progress"]["step"] == 12
    events = rows(tmp_path / "run" / "events.csv")
    assert [(row["step"], row["event"]) for row in events] == [("2", "skipped"), ("8", "skipped")]
    for (_, row), event in zip(spoilt, events):
        assert event["detail"].endswith(f"clips: {state['manifest']['paths'][row]}")  # that one and no other
    if how == "gradient":
        assert events[0]["detail"].count(".wav") == 6  # all losses are fine: the whole window
    steps = rows(tmp_path / "run" / "steps.csv")
    assert steps[1]["lr_head"] == steps[2]["lr_head"] != steps[3]["lr_head"]
    check_rates(steps, {2, 8})


def check_rates(steps, skipped):
    """Each row's rate is the warm-up and cosine at the number of steps that had really been made."""
    made = 0
    for row in steps:
        factor = (made + 1) / 3 if made < 3 else 0.5 * (1 + math.cos(math.pi * (made - 3) / 9))
        assert float(row["lr_head"]) == pytest.approx(2e-3 * factor) == pytest.approx(2 * float(row["lr_backbone"]))
        made += int(row["step"]) not in skipped


def test_too_many_in_a_row_end_the_run_with_exit_3(tones, tmp_path, monkeypatch, capsys):
    prepare, _ = spoil(range(8, 100), "nan")
    assert program(monkeypatch, tmp_path, "--max-skips", 3, data=tones, prepare=prepare) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: 3 steps in a row") and error.count("\n") == 1 and "best.pt of epoch 1" in error
    assert load_checkpoint(tmp_path / "run" / "best.pt")["progress"]["step"] == 6
    assert program(monkeypatch, tmp_path, "--resume") == 0  # whatever it was, it is gone


def test_scattered_skips_do_not_end_the_run(tones, tmp_path, monkeypatch):
    prepare, _ = spoil((1, 2, 4, 5, 7, 8), "nan")
    assert program(monkeypatch, tmp_path, "--max-skips", 3, data=tones, prepare=prepare) == 0


def test_without_the_guard_the_weights_would_be_lost(tones, tmp_path, monkeypatch):
    """The control: an optimiser that steps whatever it is given."""
    def careless(patch):
        real = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a: (setattr(self, "found_inf", None), real(self, *a))[1])
    prepare, _ = spoil((3,), "nan")
    assert program(monkeypatch, tmp_path, data=tones, prepare=both(prepare, careless)) == 3
    assert not (tmp_path / "run" / "best.pt").exists()


# --- the scaler (fault 9)

def test_the_schedule_waits_for_a_step_that_the_scaler_skips(tones, tmp_path, monkeypatch):
    """Losses scaled so far up that gradients overflow: the scale halves until they fit, the schedule stands."""
    prepare = lambda patch: patch.setattr(train, "choose_precision", lambda *_: Scaled(init_scale=2.0**126))
    assert program(monkeypatch, tmp_path, "--max-skips", 50, data=tones, prepare=prepare) == 0
    state, steps = load_checkpoint(tmp_path / "run" / "last.pt"), rows(tmp_path / "run" / "steps.csv")
    skipped = sum(int(row["skipped_steps"]) for row in rows(tmp_path / "run" / "history.csv"))
    assert skipped >= 1 and state["schedule"]["steps"] == len(steps) - skipped
    check_rates(steps, {int(row["step"]) for row in rows(tmp_path / "run" / "events.csv")})


def test_a_schedule_that_does_not_wait_is_seen(tones, tmp_path, monkeypatch):
    """The control: it steps whatever happened."""
    def prepare(patch):
        real = RelativeSchedule.step
        patch.setattr(RelativeSchedule, "step", lambda self, happened=True: real(self))
        patch.setattr(train, "choose_precision", lambda *_: Scaled(init_scale=2.0**126))
    assert program(monkeypatch, tmp_path, "--max-skips", 50, data=tones, prepare=prepare) == 0
    with pytest.raises(AssertionError):
        check_rates(rows(tmp_path / "run" / "steps.csv"),
                    {int(row["step"]) for row in rows(tmp_path / "run" / "events.csv")})


def test_rates_on_the_device_are_the_same_as_numbers():
    """The form that a GPU uses, step count and rates as tensors, here on the CPU, with steps that did not happen."""
    def rates(device):
        parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = torch.optim.AdamW([{"params": [p], "lr": lr} for p, lr in zip(parameters, (5e-5, 1e-3))], fused=True)
        schedule = RelativeSchedule(optimizer, 4, 20, device=device)
        seen = []
        for step in range(26):
            if step == 12:
                schedule.rescale(0.5)
            for p in parameters:
                p.grad = torch.full((3,), 0.1)
            optimizer.step()
            schedule.step(torch.tensor(step % 5 != 2))
            seen.append([float(group["lr"]) for group in optimizer.param_groups])
        again = RelativeSchedule(optimizer, 4, 20, device=device)
        again.load_state_dict(schedule.state_dict())
        assert [float(group["lr"]) for group in optimizer.param_groups] == seen[-1]
        return np.array(seen), torch.stack([p.detach() for p in parameters])
    (plain, a), (tensors, b) = rates(None), rates("cpu")
    np.testing.assert_allclose(tensors, plain, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(plain[:, 1] / np.maximum(plain[:, 0], 1e-30), np.where(plain[:, 0] > 0, 20, 0), rtol=1e-9)
    torch.testing.assert_close(a, b)


# --- divergence (fault 10)

@pytest.mark.parametrize("trace, clips, called", [
    ([40.6, 29.8, 25.0, 19.4, 13.4], 500, 3),  # the earlier system: at the second falling epoch
    ([40.6, 29.8, 25.0, 19.4, 13.4], 80, 3),
    ([60, 62, 20], 300, 3),  # a collapse in one epoch
    ([30, 45, 52, 50, 49, 53, 52, 51], 300, None),  # the ups and downs of a good run
    ([70, 60, 55, 70], 40, None),  # few clips: noise
    ([100, 75, 25], 8, 3),
    ([10, 12, 8, 5], 60, None),  # at chance there is nothing to fall from
    ([50, 40, 45, 38, 44, 36], 300, None),  # low but not falling away
])
def test_divergence_is_called_when_it_begins_and_not_before(trace, clips, called):
    verdicts = [n for n in range(1, len(trace) + 1) if diverged([value / 100 for value in trace[:n]], clips)]
    assert (verdicts[0] if verdicts else None) == called


def falling(trace):
    """-> prepare: validation accuracy goes this way, whatever the model does."""
    def prepare(patch):
        real, left = train.point_metrics, list(trace)
        patch.setattr(train, "point_metrics", lambda *args: {**real(*args), "accuracy": left.pop(0)})
    return prepare


TRACE = [0.9, 0.5, 0.2, 0.1, 0.6, 0.7]
AGAIN = [0.9, 0.5, 0.2, 0.6, 0.8, 0.7]


def test_a_diverged_run_stops_with_exit_3_and_its_best_kept(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--epochs", 6, data=tones, prepare=falling(TRACE)) == 3
    error = capsys.readouterr().err
    assert "diverged" in error and "20.0%" in error and "90.0%" in error and "best.pt of epoch 1" in error
    assert len(rows(tmp_path / "run" / "history.csv")) == 3
    assert load_checkpoint(tmp_path / "run" / "best.pt")["progress"]["epoch"] == 1


def test_without_the_guard_it_would_go_on(tones, tmp_path, monkeypatch):
    """The control."""
    assert program(monkeypatch, tmp_path, "--epochs", 6, data=tones, prepare=both(falling(TRACE), lambda patch: patch.setattr(
        train, "diverged", lambda *_: None))) == 0


def test_warn_says_so_and_goes_on(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--epochs", 6, "--on-divergence", "warn", data=tones, prepare=falling(TRACE)) == 0
    assert [row["event"] for row in rows(tmp_path / "run" / "events.csv")] == ["diverged"] * 2
    assert "validation accuracy has fallen to 20.0%" in capsys.readouterr().out


def test_rollback_goes_back_to_the_best_with_all_rates_scaled_by_one_factor(tones, tmp_path, monkeypatch):
    seen = {}

    def watch(patch):
        real = train.RelativeSchedule.rescale

        def rescale(self, by):
            real(self, by)
            weights = [p.detach().clone() for group in self.optimizer.param_groups for p in group["params"]]
            seen["weights"] = weights
        patch.setattr(train.RelativeSchedule, "rescale", rescale)
    flags = ("--epochs", 6, "--on-divergence", "rollback", "--schedule", "constant", "--warmup-epochs", 0)
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=both(falling(AGAIN), watch)) == 0
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["progress"]["epoch"] == 1
    wanted = sorted(value.double().sum().item() for value in best["model"].values())
    assert sorted(value.double().sum().item() for value in seen["weights"]) == pytest.approx(wanted)
    history = rows(tmp_path / "run" / "history.csv")
    assert [row["lr_backbone"] for row in history] == ["0.001"] * 3 + ["0.0005"] * 3
    assert [row["lr_head"] for row in history] == ["0.002"] * 3 + ["0.001"] * 3
    events = rows(tmp_path / "run" / "events.csv")
    assert [(row["epoch"], row["event"]) for row in events] == [("3", "diverged"), ("3", "rollback")]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["schedule"]["scale"] == 0.5


# --- memory (fault 11)

class Forward(torch.nn.Module):
    """An AST for which more than `fits` clips are too much in the forward pass."""

    def __init__(self, model, fits):
        super().__init__()
        self.model, self.fits, self.config = model, fits, model.config

    def forward(self, spec, *draws):
        if len(spec) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.model(spec, *draws)


def training(fits=None, where="forward"):
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2, n_mels=32, time_patches=4, drop_path=0.3)).double().train()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.0, 0.0), lr=0.0)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    given = {None: lambda *_: model, "forward": Forward, "backward": Backward}[fits and where](model, fits)
    t = train.Training(given, Through(), Augment(freq_mask=4, time_mask=4, mixup_alpha=0.4, mixup_p=1.0), DoubleFocal(),
                       optimizer, RelativeSchedule(optimizer, 0, 10), Precision(torch.device("cpu"), None, ""), math.inf)
    return t, seen


class Backward(torch.nn.Module):
    """Memory runs out in the backward pass, when half of the gradients have been added already."""

    def __init__(self, model, fits):
        super().__init__()
        self.model, self.fits, self.config = model, fits, model.config

    def forward(self, spec, *draws):
        if len(spec) <= self.fits:
            return self.model(spec, *draws)
        middle = self.model.blocks[1].register_forward_pre_hook(lambda _, inputs: (Bomb.apply(inputs[0]), *inputs[1:]))
        try:
            return self.model(spec, *draws)
        finally:
            middle.remove()


class Bomb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def window():
    generator = torch.Generator().manual_seed(1)
    wave = torch.randn(8, 32 * 40, dtype=torch.float64, generator=generator)
    return cut(wave, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), (5, 3))


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("fits, limit", [(4, 3), (2, 2), (1, 1)])
def test_out_of_memory_splits_the_micro_batch_with_the_same_result(where, fits, limit, capsys):
    t, whole = training()
    figures, _ = train.train_step(t, window(), 3)
    t, parts = training(fits, where)
    split, losses = train.train_step(t, window(), 3)
    assert t.pieces.limit == limit and capsys.readouterr().out.count("out of memory") == {4: 1, 2: 2, 1: 3}[fits]
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(split, figures, atol=1e-6, rtol=1e-6)
    assert [row for rows, _ in losses for row in rows.tolist()] == list(range(8))
    train.train_step(t, window(), 4)  # the smaller size is kept
    assert "out of memory" not in capsys.readouterr().out


def test_gradients_of_the_failed_attempt_would_be_seen(monkeypatch):
    """The control: a retry that does not start from zero."""
    t, whole = training()
    train.train_step(t, window(), 3)
    t, parts = training(4, "backward")
    monkeypatch.setattr(t.optimizer, "zero_grad", lambda set_to_none: None)
    train.train_step(t, window(), 3)
    assert any(not torch.allclose(parts[name], whole[name], atol=1e-6) for name in whole)


def test_a_single_clip_that_does_not_fit_ends_with_exit_3_and_what_to_change(tones, tmp_path, monkeypatch, capsys):
    def prepare(patch):
        def forward(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        patch.setattr(AST, "forward", forward)
    assert program(monkeypatch, tmp_path, data=tones, prepare=prepare) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory with a single clip") and "--checkpointing" in error and error.count("\n") == 1


def test_what_counts_as_out_of_memory():
    assert ran_out(torch.OutOfMemoryError("x")) and ran_out(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert ran_out(caught.value)  # the words of the CPU's allocator
    assert not ran_out(RuntimeError("shape mismatch")) and not ran_out(ValueError("out of memory"))


def test_pieces_cover_every_clip_once():
    for clips in range(1, 9):
        for limit in (None, *range(1, 10)):
            pieces = Pieces(limit)(clips)
            assert [i for piece in pieces for i in range(clips)[piece]] == list(range(clips))
            assert all(piece.stop - piece.start <= (limit or clips) for piece in pieces)


def test_the_largest_batch_that_fits():
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
    assert largest_batch([1, 2, 4, 8, 16, 32], attempt, torch.device("cpu")) == 8 and tried == [1, 2, 4, 8, 16]
    assert largest_batch([1, 2, 4], attempt, torch.device("cpu")) == 4
    with pytest.raises(OutOfMemory):
        largest_batch([10], attempt, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="other"):
        largest_batch([1], lambda size: (_ for _ in ()).throw(RuntimeError("other")), torch.device("cpu"))


def memory_for(fits):
    """-> prepare: more than so many clips at once are too much to train on."""
    def prepare(patch):
        real = AST.forward

        def forward(self, spec, *draws):
            if len(spec) > fits and self.training:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(self, spec, *draws)
        patch.setattr(AST, "forward", forward)
    return prepare


def test_batch_size_auto_keeps_the_effective_batch(tones, tmp_path, monkeypatch):
    assert program(monkeypatch, tmp_path, "--batch-size", "auto", data=tones, prepare=memory_for(3)) == 0
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["flags"]["batch_size"] == 3 and state["flags"]["effective_batch"] == 6
    assert {row["clips"] for row in rows(tmp_path / "run" / "steps.csv")} == {"6", "3"} and state["piece"] is None


def test_the_smaller_size_is_kept_when_a_run_is_continued(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, data=tones, prepare=memory_for(1)) == 0
    assert capsys.readouterr().out.count("out of memory") == 1
    assert load_checkpoint(tmp_path / "run" / "last.pt")["piece"] == 1
    assert outcome(tmp_path / "run")["schedule"]["steps"] == 12
