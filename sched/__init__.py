"""The learning rate: one factor, multiplied onto each parameter group's own base learning rate.

`lr_i(step) = base_lr_i * factor(step)`. So the ratio between groups is the same at every step, also
during warm-up. Steps are optimizer steps. To add a shape, write a function and list it in `SHAPES`.
"""
import math

import torch

WSD_DECAY = 0.2  # share of all steps in which "wsd" falls


def _progress(step, warmup_steps, total_steps):
    """Share of the steps after the warm-up that are done, in [0, 1]."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps)))


def linear(step: int, warmup_steps: int, total_steps: int) -> float:
    return 1 - _progress(step, warmup_steps, total_steps)


def constant(step: int, warmup_steps: int, total_steps: int) -> float:
    return 1.0


def wsd(step: int, warmup_steps: int, total_steps: int) -> float:
    """Warmup-stable-decay: constant, then linear over the last WSD_DECAY of all steps."""
    steps_left = max(0.0, total_steps - step)
    return min(1.0, steps_left / max(1.0, WSD_DECAY * total_steps))


# After the warm-up: (step, warmup_steps, total_steps) -> 1 at the start, mostly 0 at the end.
SHAPES = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def lr_factor(step: int, warmup_steps: int, total_steps: int, shape: str = "cosine",
              min_ratio: float = 0.0) -> float:
    """Factor in [min_ratio, 1] for optimizer step `step` (0 is the first).

    The warm-up is (step + 1) / warmup_steps: its first step is above 0 and its last is at 1. Then
    the factor follows `shape`, scaled so that 0 becomes min_ratio; constant after total_steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return min_ratio + (1 - min_ratio) * SHAPES[shape](step, warmup_steps, total_steps)


class RelativeSchedule:
    """Sets `group["lr"] = group["initial_lr"] * factor(step)` for every group of the optimizer.

    Call `.step()` after each optimizer step. A group's "initial_lr" is its "lr" unless it has one.
    warmup_steps, total_steps: in optimizer steps; no warm-up is 0. Raises ValueError for an unknown
    shape or a warm-up longer than the run.

    device: keep step count and rates there as tensors. Then `.step(happened)` with a tensor never
    makes the host wait for the GPU. By default they are plain numbers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int,
                 shape: str = "cosine", min_ratio: float = 0.0,
                 device: torch.device | str | None = None):
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(f"warm-up of {warmup_steps} steps in a run of {total_steps}")
        if shape not in SHAPES:
            raise ValueError(f"schedule shape {shape!r}: use one of {', '.join(SHAPES)}")
        self.optimizer = optimizer
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.shape, self.min_ratio = shape, min_ratio
        self.steps = 0
        self.scale = 1.0  # one factor for all groups, below 1 after a rollback
        self.table = None  # on a device: the factor of every step
        if device is not None:
            factors = [self.factor(step) for step in range(total_steps + 1)]
            self.steps = torch.zeros((), dtype=torch.int64, device=device)
            self.table = torch.tensor(factors, device=device)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._write()

    def factor(self, step: int) -> float:
        """The factor of every group's base learning rate at a step."""
        return self.scale * lr_factor(step, self.warmup_steps, self.total_steps, self.shape,
                                      self.min_ratio)

    def step(self, happened: bool | torch.Tensor = True) -> None:
        """Advance one step if `happened`: a bool, or a bool tensor on the schedule's device."""
        if self.table is None:
            happened = bool(happened)
        self.steps += happened
        self._write()

    def rescale(self, by: float) -> None:
        """Multiply all rates from now on by one number. Their ratio stays."""
        self.scale *= by
        self._write()

    def _write(self):
        if self.table is None:
            factor = self.factor(self.steps)
        else:
            # take() reads the table on the device; indexing would make the host wait for it.
            factor = self.scale * self.table.take(self.steps.clamp(max=len(self.table) - 1))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor  # the only line that sets a learning rate

    def state_dict(self) -> dict:
        return {"steps": int(self.steps), "scale": self.scale}

    def load_state_dict(self, state: dict) -> None:
        if self.table is None:
            self.steps = state["steps"]
        else:
            self.steps = torch.tensor(state["steps"], device=self.table.device)
        self.scale = state["scale"]
        self._write()
