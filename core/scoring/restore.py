"""A checkpoint back to a model: its weights, front end, calibration."""
from pathlib import Path

import torch
from torch import nn

from core.run.checkpoint import Checkpoint, CheckpointError, as_checkpoint_error
from core.run.folder import is_being_written, newest_run
from metrics.calibration import check_calibration
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend

MAX_FRAMES = 10**6


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights that are evaluated: averaged ones if the run had an EMA."""
    return checkpoint["ema"] or checkpoint["model"]


def is_multi_label(checkpoint: Checkpoint) -> bool:
    """Whether clips may have several labels, so that each class has a sigmoid of its own."""
    with as_checkpoint_error(checkpoint.path):
        return checkpoint["manifest"].get("label_set") is not None


def calibration_of(checkpoint: Checkpoint) -> dict:
    """{"temperature": float, "thresholds": [float]}; 1 and 0.5 if the checkpoint has none."""
    with as_checkpoint_error(checkpoint.path):
        n_classes = len(checkpoint["classes"])
        uncalibrated = {"temperature": 1.0, "thresholds": [0.5] * n_classes}
        return check_calibration(checkpoint["calibration"] or uncalibrated, n_classes)


def restore(checkpoint: Checkpoint, device: torch.device, averaged: bool = True
            ) -> tuple[AST, nn.Module]:
    """The model and the front end that a checkpoint describes, on a device.

    averaged: take the averaged weights if there are some. Raises CheckpointError if config and
    weights do not fit.
    """
    with as_checkpoint_error(checkpoint.path):
        weights = weights_of(checkpoint) if averaged else checkpoint["model"]
        config = ASTConfig(**checkpoint["config"])
        frontend = FrontendConfig(**checkpoint["frontend"])
        _check_shapes(config, weights)
        n_samples = checkpoint["clip"]["samples"]
        frames_fit = config.patch <= frontend.frames(n_samples) < MAX_FRAMES
        if not frames_fit or frontend.n_mels != config.n_mels:
            raise ValueError(
                f"its clips of {n_samples} samples do not fit its front end and model")
        if len(checkpoint["classes"]) != config.n_classes:
            raise ValueError(f"{len(checkpoint['classes'])} classes for {config.n_classes} logits")
        model = AST(config)
        model.load_state_dict(weights)
        return model.to(device), build_frontend(frontend).to(device)


def _check_shapes(config, weights):
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if config.depth != len(blocks):
        raise ValueError(f"its weights are not of depth {config.depth}")
    with torch.device("meta"):  # shapes without memory, whatever sizes the config claims
        expected = {name: value.shape for name, value in AST(config).state_dict().items()}
    for name in [*expected, *weights]:
        shape = weights[name].shape if name in weights else None
        if expected.get(name) != shape:
            raise ValueError(f"{name[:60]} has shape {shape}, its config gives "
                             f"{expected.get(name)}")


def find_checkpoint(name: str) -> Path:
    """The checkpoint at a path; a bare name that is no file here is taken from the newest run."""
    path = Path(name)
    if path.is_file() or path.name != name:
        return path
    in_newest_run = newest_run("runs", name, with_folds=True)
    if in_newest_run is not None:
        if is_being_written(in_newest_run.parent):
            print(f"note: the newest run, {in_newest_run.parent}, is still being written; for "
                  "another give the path of its checkpoint")
        return in_newest_run
    newest = newest_run("runs", "last.pt")
    if newest is None:
        advice = "train first (python train.py) or give a path"
    else:
        names = ", ".join(sorted(path.name for path in newest.parent.glob("*.pt")))
        advice = f"the newest, {newest.parent}, has {names}"
    raise CheckpointError(f"--ckpt {name}: no such file here, and no run under runs/ has one; "
                          f"{advice}")
