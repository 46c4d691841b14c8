"""Does warm-up harm fine-tuning, or one learning rate for all groups?

    python experiments/warmup.py

Four arms from the same pretrained start: no warm-up; 5 epochs in which each group rises to its own rate (this program's);
5 epochs in which the head alone trains; and the earlier system's scheduler, which wrote one rate to all groups, from 1e-4
up to 1e-3 over 5 epochs, and let the cosine go on from there. That scheduler lives here alone.
"""
import contextlib
import math

from common import parser, study

import train

CLAIM = ("Relative warm-up does not harm fine-tuning from a pretrained start; one rate for all groups does.")


class SharedSchedule(train.RelativeSchedule):
    """The earlier system's: one LR for every group, by epochs, linear from 1e-4 to 1e-3, then cosine from there to 0."""

    def _write(self):
        step, warmup, total = int(self.steps), *self.arguments[:2]
        if step < warmup:
            rate = 1e-4 + (1e-3 - 1e-4) * step / warmup
        else:
            rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, total - warmup))))
        for group in self.optimizer.param_groups:
            group["lr"] = rate


@contextlib.contextmanager
def shared():
    real, train.RelativeSchedule = train.RelativeSchedule, SharedSchedule
    try:
        yield
    finally:
        train.RelativeSchedule = real


ARMS = {
    "no warm-up": ["--warmup-epochs", 0],
    "relative warm-up, 5 epochs": ["--warmup-epochs", 5],
    "head alone for 5 epochs": ["--freeze-epochs", 5],
    "one rate for all groups, 5 epochs": (["--warmup-epochs", 5], shared),
}

if __name__ == "__main__":
    study("warmup", CLAIM, ARMS, parser(__doc__).parse_args())
