"""Which recipe of train.py is best: baseline, augmented or best?

    python experiments/recipe.py

On every fold from a pretrained start, and on the first fold from random weights.
"""

import argparse

from common import study, study_parser

CLAIM = ("The recipe best is better than augmented, and that than baseline, from a pretrained "
         "start.")
RANDOM_CLAIM = ("The recipe best is better than augmented, and that than baseline, from random "
                "weights.")
ARMS = {recipe: ["--recipe", recipe] for recipe in ("baseline", "augmented", "best")}

if __name__ == "__main__":
    parser = study_parser(__doc__)
    parser.set_defaults(folds=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    study("recipe", CLAIM, ARMS, args)
    changes = {"folds": args.folds[:1], "weights": "none"}
    study("recipe-random", RANDOM_CLAIM, ARMS, argparse.Namespace(**vars(args) | changes))
