"""One process of distributed steps in float64, for test_ranks.py: torchrun ... rank_step.py OUT SIZES...

For each of SIZES (3,3,2 cuts 8 clips so; 4,4:6 has NaN in clip 6) takes its micro-batches of the window, makes
one train_step and saves, on every rank, the gradients that the optimiser saw.
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch

import train
from core.distributed import Ranks
from core.precision import Precision
from data.augment import Augment
from model.ast import AST, ASTConfig
from model.groups import parameter_groups
from sched import RelativeSchedule
from test_train import DoubleFocal, Through, cut


def step(ranks, sizes, poison=None):
    """-> (gradients by name, figures, schedule steps) of one train_step over this rank's share."""
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2, n_mels=32, time_patches=4, drop_path=0.3)).double().train()
    generator = torch.Generator().manual_seed(1)
    wave = torch.randn(8, 32 * 40, dtype=torch.float64, generator=generator)
    target = torch.rand(8, 3, dtype=torch.float64, generator=generator).softmax(1)
    if poison is not None:
        wave[poison] = float("nan")
    window = cut(wave, target, sizes)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.0, 0.0), lr=0.0)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    schedule = RelativeSchedule(optimizer, 0, 10)
    t = train.Training(model, Through(), Augment(freq_mask=4, time_mask=4, specaug_p=1.0), DoubleFocal(), optimizer, schedule,
                       Precision(torch.device("cpu"), None, ""), float("inf"), ranks=ranks)
    figures, losses = train.train_step(t, window[ranks.rank::ranks.size], 3, sum(sizes))
    return {"gradients": seen, "figures": figures.tolist(), "steps": schedule.steps,
            "clips": [row for rows, _ in losses for row in rows.tolist()]}


if __name__ == "__main__":
    here = Ranks()
    here.start(torch.device("cpu"))
    found = {}
    for text in sys.argv[2:]:
        sizes, _, poison = text.partition(":")
        found[text] = step(here, [int(size) for size in sizes.split(",")], int(poison) if poison else None)
    torch.save(found, f"{sys.argv[1]}.{here.rank}")
    here.stop()
