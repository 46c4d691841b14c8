"""Which epoch is the best, and when to stop."""
from core.run.progress import Progress


def end_epochs(values, higher_is_better=True):
    """[(is best, best epoch, epochs without improvement)] after each epoch."""
    progress, states = Progress(), []
    for value in values:
        is_best = progress.end_epoch(value, higher_is_better, accuracy=value)
        states.append((is_best, progress.best_epoch, progress.epochs_without_improvement))
    return states


def test_later_of_equal_epochs_is_best_but_patience_is_not_reset():
    assert end_epochs([0.5, 0.7, 0.6, 0.7, 0.7]) == [
        (True, 1, 0), (True, 2, 0), (False, 2, 1), (True, 4, 2), (True, 5, 3)]


def test_lower_loss_is_better():
    assert end_epochs([2.0, 3.0, 1.0], higher_is_better=False) == [
        (True, 1, 0), (False, 1, 1), (True, 3, 0)]


def test_skipped_step_does_not_enter_the_loss():
    progress = Progress()
    progress.count_step(8.0, 3, 4, 4, applied=True)
    progress.count_step(float("nan"), 0, 4, 4, applied=False)
    assert (progress.loss, progress.accuracy, progress.skipped) == (2.0, 0.75, 1)
    assert (progress.step, progress.step_in_epoch, progress.skips_in_row) == (2, 2, 1)
    assert Progress(**progress.to_dict()) == progress
    progress.end_epoch(0.5, True, 0.5)
    assert (progress.step_in_epoch, progress.clips, progress.skipped, progress.step) == (0, 0, 0, 2)
