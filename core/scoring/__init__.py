"""From a checkpoint and recordings to scores."""
from .evaluation import SILENCE_DBFS, Evaluation, Scorer, evaluate, is_silent, window_scores
from .restore import (
    calibration_of,
    find_checkpoint,
    has_sigmoids,
    is_multi_label,
    restore,
    weights_of,
)

__all__ = ["SILENCE_DBFS", "Evaluation", "Scorer", "calibration_of", "evaluate", "find_checkpoint",
           "has_sigmoids", "is_multi_label", "is_silent", "restore", "weights_of", "window_scores"]
