"""When the numbers go wrong: values that are not finite, and validation that falls away from its best."""
import math


class NumbersError(RuntimeError):
    """The numbers went wrong and the run stops with its best checkpoint kept: one line, exit code 3."""


def diverged(history, clips):
    """Whether validation accuracy falls away from its best -> a line that says how, or None.

    history: accuracy of each epoch since the start or the last rollback, the first one being the run's own
    reference; clips: size of the validation set. Called after two falls in a row to below two thirds of the
    best, or after one to below half, if the distance from the best is more than 2 (for one fall: 4)
    standard errors of an accuracy over so many clips (A. Agresti, B. Coull, 1998: two right and two wrong clips
    added, so that 8 of 8 is not without error). The run that this is made for had 40.6, 29.8, 25.0
    and 19.4%: called at 25.0.
    """
    best = max(history)
    now = history[-1]
    falls = 0
    while falls + 1 < len(history) and history[-1 - falls] < history[-2 - falls]:
        falls += 1
    share = (best * clips + 2) / (clips + 4)
    error = math.sqrt(share * (1 - share) / (clips + 4))
    if (falls >= 2 and now < best * 2 / 3 and best - now > 2 * error
            or falls >= 1 and now < best / 2 and best - now > 4 * error):
        return (f"validation accuracy has fallen to {now:.1%}, {falls} epoch{'s' * (falls > 1)} in a row; its best was "
                f"{best:.1%}, its first {history[0]:.1%}")
    return None
