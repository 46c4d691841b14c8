"""Where a run stands: everything that the loop counts, as plain numbers for a checkpoint."""
from dataclasses import asdict, dataclass, field


@dataclass
class Progress:
    epoch: int = 0  # epochs finished, validation included
    step_in_epoch: int = 0  # steps of the current epoch done
    step: int = 0  # steps since the start of the run, skipped ones included
    best: float | None = None  # best value of the monitored metric
    best_epoch: int = 0  # counted from 1; of equal values the later epoch, trained at a lower LR
    improved_epoch: int = 0  # when the best value was first reached
    skips_in_row: int = 0  # steps skipped since the last one that was applied
    accuracies: list = field(default_factory=list)  # validation, since the start or a rollback
    # sums over the current epoch
    loss_sum: float = 0.0
    correct: int = 0
    clips: int = 0
    labelled: int | None = None  # clips with a label; all in older checkpoints, which lack this
    skipped: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        if self.labelled is None:
            self.labelled = self.clips
        counts = ("epoch", "step_in_epoch", "step", "best_epoch", "improved_epoch", "skips_in_row",
                  "clips", "labelled", "skipped")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"progress: {name} is {value!r}")

    def to_dict(self) -> dict:
        return asdict(self)

    def count_step(self, loss_sum: float, correct: int, labelled: int, clips: int, applied: bool
                   ) -> None:
        """Add a step with `clips` clips; a skipped one does not enter the epoch's loss."""
        self.step_in_epoch += 1
        self.step += 1
        if not applied:
            self.skipped += 1
            self.skips_in_row += 1
            return
        self.skips_in_row = 0
        self.loss_sum += loss_sum
        self.correct += correct
        self.labelled += labelled
        self.clips += clips

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.clips)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.labelled)

    @property
    def clips_per_second(self) -> float:
        return self.clips / max(1e-9, self.seconds)

    @property
    def epochs_without_improvement(self) -> int:
        return self.epoch - self.improved_epoch

    def end_epoch(self, value: float, higher_is_better: bool, accuracy: float) -> bool:
        """Close the epoch with its monitored value; return whether no epoch before was better."""
        self.epoch += 1
        self.accuracies = [*self.accuracies, accuracy]
        if self.best is None:
            improved = True
        else:
            improved = value > self.best if higher_is_better else value < self.best
        if improved:
            self.best, self.improved_epoch = value, self.epoch
        is_best = value == self.best
        if is_best:
            self.best_epoch = self.epoch
        self.step_in_epoch = self.correct = self.labelled = self.clips = self.skipped = 0
        self.loss_sum = self.seconds = 0.0
        return is_best
