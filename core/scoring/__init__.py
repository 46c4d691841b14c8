"""From a checkpoint and recordings to scores."""
from .evaluation import Evaluation, Scorer, evaluate, window_scores
from .restore import (
    calibration_of,
    find_checkpoint,
    is_multi_label,
    restore,
    weights_of,
)

__all__ = ["Evaluation", "Scorer", "calibration_of", "evaluate", "find_checkpoint",
           "is_multi_label", "restore", "weights_of", "window_scores"]
