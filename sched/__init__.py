"""The learning rate: one pure factor, multiplied onto each parameter group's own base LR.

`lr_i(step) = base_lr_i * factor(step)`: the ratio between groups is the same at every step, whatever the
warm-up. Steps are optimiser steps. The whole state is the number of steps done.
"""
import math

import torch

SHAPES = ("cosine", "linear", "constant", "wsd")


def lr_factor(step, warmup_steps, total_steps, shape="cosine", min_ratio=0.0, decay_share=0.2):
    """Factor in [min_ratio, 1] for optimiser step `step` (0 is the first).

    Warm-up is linear, (step + 1) / warmup_steps, so that the first step is not at zero and the last step of
    the warm-up is at 1. What is left follows `shape`: "cosine" and "linear" fall to min_ratio at
    total_steps, "constant" stays, "wsd" (warmup-stable-decay) stays and falls linearly over the last
    `decay_share` of total_steps. Past total_steps the factor stays where it ended.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if shape == "constant":
        return 1.0
    if shape == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif shape == "linear":
        left = 1 - done
    elif shape == "wsd":
        left = min(1.0, max(0.0, total_steps - step) / max(1.0, decay_share * total_steps))
    else:
        raise ValueError(f"schedule shape {shape!r}: one of {', '.join(SHAPES)}")
    return min_ratio + (1 - min_ratio) * left


class RelativeSchedule:
    """Writes `group["lr"] = group["initial_lr"] * lr_factor(step)` for every group of the optimiser.

    warmup_steps, total_steps: in optimiser steps; 0 warm-up steps is allowed. Call `.step()` after each
    optimiser step that really happened. A group's base LR is its "initial_lr", taken from its "lr" where
    the group has none. Raises ValueError for an unknown shape or a warm-up longer than the run.

    device: keep the step count and the rates there, as float32 tensors, so that `.step(happened)` with a
    tensor never makes the host wait. By default they are plain numbers.
    """

    def __init__(self, optimizer, warmup_steps, total_steps, shape="cosine", min_ratio=0.0, device=None):
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(f"warm-up of {warmup_steps} steps in a run of {total_steps}")
        lr_factor(0, warmup_steps, total_steps, shape)  # an unknown shape fails here, not hours later
        if shape not in SHAPES:
            raise ValueError(f"schedule shape {shape!r}: one of {', '.join(SHAPES)}")
        self.optimizer = optimizer
        self.arguments = (warmup_steps, total_steps, shape, min_ratio)
        self.steps = 0
        self.scale = 1.0  # one factor for all groups, below 1 after a rollback
        self.table = None
        if device is not None:
            self.steps = torch.zeros((), dtype=torch.int64, device=device)
            self.table = torch.tensor([self.factor(step) for step in range(total_steps + 1)], device=device)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._write()

    def factor(self, step):
        """The factor at a step, by which every group's base LR is multiplied."""
        return self.scale * lr_factor(step, *self.arguments)

    def step(self, happened=True):
        """On to the next step, if this one happened: a bool, or a bool tensor on the schedule's device."""
        self.steps += bool(happened) if self.table is None else happened
        self._write()

    def rescale(self, by):
        """Multiply the rates of all groups from here on by one number; their ratio stays."""
        self.scale *= by
        self._write()

    def _write(self):
        if self.table is None:
            factor = self.factor(self.steps)
        else:
            factor = self.scale * self.table[self.steps.clamp(max=len(self.table) - 1)]
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor  # the only line that writes a learning rate

    def state_dict(self):
        return {"steps": int(self.steps), "scale": self.scale}

    def load_state_dict(self, state):
        self.steps = self.steps * 0 + state["steps"]
        self.scale = state["scale"]
        self._write()
