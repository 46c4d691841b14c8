"""The table of metrics that the report reads, and how a metric is called in history.csv."""
from typing import NamedTuple


class Metric(NamedTuple):  # to be replaced by `from metrics import METRICS`
    name: str
    label: str
    higher_is_better: bool = True
    multi_label_only: bool = False


METRICS = {metric.name: metric for metric in (
    Metric("accuracy", "accuracy"), Metric("balanced_accuracy", "balanced accuracy"),
    Metric("macro_f1", "macro F1"), Metric("weighted_f1", "weighted F1"), Metric("map", "mAP"),
    Metric("micro_f1", "micro F1", multi_label_only=True))}

HISTORY_NAMES = {"accuracy": "acc"}  # metrics that history.csv calls otherwise


def history_column(name: str) -> str:
    """The column of history.csv with a metric's validation values: "val_acc", "val_macro_f1"."""
    return f"val_{HISTORY_NAMES.get(name, name)}"


# What best.pt can be selected by: column of history.csv -> (label, whether higher is better)
MONITORS = {"val_loss": ("validation loss", False)} | {
    history_column(name): (f"validation {metric.label}", metric.higher_is_better)
    for name, metric in METRICS.items() if not metric.multi_label_only}
