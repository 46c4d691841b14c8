"""Does warm-up harm fine-tuning, or one learning rate for all groups?

    python experiments/warmup.py
    python experiments/warmup.py --scale 10

Four arms from the same pretrained start:

* no warm-up;
* 5 epochs of warm-up in which each group rises to its own rate, as train.py does;
* 5 epochs in which only the head is trained;
* the scheduler of an earlier system, which is only in this file: it writes one rate to all groups,
  from a tenth of the head's rate to the head's rate in 5 epochs, then follows the cosine.

The base rates are the defaults, 5e-5 and 1e-3, which suit AST-base with AudioSet weights. The small
model here needs a backbone rate about ten times as high. So --scale 10 multiplies both rates by
ten. The shared rate is then 20 times too high for the backbone, as it was in the earlier system.
"""

import math
from unittest import mock

from common import study, study_parser, train

CLAIM = ("Relative warm-up does not harm fine-tuning from a pretrained start; one rate for all "
         "groups does.")


class SharedSchedule(train.RelativeSchedule):
    """The earlier system's schedule: the same learning rate in every group.

    It rises linearly from a tenth of the highest base rate to that rate, then falls as a cosine.
    """

    def __init__(self, optimizer, warmup_steps, total_steps, *args, **kwargs):
        self.warmup, self.total = warmup_steps, total_steps
        highest = max(group["lr"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["initial_lr"] = highest
        super().__init__(optimizer, warmup_steps, total_steps, *args, **kwargs)

    def factor(self, step):
        if step < self.warmup:
            return self.scale * (0.1 + 0.9 * step / self.warmup)
        progress = min(1, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.scale * 0.5 * (1 + math.cos(math.pi * progress))


def shared_schedule():
    """Make train.py use the earlier system's schedule, within a `with` block."""
    return mock.patch.object(train, "RelativeSchedule", SharedSchedule)


ARMS = {
    "no warm-up": ["--warmup-epochs", 0],
    "relative warm-up, 5 epochs": ["--warmup-epochs", 5],
    "head alone for 5 epochs": ["--freeze-epochs", 5],
    "one rate for all groups, 5 epochs": (["--warmup-epochs", 5], shared_schedule),
}

if __name__ == "__main__":
    parser = study_parser(__doc__)
    parser.set_defaults(epochs=12, folds=[1, 2, 3, 4, 5])
    parser.add_argument("--scale", type=float, default=1.0,
                        help="factor for the base learning rates of both groups")
    args = parser.parse_args()
    name = "warmup" if args.scale == 1 else f"warmup-x{args.scale:g}"
    rates = ["--lr-backbone", 5e-5 * args.scale, "--lr-head", 1e-3 * args.scale]
    study(name, CLAIM, ARMS, args, extra=rates)
