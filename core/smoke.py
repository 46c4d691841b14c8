"""A dry run: can one batch be learnt, are all gradients finite, how long will the run take."""
import time
from collections.abc import Callable, Iterator

import torch

from core.device.memory import peak_memory_mb, reset_peak_memory
from core.learner import Learner

OVERFIT_SECONDS, SPEED_SECONDS, SPEED_STEPS = 30, 20, 20


def smoke_test(learner: Learner, steps: Iterator[list], train_step: Callable, n_train: int,
               n_val: int, epochs: int, n_unreadable: int) -> bool:
    """Overfit one batch, train for some seconds, estimate the run's time -> whether all passed.

    steps: the micro-batches of each step of an epoch. train_step(micro_batches) -> StepResult.
    n_train: clips of an epoch; n_val: tiles of its validation.
    """
    micro_batches = next(steps)
    spec, target = learner.model_input(micro_batches[0], epoch=0)
    learner.model.train()
    first_loss, last_loss, accuracy, bad_names = overfit(learner, spec, target)
    gradients = "all finite"
    if bad_names:
        gradients = f"missing or not finite in {', '.join(bad_names[:3])}"
    print(f"smoke: one batch of {len(spec)}: loss {first_loss:.3f} to {last_loss:.4f}, "
          f"{accuracy:.0%} correct; gradients {gradients}")

    reset_peak_memory(learner.device)  # the first part had an optimizer of its own
    n_clips, n_steps, started = 0, 0, time.perf_counter()
    applied = False
    while micro_batches and n_steps < SPEED_STEPS:
        if time.perf_counter() - started > SPEED_SECONDS:
            break
        applied = train_step(micro_batches).read().applied == 1
        n_clips += sum(len(batch.rows) for batch in micro_batches)
        n_steps += 1
        micro_batches = next(steps, None)
    speed = n_clips / (time.perf_counter() - started)  # data loading included
    epoch_seconds = n_train / speed + n_val / (3 * speed)  # forward is a third of a training step
    print(f"smoke: {speed:.1f} clips/s, peak memory {peak_memory_mb(learner.device):.0f} MiB; "
          f"about {duration(epoch_seconds)} per epoch, {duration(epoch_seconds * epochs)} for all "
          f"{epochs} epochs")
    passed = last_loss < 0.5 * first_loss and not bad_names and applied
    unreadable = f", {n_unreadable} unreadable files" if n_unreadable else ""
    print(f"smoke: {'passed' if passed else 'FAILED'}{unreadable}")
    return passed


def overfit(learner: Learner, spec: torch.Tensor, target: torch.Tensor, steps: int = 60,
            lr: float = 1e-3) -> tuple[float, float, float, list[str]]:
    """Train the model on one batch (B, n_mels, frames), (B, classes), then restore its weights.

    Returns first loss, last loss, accuracy at the end, and the names of parameters whose gradient
    was ever missing or not finite.
    """
    model, loss_fn = learner.model, learner.loss_fn
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=lr)
    losses = []
    are_finite = torch.ones(len(trainable), dtype=torch.bool, device=learner.device)
    deadline = time.perf_counter() + OVERFIT_SECONDS
    for _ in range(steps):
        with learner.precision.autocast():
            logits = model(spec)
        loss = loss_fn(logits, target).mean()
        learner.zero_grad()
        loss.backward()
        # Read at the end, because each value that is read waits for a GPU.
        are_finite &= torch.stack([has_finite_gradient(p) for p in trainable.values()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        known = logits.masked_fill(target.isnan(), -torch.inf)
        predicted = known.argmax(1, keepdim=True)
        accuracy = (target.gather(1, predicted) >= 0.5).float().mean().item()
        is_learnt = losses[-1] < 0.05 * losses[0] and accuracy == 1
        if is_learnt or time.perf_counter() > deadline:
            break
    model.load_state_dict(before)
    learner.zero_grad()  # or the next step would add to these gradients
    bad_names = [name for name, finite in zip(trainable, are_finite.tolist()) if not finite]
    return losses[0], losses[-1], accuracy, sorted(bad_names)


def has_finite_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A bool () on the parameter's device."""
    if parameter.grad is None:
        return torch.zeros((), dtype=torch.bool, device=parameter.device)
    return parameter.grad.isfinite().all()


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
