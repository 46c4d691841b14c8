"""Training that went wrong: values that are not finite, or accuracy far below its best."""
import math
from collections.abc import Sequence


class TrainingError(RuntimeError):
    """Training diverged or produced NaNs; the best checkpoint is kept. One line, exit code 3."""


def find_divergence(accuracies: Sequence[float], n_clips: int) -> str | None:
    """Describe how validation accuracy diverges, or return None if it does not.

    accuracies: one per epoch since the start or the last rollback. n_clips: size of the validation
    set. Divergence is either of these, at the last epoch:

    - two falls in a row, to below 2/3 of the best, by more than 2 standard errors;
    - one fall to below half of the best, by more than 4 standard errors.

    The standard error is that of an accuracy over `n_clips` clips, with two correct and two wrong
    clips added so that 8 of 8 is not without error (A. Agresti, B. Coull, 1998). Example: 40.6,
    29.8, 25.0, 19.4% (the run that this check was made for) is found at 25.0%.
    """
    best, last = max(accuracies), accuracies[-1]
    falls = 0
    while falls + 1 < len(accuracies) and accuracies[-1 - falls] < accuracies[-2 - falls]:
        falls += 1
    share = (best * n_clips + 2) / (n_clips + 4)
    error = math.sqrt(share * (1 - share) / (n_clips + 4))
    slow_decline = falls >= 2 and last < best * 2 / 3 and best - last > 2 * error
    sudden_drop = falls >= 1 and last < best / 2 and best - last > 4 * error
    if not slow_decline and not sudden_drop:
        return None
    epochs = "1 epoch" if falls == 1 else f"{falls} epochs"
    return (f"validation accuracy has fallen for {epochs} in a row to {last:.1%}; its best was "
            f"{best:.1%}, its first {accuracies[0]:.1%}")
