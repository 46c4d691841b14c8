"""Which epoch is the best, and when to stop."""
from core.progress import Progress


def epochs(values, lower=False):
    progress, out = Progress(), []
    for value in values:
        better = progress.end_epoch(value, lower, value)
        out.append((better, progress.best_epoch, progress.stale))
    return out


def test_of_equal_epochs_the_later_is_kept_but_patience_runs_on():
    assert epochs([0.5, 0.7, 0.6, 0.7, 0.7]) == [(True, 1, 0), (True, 2, 0), (False, 2, 1), (True, 4, 2), (True, 5, 3)]


def test_a_loss_is_better_when_lower():
    assert epochs([2.0, 3.0, 1.0], lower=True) == [(True, 1, 0), (False, 1, 1), (True, 3, 0)]


def test_a_skipped_step_does_not_enter_the_loss():
    progress = Progress()
    progress.count(8.0, 3, 4, True)
    progress.count(float("nan"), 0, 4, False)
    assert (progress.loss, progress.accuracy, progress.skipped, progress.step, progress.window) == (2.0, 0.75, 1, 2, 2)
    assert Progress(**progress.to_dict()) == progress
    progress.end_epoch(0.5, False, 0.5)
    assert (progress.window, progress.clips, progress.skipped, progress.step) == (0, 0, 0, 2)
