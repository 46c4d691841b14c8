"""One process of distributed steps in float64, for test_ranks.py.

    torchrun ... rank_step.py OUT STEP...

STEP: the sizes of the micro-batches of 8 clips, as 3,3,2; with NaN in clip 6, as 4,4:6. Each rank
makes one train_step of its share of them, and saves what it got in OUT.<rank>.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from float64 import DoubleFocal, Through, cut

import train
from core.device.distributed import Distributed
from core.device.precision import Precision
from core.learner import Learner
from data.augment import Augment
from model.ast import AST, ASTConfig
from model.groups import parameter_groups
from sched import RelativeSchedule

CPU = torch.device("cpu")


def step(distributed, sizes, nan_clip=None):
    """One train_step over this rank's share of the micro-batches.

    -> dict of gradients (by name, as the optimizer saw them), numbers (6,), n_steps of the
    schedule, clips of this rank
    """
    torch.manual_seed(0)
    config = ASTConfig(3, dim=16, depth=2, heads=2, n_mels=32, time_patches=4, drop_path=0.3)
    model = AST(config).double().train()
    generator = torch.Generator().manual_seed(1)
    wave = torch.randn(8, 32 * 40, dtype=torch.float64, generator=generator)
    target = torch.rand(8, 3, dtype=torch.float64, generator=generator).softmax(1)
    if nan_clip is not None:
        wave[nan_clip] = float("nan")
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.0, 0.0), lr=0.0)
    gradients = {}

    def record(*_):
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
    optimizer.register_step_pre_hook(record)
    schedule = RelativeSchedule(optimizer, 0, 10)
    augment = Augment(freq_mask=4, time_mask=4, specaug_p=1.0)
    learner = Learner(model, Through(), augment, DoubleFocal(), optimizer, schedule,
                      Precision(CPU, None, ""), distributed=distributed)
    micro_batches = cut(wave, target, sizes)[distributed.rank::distributed.size]
    result = train.train_step(learner, micro_batches, 3, sum(sizes))
    return {"gradients": gradients, "numbers": result.numbers.tolist(), "n_steps": schedule.steps,
            "clips": [row for rows, _ in result.losses for row in rows.tolist()]}


def parse(text):
    """STEP -> (sizes, clip with NaN or None)"""
    sizes, _, nan_clip = text.partition(":")
    return [int(size) for size in sizes.split(",")], int(nan_clip) if nan_clip else None


if __name__ == "__main__":
    distributed = Distributed()
    distributed.start(CPU)
    results = {text: step(distributed, *parse(text)) for text in sys.argv[2:]}
    torch.save(results, f"{sys.argv[1]}.{distributed.rank}")
    distributed.stop()
