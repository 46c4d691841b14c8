"""`Learner`: everything that an optimizer step reads or changes."""
import contextlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from core.device.compiled import Compiled
from core.device.distributed import Distributed
from core.device.memory import BatchSplitter
from core.device.precision import Precision
from core.ema import EMA
from core.run.checkpoint import Checkpoint, as_checkpoint_error
from data.augment import Augment
from data.clip_rng import Purpose, uniform
from data.clips import Batch
from losses import soft_target
from model.ast import AST
from model.groups import freeze_backbone
from sched import RelativeSchedule


@dataclass
class Learner:
    """A model with all that trains it. No other code knows what the training state is."""
    model: AST
    frontend: nn.Module
    augment: Augment
    loss_fn: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: RelativeSchedule
    precision: Precision
    clip_grad: float = math.inf  # largest norm of the gradients
    patchout: float = 0.0  # share of each clip's patches to leave out
    ema: EMA | None = None
    distributed: Distributed = field(default_factory=Distributed)
    splitter: BatchSplitter = field(default_factory=BatchSplitter)
    compiled: Compiled | None = None

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @torch.no_grad()
    def model_input(self, batch: Batch, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented spectrograms (B, n_mels, frames) and soft labels (B, classes), on the device.

        Batch.wave is (B, samples). Every random number belongs to a clip and an epoch.
        """
        wave = self._to_device(batch.wave)
        target = soft_target(self._to_device(batch.target), self.model.config.n_classes)
        noise = None if batch.noise is None else self._to_device(batch.noise)
        wave, target = self.augment.waves(wave, target, noise, epoch, batch.clip_ids)
        specs = [self.frontend(wave[part]) for part in self.splitter.slices(len(wave))]
        spec = specs[0] if len(specs) == 1 else torch.cat(specs)
        silence = self.frontend.silence(spec)
        return self.augment.spectrograms(spec, silence, epoch, batch.clip_ids), target

    def model_draws(self, batch: Batch, epoch: int, frames: int
                    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Random numbers for the model: drop-path noise (B, 2 * depth), patch ids (B, k) to keep.

        Each is None if it is not used.
        """
        config, seed = self.model.config, self.augment.seed
        drop_noise, patch_ids = None, None
        if config.drop_path > 0:
            n = 2 * config.depth  # two branches per block
            drop_noise = uniform(seed, epoch, batch.clip_ids, Purpose.DROP_PATH, n)
            drop_noise = self._to_device(torch.from_numpy(drop_noise).float())
        if self.patchout > 0:
            n_patches = math.prod(config.patches(frames))
            n_left = max(1, round(n_patches * (1 - self.patchout)))
            order = uniform(seed, epoch, batch.clip_ids, Purpose.PATCHOUT, n_patches).argsort(1)
            patch_ids = self._to_device(torch.from_numpy(np.sort(order[:, :n_left], axis=1)))
        return drop_noise, patch_ids

    def _to_device(self, tensor):
        return tensor.to(self.device, non_blocking=True)

    def forward(self, spec: torch.Tensor, drop_noise: torch.Tensor | None,
                patch_ids: torch.Tensor | None) -> torch.Tensor:
        """(B, n_mels, frames) -> logits (B, classes), by the compiled model if there is one."""
        return (self.compiled or self.model)(spec, drop_noise, patch_ids)

    def zero_grad(self) -> None:
        # CUDA graphs write gradients to fixed places, so these are zeroed instead of dropped.
        uses_graphs = self.compiled is not None and self.compiled.graphs
        self.optimizer.zero_grad(set_to_none=not uses_graphs)

    def allocate_moments(self) -> None:
        """Let the fused AdamW allocate its moments now instead of in the first step.

        A step that is declared not finite does it, and leaves weights and counters alone.
        """
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.found_inf = torch.ones((), device=self.device)
        self.optimizer.step()
        del self.optimizer.found_inf
        self.zero_grad()

    def freeze_backbone(self, frozen: bool) -> None:
        """Train the head alone if `frozen`, else all parameters."""
        if not freeze_backbone(self.model, frozen):
            return
        if self.compiled is not None:
            self.compiled.reset()  # compiled code keeps the old choice of parameters to train
        uses_graphs = self.compiled is not None and self.compiled.graphs
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.grad = None  # else weight decay would go on
            elif uses_graphs and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def lrs(self) -> dict:
        """The learning rates of backbone and head that the next step will use."""
        lrs = {group["name"].removesuffix("_no_decay"): group["lr"]
               for group in self.optimizer.param_groups}
        return {"lr_backbone": lrs.get("backbone", 0.0), "lr_head": lrs.get("head", 0.0)}

    def averaged_weights(self) -> AbstractContextManager:
        """The model with its averaged weights, if there are any, for the block."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    # --- training state ---

    def state_dict(self) -> dict:
        """The training state, as parts of a checkpoint (`core.run.checkpoint.PARTS`)."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "ema_updates": float(self.ema.updates) if self.ema else 0.0,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "amp": self.precision.mode,
            "device": self.device.type,
            "split_limit": self.splitter.limit,
        }

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint whose weights the model already has.

        Learning rates and weight decay come from the flags; the optimizer's moments come from the
        checkpoint. Raises CheckpointError.
        """
        with as_checkpoint_error(checkpoint.path):
            groups = self.optimizer.state_dict()["param_groups"]
            state = checkpoint["optimizer"]["state"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self._check_moments()
            self.schedule.load_state_dict(checkpoint["schedule"])
            if self.ema:
                self.ema.load_state_dict(checkpoint["ema"], checkpoint["ema_updates"])
            if checkpoint["scaler"]:  # empty if the run had none, on another device
                self.precision.scaler.load_state_dict(checkpoint["scaler"])
            self.splitter.limit = checkpoint["split_limit"]

    def _check_moments(self):
        for parameter, moments in self.optimizer.state.items():
            if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError("its optimizer is not AdamW")
            for value in moments.values():
                if value.shape not in (parameter.shape, ()) or not torch.isfinite(value).all():
                    raise ValueError("its optimizer's moments do not fit its weights")

    def load_best(self, checkpoint: Checkpoint) -> None:
        """Go back to the weights and moments of an earlier checkpoint of this run."""
        self.model.load_state_dict(checkpoint["model"])
        if self.ema:
            self.ema.load_state_dict(checkpoint["ema"], checkpoint["ema_updates"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:
            self.precision.scaler.load_state_dict(checkpoint["scaler"])
