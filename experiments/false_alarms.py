"""False alarms at equal recall, and their tables, for negatives.py."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import RESULTS
from summary import table_line

from util import atomic_write

WINDOW = 4  # seconds
RECALLS = (0.9, 0.8, 0.5)


@dataclass
class Window:
    path: Path
    start: float  # seconds
    label: int = -1  # index into the classes, -1 for none of them
    site: str = ""  # windows of a site are alike


@dataclass
class TestSet:
    name: str
    clips: list[Window]
    negatives: list[Window]

    @property
    def hours(self):
        return len(self.negatives) * WINDOW / 3600


def false_alarms(clips: np.ndarray, labels: np.ndarray, negatives: np.ndarray, recall: float,
                 top_only: bool) -> tuple[np.ndarray, float]:
    """(which negatives raise an alarm (m,), the mean recall of the classes).

    Each class has the highest threshold that keeps `recall` of its clips. top_only: only the class
    with the highest score of a window is reported, so a recall may be out of reach.
    """
    if top_only:
        clips, negatives = only_top(clips), only_top(negatives)
    alarm, recalls = np.zeros(len(negatives), bool), []
    for c in np.unique(labels):
        own = np.sort(clips[labels == c, c])[::-1]
        threshold = own[int(np.ceil(recall * len(own) - 1e-9)) - 1]
        alarm |= (negatives[:, c] >= threshold) & (negatives[:, c] > 0)
        recalls.append(np.mean((own >= threshold) & (own > 0)))
    return alarm, float(np.mean(recalls))


def only_top(scores):
    return np.where(scores == scores.max(axis=1, keepdims=True), scores, 0.0)


def separation(clips: np.ndarray, negatives: np.ndarray) -> float:
    """Probability that the highest score of a clip is above that of a negative (AUC)."""
    ordered = np.sort(negatives.max(axis=1))
    best = clips.max(axis=1)
    below, upto = (np.searchsorted(ordered, best, side) for side in ("left", "right"))
    return float(np.mean(below + upto) / 2 / len(ordered))


def figures(arm: str, seed: int, test: TestSet, clips: np.ndarray, negatives: np.ndarray) -> dict:
    """The figures of one run on one test set, and which negatives raise an alarm."""
    labels = np.array([window.label for window in test.clips])
    row = {"arm": arm, "seed": seed, "test": test.name, "clips": len(labels),
           "accuracy": np.mean(clips.argmax(axis=1) == labels), "hours": test.hours,
           "auc": separation(clips, negatives)}
    alarms = {}
    for recall in RECALLS:
        for rule in ("any", "top"):
            alarm, reached = false_alarms(clips, labels, negatives, recall, rule == "top")
            row[f"alarms_per_hour_{rule}_{recall:g}"] = alarm.sum() / test.hours
            row[f"recall_{rule}_{recall:g}"] = reached
            alarms[rule, recall] = alarm
    return row | {"alarms": alarms}


# --- tables ---

def ratio_interval(first: list[dict], other: list[dict], sites: np.ndarray, recall: float,
                   n_boot: int = 4000) -> tuple[float, float, float]:
    """How many times fewer alarms `other` has: (ratio, low, high), a paired 95% bootstrap.

    Draws sites and seeds with replacement. Half an alarm is added to both, so that none is not
    infinitely few.
    """
    names = np.unique(sites)
    counts = [np.array([[row["alarms"]["any", recall][sites == name].sum() for name in names]
                        for row in rows]) for rows in (first, other)]
    rng = np.random.default_rng(0)
    n_seeds, n_sites = counts[0].shape

    def ratio(seeds, chosen):
        a, b = (count[np.ix_(seeds, chosen)].sum() + 0.5 for count in counts)
        return a / b

    values = [ratio(rng.integers(n_seeds, size=n_seeds), rng.integers(n_sites, size=n_sites))
              for _ in range(n_boot)]
    return ratio(range(n_seeds), range(n_sites)), *np.percentile(values, (2.5, 97.5))


def spread(values, scale=1.0, digits=1):
    """"mean (lowest to highest)"."""
    values = scale * np.array(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def table(rows: list[dict], test: TestSet) -> list[str]:
    """Lines of the table of one test set."""
    sites = np.array([window.site for window in test.negatives])
    arms = {arm: [row for row in rows if row["arm"] == arm and row["test"] == test.name]
            for arm in dict.fromkeys(row["arm"] for row in rows)}
    first = next(iter(arms))
    head = ["arm", "accuracy, %", "AUC"]
    for recall in RECALLS:
        head += [f"alarms/h at recall {100 * recall:g}%", "times fewer (95%)"]
    head += ["top class alone, 90%", "its recall, %"]
    lines = [f"**{test.name}**: {len(test.clips)} clips, {test.hours * 60:.0f} min without a class "
             f"from {len(set(sites))} sites", "", table_line(head), "|" + "---|" * len(head)]
    for arm, own in arms.items():
        cells = [arm, spread([row["accuracy"] for row in own], 100),
                 spread([row["auc"] for row in own], 1, 3)]
        for recall in RECALLS:
            ratio = ratio_interval(arms[first], own, sites, recall)
            cells += [spread([row[f"alarms_per_hour_any_{recall:g}"] for row in own], digits=0),
                      "" if arm == first else "{:.1f} ({:.1f} to {:.1f})".format(*ratio)]
        cells += [spread([row["alarms_per_hour_top_0.9"] for row in own], digits=0),
                  spread([row["recall_top_0.9"] for row in own], 100)]
        lines.append(table_line(cells))
    return [*lines, ""]


def write_results(name: str, claim: str, rows: list[dict], tests: list[TestSet], args) -> None:
    """Write results/<name>.csv, one row per run and test set, and the tables, <name>.md."""
    RESULTS.mkdir(exist_ok=True)
    plain = [{key: f"{value:.4g}" if isinstance(value, float) else value
              for key, value in row.items() if key != "alarms"} for row in rows]
    with atomic_write(RESULTS / f"{name}.csv") as file:
        writer = csv.DictWriter(file, plain[0])
        writer.writeheader()
        writer.writerows(plain)
    lines = [f"**Claim.** {claim}", ""]
    for test in tests:
        lines += table(rows, test)
    lines.append(
        f"Means (lowest to highest) over seeds {', '.join(map(str, args.seeds))}; {args.epochs} "
        "epochs of the demo's recipe. AUC: of the highest score of a window. A window raises an "
        "alarm if any class reaches its threshold, which keeps that share of the class's clips. In "
        "the last two columns only the class with the highest score counts, as in one-label "
        "predictions; the recall is then bounded by the accuracy. Intervals: paired bootstrap over "
        "sites and seeds.")
    with atomic_write(RESULTS / f"{name}.md") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))
