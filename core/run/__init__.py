"""The run on disk: folder, lock, logs, checkpoints, progress, signals."""
from .checkpoint import CheckpointError
from .folder import RunError
from .run import Run, StepResult
from .signals import Interrupted, StopRequest

__all__ = ["CheckpointError", "Interrupted", "Run", "RunError", "StepResult", "StopRequest"]
