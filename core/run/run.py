"""`Run`: everything that a training run has on disk, and where it stands."""
import collections
import contextlib
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from core.device.distributed import Distributed
from core.device.host_copy import HostCopy
from core.divergence import TrainingError
from data.files import find_outage
from data.manifest import DataError, Manifest
from data.scan import write_bad_files
from data.splits import write_split
from data.workers import WorkerError
from util import is_disk_error, write_json

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    SaveTimer,
    as_checkpoint_error,
    link,
    save_checkpoint,
)
from .folder import RunError, create_run, open_run
from .log import RunLog
from .origin import read_run_info
from .progress import Progress
from .signals import Interrupted, StopRequest


class StepNumbers(NamedTuple):
    """What one optimizer step gave, over all ranks."""
    loss_sum: float
    n_correct: float
    grad_norm: float
    applied: float  # 1, or 0 for a step that was skipped because it was not finite
    scale: float  # of the fp16 loss
    lr_backbone: float  # that the step used
    lr_head: float


@dataclass
class StepResult:
    """A step's numbers, which need not have been computed yet on a GPU.

    Make it right after the step. Their copy to the host is queued then, so that a later read waits
    for this step and not for the next one.
    """
    numbers: torch.Tensor  # (5,), the first of StepNumbers
    losses: list[tuple[np.ndarray, torch.Tensor]]  # rows and loss of each clip on this rank
    n_clips: int  # over all ranks
    lrs: dict  # "lr_backbone", "lr_head" -> the LR that the step used, a number or a tensor

    def __post_init__(self):
        self._copied_lrs = [name for name, lr in self.lrs.items() if isinstance(lr, torch.Tensor)]
        copied = self.numbers
        if self._copied_lrs:
            lrs = torch.stack([self.lrs[name] for name in self._copied_lrs])
            copied = torch.cat([self.numbers, lrs])  # one copy for all
        self._copy = HostCopy(copied)

    def read(self) -> StepNumbers:
        """Wait for the GPU to finish this step, if it has not yet."""
        values = self._copy.read().tolist()
        n = len(self.numbers)
        lrs = self.lrs | dict(zip(self._copied_lrs, values[n:]))
        return StepNumbers(*values[:n], **lrs)


class Run:
    """A run folder, the progress in it, and the step results that are not read yet.

    All ranks have a Run and take the same decisions with it; only the first one writes. What it
    writes is described in docs/outputs.md. A run goes through `open`, then `create` (a new run) or
    `load_state` (a resumed one), then `begin`.
    """

    def __init__(self, folder: Path, distributed: Distributed, stop: StopRequest):
        self.folder, self.distributed, self.stop = folder, distributed, stop
        self.progress = Progress()
        self.epoch = 0  # of the loop; progress.epoch is already one higher after an epoch has ended
        self.calibration = None  # from the last validation
        self.log = None  # RunLog, on the first rank
        self._pending = collections.deque()  # step results not read yet
        self._bar = None
        self._epoch_started = time.perf_counter()
        self._cache_problems = set()  # reported once each
        self._save_reported = False
        self.is_named = True  # by a person, who must find it under that name
        self.command = None  # that continues the run, if it is not the usual one
        distributed.is_stopping = lambda: stop.requested

    @classmethod
    def open(cls, run_dir: str | None, resume: str | None, data_name: str,
             distributed: Distributed, stop: StopRequest) -> tuple["Run", Checkpoint | None]:
        """Find the run's folder, and the checkpoint to continue from if there is one.

        See `folder.open_run` for the four ways in which a run can start.
        """
        folder, checkpoint, notes = distributed.on_first_rank(
            lambda: open_run(run_dir, resume, data_name))
        for note in notes:
            print(note)
        run = cls(folder, distributed, stop)
        run.is_named = run_dir is not None
        return run, checkpoint

    # --- start ---

    def create(self, manifest: Manifest, bad_files: list, info: dict, may_exist: bool) -> None:
        """Make the folder of a new run, with run.json (from `info`), split.csv, bad_files.csv."""
        def create():
            folder = create_run(self.folder, may_exist, may_rename=not self.is_named)
            write_bad_files(bad_files, folder / "bad_files.csv")
            write_split(manifest, folder / "split.csv")
            write_json(folder / "run.json", info)
            return folder
        self.folder = self.distributed.on_first_rank(create)

    def update_info(self, info: dict) -> None:
        """Make the run.json of a resumed run say where the data are now, or write it from `info`
        if there is none. `evaluate.py` reads the recordings that it names."""
        def update():
            path = self.folder / "run.json"
            old = read_run_info(self.folder) or info
            if not path.exists() or old["data"]["root"] != info["data"]["root"]:
                write_json(path, old | {"data": old["data"] | {"root": info["data"]["root"]}})
        self.distributed.on_first_rank(update)

    def begin(self, manifest: Manifest, bad_files: list, constant: dict, *, save_every: str,
              max_skips: int, max_bad_share: float, read_late: bool, tensorboard: bool) -> None:
        """Open the logs; from here on signals save the run.

        constant: parts of the checkpoint that stay the same during the run. read_late: read the
        results of a step one step later, so that the host does not wait for the GPU.
        """
        self.manifest, self.bad_files, self.constant = manifest, bad_files, constant
        self.max_skips, self.max_bad_share = max_skips, max_bad_share
        self.lag = 1 if read_late else 0
        self.timer = SaveTimer(save_every)
        self.epoch = self.progress.epoch - 1  # of the last finished epoch, until the loop starts
        if self.distributed.is_first:
            self.log = RunLog(self.folder, self.progress, tensorboard)
        self.stop.armed = True

    def load_state(self, checkpoint: Checkpoint, calibration: dict) -> None:
        """Take over where a checkpoint stands."""
        with as_checkpoint_error(checkpoint.path):
            self.progress = Progress(**checkpoint["progress"])
        self.calibration = calibration
        print(f"resumed after step {self.progress.step}, in epoch {self.progress.epoch + 1}")

    # --- within an epoch ---

    def progress_bar(self, steps: Iterable, epoch: int, epochs: int, total: int) -> Iterator:
        """Iterate over the rest of an epoch's steps, with a progress bar on a terminal."""
        self.epoch = epoch
        self._epoch_started = time.perf_counter() - self.progress.seconds
        is_shown = self.distributed.is_first and sys.stderr.isatty()
        self._bar = tqdm(steps, desc=f"epoch {epoch + 1}/{epochs}", unit="step", total=total,
                         initial=self.progress.step_in_epoch, leave=False, disable=not is_shown)
        return iter(self._bar)

    def is_save_due(self) -> bool:
        return self.distributed.is_first and self.timer.is_due(self.progress.step)

    def add_step(self, result: StepResult) -> None:
        """Take the result of a step; it is read now, or after the next step on a GPU."""
        self._pending.append(result)
        self.read_pending_steps(leave=self.lag)

    def pass_over_step(self) -> None:
        """Pass over a step none of whose clips can be read."""
        self.read_pending_steps()
        self.progress.step_in_epoch += 1

    def read_pending_steps(self, leave: int = 0) -> None:
        """Read, count and log the results of all steps but the last `leave`.

        All ranks call it at the same point, because naming the clips of a skipped step gathers
        from all. Raises TrainingError after `max_skips` skipped steps in a row.
        """
        while len(self._pending) > leave:
            self._read_step(self._pending.popleft())

    def _read_step(self, result):
        numbers, progress = result.read(), self.progress
        progress.count_step(numbers.loss_sum, int(numbers.n_correct), result.n_clips,
                            applied=numbers.applied == 1)
        progress.seconds = time.perf_counter() - self._epoch_started
        if self.log:
            self.log.step(step=progress.step, epoch=progress.epoch + 1,
                          loss=numbers.loss_sum / result.n_clips, grad_norm=numbers.grad_norm,
                          clips=result.n_clips, scale=numbers.scale,
                          lr_backbone=numbers.lr_backbone, lr_head=numbers.lr_head)
        if numbers.applied != 1 and numbers.scale > 1 and math.isfinite(numbers.loss_sum):
            # The search for the largest scale that fp16 can do with; the clips are sound.
            self.event("scale", f"fp16 gradients overflowed, so the step was skipped and the loss "
                                f"scale of {numbers.scale:g} is lowered")
        elif numbers.applied != 1:
            names = ", ".join(self._suspected_clips(result.losses))
            self.event("skipped", f"loss or gradients are not finite; clips: {names}")
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {progress.loss:.3f}, acc {progress.accuracy:.1%}, "
                f"LR {numbers.lr_backbone:.1e} {numbers.lr_head:.1e}, "
                f"{progress.clips_per_second:.1f} clips/s", refresh=False)
        if progress.skips_in_row >= self.max_skips:
            raise TrainingError(
                f"{progress.skips_in_row} steps in a row have a loss or gradients that are not "
                f"finite (--max-skips); {self.best_note()}; look at the clips named above, lower "
                "the learning rates, or try --amp off")

    def _suspected_clips(self, losses):
        """Paths of a skipped step's clips whose loss is not finite, else of all its clips."""
        not_finite, every_clip = [], []
        for rows, clip_losses in losses:
            for row, loss in zip(rows, clip_losses.tolist()):
                path = self.manifest.paths[row]
                every_clip.append(path)
                if not math.isfinite(loss):
                    not_finite.append(path)
        ranks = self.distributed.all_gather((not_finite, every_clip))
        suspected = [path for paths, _ in ranks for path in paths]
        return suspected or [path for _, paths in ranks for path in paths]

    def event(self, kind: str, detail: str) -> None:
        """Print something out of the ordinary and write it to events.csv."""
        tqdm.write(f"step {self.progress.step}: {kind}: {detail}", file=sys.stdout)
        if self.log:
            self.log.event(self.progress.step, self.epoch + 1, kind, detail)

    def report_cache_problems(self, problems: Iterable[str | None]) -> None:
        """Report each problem with the cache of decoded audio once."""
        for problem in set(problems) - self._cache_problems - {None}:
            self._cache_problems.add(problem)
            self.event("cache", problem)

    def report_unreadable(self, broken: list[tuple[int, str]], learner) -> None:
        """List the clips of all ranks that turned out to be unreadable, once each.

        broken: (row, reason) of this rank's clips. Saves and raises DataError if too many of the
        recordings are unreadable by now. learner: None if the run is already saved.
        """
        known = {path for path, _ in self.bad_files}
        reasons = {self.manifest.paths[row]: reason
                   for pairs in self.distributed.all_gather(broken) for row, reason in pairs}
        new = {path: reason for path, reason in reasons.items() if path not in known}
        outage = self.distributed.on_first_rank(
            lambda: find_outage(self.manifest.root, new, self.manifest.paths))
        if outage:
            self.save(learner)
            raise DataError(
                f"the data are not there: {outage}; nothing is marked as unreadable; bring them "
                f"back, then continue with --resume --run-dir {self.folder}")
        for path, reason in reasons.items():
            if path not in known:
                self.bad_files.append((path, reason))
                self.event("unreadable", f"left out: {path}: {reason}")
        if self.distributed.is_first:
            write_bad_files(self.bad_files, self.folder / "bad_files.csv")
        if len(self.bad_files) > self.max_bad_share * (len(self.manifest) + len(known)):
            self._save_if_needed(learner)
            raise DataError(
                f"--data {self.manifest.root}: {len(self.bad_files)} files are unreadable by now, "
                f"more than --max-bad-share {self.max_bad_share:g}; repair them and continue with "
                f"--resume --run-dir {self.folder}")

    # --- checkpoints ---

    def save(self, learner) -> None:
        """Write last.pt. All ranks call it, because it reads the pending steps first."""
        self.read_pending_steps()
        if not self.distributed.is_first:
            return
        self.log.sync()  # the rows must be on disk before a checkpoint counts them
        path = self.folder / "last.pt"
        parts = {
            **self.constant,
            **learner.state_dict(),
            "manifest": self.manifest.to_dict(),
            "bad_files": self.bad_files,
            "progress": self.progress.to_dict(),
            "calibration": self.calibration,
        }
        try:
            n_bytes, seconds = save_checkpoint(path, parts)
        except CheckpointError as error:  # its message ends with "continue with --resume"
            raise CheckpointError(f"{error} --run-dir {shlex.quote(str(self.folder))}") from None
        self.timer.saved()
        if not self._save_reported:
            print(f"checkpoint: {path.name}, {n_bytes / 1e6:.1f} MB, written in {seconds:.2f} s")
            self._save_reported = True

    def _save_if_needed(self, learner):
        if learner is not None:
            self.save(learner)

    def link_best(self) -> None:
        """Make best.pt the checkpoint that was just saved."""
        if self.distributed.is_first:
            link(self.folder / "last.pt", self.folder / "best.pt")

    def interrupt(self, learner) -> None:
        """Save after a signal, print how to continue, and raise Interrupted on all ranks.

        learner: None if the run is already saved.
        """
        self._save_if_needed(learner)
        print(f"saved after step {self.progress.step}; continue with:\n  {self.resume_command()}",
              flush=True)
        raise Interrupted(max(self.distributed.all_gather(self.stop.exit_code)))

    def resume_command(self) -> str:
        """The command that continues this run."""
        if self.command is not None:
            return self.command
        start = "python"
        if self.distributed.size > 1:
            start = f"torchrun --nproc-per-node {self.distributed.size}"
        return f"{start} train.py --resume --run-dir {shlex.quote(str(self.folder))}"

    @contextlib.contextmanager
    def guarded(self, learner=None) -> Iterator[None]:
        """Turn errors of disks and the end of a worker process into one line that says how to go
        on. The run is saved if a worker has ended.

        learner: None if there is nothing to save. Raises RunError or WorkerError.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            if is_disk_error(error):
                raise RunError(
                    f"{error.filename or self.folder}: cannot be read or written "
                    f"({error.strerror}); free some space, permit writing or reconnect the disk, "
                    f"then {self._how_to_continue()}") from None
            if not isinstance(error, WorkerError):
                raise
            if self.distributed.size == 1:  # the other ranks are in another place
                self._save_if_needed(learner)
            raise WorkerError(f"{error}, {self._how_to_continue()}") from None

    def _how_to_continue(self):
        if (self.folder / "last.pt").exists() or self.command is not None:
            return f"continue after the last checkpoint with: {self.resume_command()}"
        return "give the same command again with another --run-dir, or with --resume auto"

    def best_note(self) -> str:
        if self.progress.best_epoch:
            return f"best.pt of epoch {self.progress.best_epoch} is kept"
        return "no epoch was completed"
