"""One run per fold of the data."""
from collections.abc import Callable, Iterable
from pathlib import Path

from report.results import pooled_results
from report.run_files import load_scores


def cross_validate(folds: Iterable[int], folder: Path, run_fold: Callable[[int, Path], int]) -> int:
    """Run each fold in a folder of its own below `folder`, then print the pooled results.

    run_fold(fold, folder) -> exit code. Finished folds are not run again. Returns an exit code.
    """
    folders = {fold: folder / f"fold{fold}" for fold in folds}
    for fold, fold_folder in folders.items():
        if is_done(fold_folder):
            print(f"fold {fold}: already done, {fold_folder}")
            continue
        print(f"\nfold {fold} of {', '.join(map(str, folders))}")
        code = run_fold(fold, fold_folder)
        if code:
            return code
    results = [fold_folder / "test" for fold_folder in folders.values()]
    print("\n".join(pooled_results(results, folder)))
    return 0


def is_done(folder: Path) -> bool:
    """Whether a run has been tested: its scores can be read, and metrics and report are there."""
    try:
        load_scores(folder / "test")
    except Exception:  # a damaged file may raise many types
        return False
    return (folder / "test" / "metrics.json").is_file() and (folder / "report.html").is_file()
