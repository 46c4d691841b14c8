"""Which augmentation and regularization helps, one at a time and together?

    python experiments/augmentation.py
"""

from common import rates, study, study_parser

CLAIM = ("Each of these alone changes little on 240 recordings; together they gain more than any "
         "one of them.")
SPECAUGMENT = ["--freq-mask", 15, "--time-mask", 35]
MIXUP = ["--mixup-alpha", 0.4]
ALL = [*SPECAUGMENT, *MIXUP, "--shift-p", 1, "--gain", 6, "--noise-p", 0.3, "--filter-p", 0.3]
ARMS = {
    "baseline": [],
    "SpecAugment": SPECAUGMENT,
    "MixUp": MIXUP,
    "circular shift": ["--shift-p", 1],
    "background noise": ["--noise-p", 0.5],
    "filters": ["--filter-p", 0.5],
    "average of the weights": ["--ema", 0.98],
    "layer decay": ["--layer-decay", 0.75],
    "drop-path": ["--drop-path", 0.1],
    "patchout": ["--patchout", 0.3],
    "all augmentation": ALL,
    "all, and average": [*ALL, "--ema", 0.98],
}

if __name__ == "__main__":
    args = study_parser(__doc__).parse_args()
    study("augmentation", CLAIM, ARMS, args, rates(args))
