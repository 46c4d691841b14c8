"""The tables that a run writes: steps.csv, history.csv, events.csv, and TensorBoard events."""
import os
from pathlib import Path

import numpy as np

from metrics import HISTORY_COLUMNS
from util import CsvWriter, atomic_write, csv_rows, open_text

from .progress import Progress

STEP_COLUMNS = ["step", "epoch", "loss", "grad_norm", "lr_backbone", "lr_head", "scale", "clips"]
EPOCH_COLUMNS = [
    "epoch", "train_loss", "train_acc", "val_loss", *HISTORY_COLUMNS, "lr_backbone", "lr_head",
    "seconds", "clips_per_second", "peak_memory_mb", "skipped_steps",
]
EVENT_COLUMNS = ["step", "epoch", "event", "detail"]


class CsvLog:
    """A CSV file that grows row by row.

    Opening it cuts rows whose first column is above `last`: a killed run wrote them after its last
    checkpoint and the resumed run writes them again.
    """

    def __init__(self, path: Path, columns: list[str], last: int = 0):
        rows = []
        if last and path.exists():
            with open_text(path) as file:
                # By name: another version of the program may have written other columns.
                rows = [[row.get(name) or "" for name in columns] for row in csv_rows(file)
                        if is_number_up_to(row.get(columns[0]), last)]
        with atomic_write(path) as file:
            CsvWriter(file).writerows([columns, *rows])
        self.columns = columns
        # Line-buffered, so that a reader can follow the file while the run goes on.
        self.file = open(path, "a", newline="", encoding="utf-8",  # noqa: SIM115
                         errors="backslashreplace", buffering=1)
        self.writer = CsvWriter(self.file)

    def append(self, **values) -> None:
        """Write one row; floats are written so that they read back exactly."""
        self.writer.writerow([values[name] for name in self.columns])

    def sync(self) -> None:
        """Put the rows on disk, before a checkpoint says that they were written."""
        self.file.flush()
        os.fsync(self.file.fileno())


def is_number_up_to(text: str | None, last: int) -> bool:
    return text is not None and text.isdigit() and int(text) <= last


class RunLog:
    """history.csv, steps.csv, events.csv and, if asked for, TensorBoard events of a run."""

    def __init__(self, folder: Path, progress: Progress, tensorboard: bool):
        self.folder = folder
        self.history = CsvLog(folder / "history.csv", EPOCH_COLUMNS, last=progress.epoch)
        self.steps = CsvLog(folder / "steps.csv", STEP_COLUMNS, last=progress.step)
        self.events = CsvLog(folder / "events.csv", EVENT_COLUMNS, last=progress.step)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder / "tensorboard", purge_step=progress.step + 1)
            self._add_pictures(progress.step, "schedule.png", "batch.png")

    def step(self, **row) -> None:
        """Write a row of steps.csv."""
        self.steps.append(**row)
        if self.board:
            for name in ("loss", "grad_norm", "lr_backbone", "lr_head"):
                self.board.add_scalar(f"step/{name}", row[name], row["step"])

    def epoch(self, step: int, **row) -> None:
        """Write a row of history.csv; `step` is its place on TensorBoard's axis."""
        self.history.append(**row)
        if self.board:
            for name, value in row.items():
                if name != "epoch":
                    self.board.add_scalar(f"epoch/{name}", value, step)
            self.board.flush()

    def event(self, step: int, epoch: int, event: str, detail: str) -> None:
        """Write a row of events.csv: skipped, scale, diverged, rollback, unreadable, cache."""
        self.events.append(step=step, epoch=epoch, event=event, detail=detail)

    def finish(self, step: int, flags: dict, metrics: dict) -> None:
        """End of the run, for TensorBoard: pictures, and the flags with the test metrics."""
        if not self.board:
            return
        self._add_pictures(step, "curves.png", "test/confusion.png")
        plain = {name: value if isinstance(value, (bool, int, float)) else str(value)
                 for name, value in flags.items()}
        numbers = {f"test/{name}": value for name, value in metrics.items()
                   if isinstance(value, float)}
        self.board.add_hparams(plain, numbers, run_name=".")
        self.board.close()

    def _add_pictures(self, step, *names):
        from PIL import Image
        for name in names:
            path = self.folder / name
            if path.exists():
                with Image.open(path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                self.board.add_image(name.removesuffix(".png"), pixels, step, dataformats="HWC")

    def sync(self) -> None:
        for log in (self.steps, self.history, self.events):
            log.sync()
