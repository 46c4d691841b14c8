"""Where a run stands: all that the loop counts, as plain numbers that a checkpoint can hold."""
from dataclasses import asdict, dataclass, field


@dataclass
class Progress:
    epoch: int = 0  # whole epochs done, validation included
    window: int = 0  # windows of the current epoch done
    step: int = 0  # windows done since the start of the run
    best: float | None = None  # best value of the monitored figure
    best_epoch: int = 0  # counted from 1; of equal values the later one, trained at a lower LR
    improved_epoch: int = 0  # when the best value was first reached
    skips_in_row: int = 0  # steps skipped since the last one that was not
    accuracies: list = field(default_factory=list)  # of validation, by epoch, since the start or a rollback
    # of the current epoch
    loss_sum: float = 0.0
    correct: int = 0
    clips: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        for name in ("epoch", "window", "step", "best_epoch", "improved_epoch", "skips_in_row", "clips", "skipped"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"progress: {name} is {getattr(self, name)!r}")

    def to_dict(self):
        return asdict(self)

    def count(self, loss_sum, correct, clips, stepped):
        """Add a window; one whose step was skipped does not enter the epoch's loss."""
        self.window += 1
        self.step += 1
        self.skips_in_row = 0 if stepped else self.skips_in_row + 1
        if stepped:
            self.loss_sum += loss_sum
            self.correct += correct
            self.clips += clips
        else:
            self.skipped += 1

    @property
    def loss(self):
        return self.loss_sum / max(1, self.clips)

    @property
    def accuracy(self):
        return self.correct / max(1, self.clips)

    @property
    def clips_per_second(self):
        return self.clips / max(1e-9, self.seconds)

    @property
    def stale(self):
        """Epochs since the best value was first reached."""
        return self.epoch - self.improved_epoch

    def end_epoch(self, value, lower_is_better, accuracy):
        """Close the epoch with its monitored value -> whether none before was better."""
        self.epoch += 1
        self.accuracies = [*self.accuracies, accuracy]
        if self.best is None or (value < self.best if lower_is_better else value > self.best):
            self.best, self.improved_epoch = value, self.epoch
        better = value == self.best
        if better:
            self.best_epoch = self.epoch
        self.window = self.correct = self.clips = self.skipped = 0
        self.loss_sum = self.seconds = 0.0
        return better
