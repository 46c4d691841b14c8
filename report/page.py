"""report.html: the results of a run on one page that needs nothing else.

Made from the files of a finished run and of its results, and from examples (`examples.py`) that
the caller has filled with what the model saw. Style, script, pictures and sound are in the file,
and its Content-Security-Policy forbids the browser to load anything else.
"""
import base64
import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup, escape

from metrics import METRICS, wilson
from util import atomic_write, plural, printable

from . import confusions, page_charts
from .examples import KINDS, Example, SuspectSearch, cards, first_copy, hertz_ticks
from .media import data_address, mp3
from .results import THIRDS
from .run_files import read_run
from .style import PALETTE, shorten
from .verdict import CLIPS, findings, headline, plural_es, training

MAX_BYTES = 8 << 20
PLAYER_BYTES = 200  # of the element around a sound
NO_SEARCH = SuspectSearch()
FIGURES = {  # column of per_class.csv -> (heading, hint)
    "precision": ("precision", "Share of the predictions of this class that are correct."),
    "f1": ("F1", "Harmonic mean of precision and recall: high only if both are high."),
    "ap": ("AP", "Average precision: how well the scores rank clips of this class before others; "
                 "1 is perfect. It needs no threshold."),
    "threshold": ("threshold", "The class is predicted for a clip if its score reaches this."),
    "false_alarms_per_hour": ("alarms/h", "False alarms: how often this class is reported in an "
                              "hour of recordings that contain none of the classes."),
}
TEMPLATES = Path(__file__).with_name("templates")


def write_page(out: str | Path, run_dir: str | Path, results: str | Path,
               examples: Sequence[Example] = (), search: SuspectSearch = NO_SEARCH,
               root: Path | None = None, mel_hz: np.ndarray | None = None,
               patch: tuple[int, int] = (16, 10), epoch: int | None = None, command: str = "",
               max_bytes: int = MAX_BYTES) -> None:
    """Write the page to `out`, atomically. Raises OSError.

    Args:
        run_dir: folder with run.json, history.csv and so on; any of them may be missing.
        results: folder that `results.write_results` has filled.
        examples: clips to look at and to listen to.
        search: how training clips with suspicious labels were searched for.
        root: folder that the clips' paths are relative to, for links.
        mel_hz: (n_mels,) centre frequencies of the spectrograms.
        patch: (size, stride) of the model's patches.
        epoch: of the evaluated weights.
        command: that repeats the evaluation.
        max_bytes: sound beyond this size is linked instead of embedded.
    """
    out, run = Path(out), read_run(run_dir, results)
    folder = Path(os.path.abspath(out.parent))
    examples = shown_once(examples, run.flags, patch)
    clips = confusions.cell_lists(run, examples, folder, root)
    content = {
        "run": run, "multi_label": run.multi_label, "title": _title(run, root),
        **_head(run, epoch), **_classes(run), **_reproduce(run, run_dir, command),
        "charts": page_charts.training(run), "reliability": page_charts.reliability_diagram(run),
        "confusions": confusions.confusion_table(run), "clips": clips,
        "most_per_cell": confusions.MOST_PER_CELL, "most_clips": confusions.MOST_CLIPS,
        "kinds": KINDS, "cards": cards(run, examples, patch, folder), "search": search,
        "hertz": hertz_ticks(mel_hz),
        "mel_hz": [] if mel_hz is None else [round(float(hz)) for hz in mel_hz],
        "megabytes": f"{max_bytes / 2**20:.0f}"}
    _add_sounds(content, examples, max_bytes)
    with atomic_write(out) as file:
        file.write(_render(content))


def shown_once(examples: Sequence[Example], flags: dict, patch: tuple[int, int]
               ) -> Sequence[Example]:
    """Examples without the repeats that filled the window. flags: of the run."""
    if flags.get("short", "repeat") != "repeat":
        return examples
    return [first_copy(example, patch) for example in examples]


@cache
def _environment():
    """Templates in which every value is escaped, and unprintable characters in it are shown."""
    def show(value):
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return printable(value) if is_text else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, finalize=show,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {
        "keep_flags_whole": _keep_flags_whole,
        "decimals": lambda value, digits=3: f"{value:.{digits}f}",
        "percent": lambda share, digits=0: f"{share:.{digits}%}",
        "thousands": lambda number: f"{number:,}"}
    return environment


def _render(content):
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    return _environment().get_template("page.html").render(
        **content, palette=PALETTE, script=Markup(script),
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script_hash=base64.b64encode(digest).decode("ascii"))


def _keep_flags_whole(text):
    """Text in which no flag is broken over two lines."""
    flag = r'<span class="flag">\g<0></span>'
    # A plain str: re.sub on Markup would escape the element itself.
    return Markup(re.sub(r"--[a-z][a-z-]+", flag, str(escape(printable(text)))))


def _add_sounds(content, examples, max_bytes):
    """Embed the sound of as many cards as fit."""
    room = max_bytes - len(_render(content).encode())
    for card, example in zip(content["cards"], examples, strict=True):
        sound = mp3(example.wave, example.rate)
        address = data_address("audio/mpeg", sound) if sound else None
        if address and len(address) + PLAYER_BYTES < room:
            room -= len(address) + PLAYER_BYTES
            card["sound"] = address


def _title(run, root):
    """Name of the data set, and its fold."""
    data, fold = run.flags.get("data"), run.flags.get("fold")
    if run.metrics["split"] == "all" or not data:  # other data than the run's
        name = shorten(Path(root or "recordings").name, 60)
        return f"{name}, not the data it was trained on" if run.run else name
    name = shorten(Path(data).name, 60)
    return name if fold is None else f"{name}, fold {fold}"


def _head(run, epoch):
    """Headline, metrics, what is unusual, and a line on the model."""
    title, lead = headline(run)
    model = run.run.get("model", {})
    facts = [plural_es(len(run.classes), "class")]
    if model:
        millions = run.run["parameters"] / 1e6
        facts += [f"AST, dim {model['dim']}, depth {model['depth']}, {millions:.1f}M parameters",
                  f"weights {run.flags['weights']}"]
    metrics = [(metric.label, run.metrics[key], *run.metrics[f"{key}_ci95"])
               for key, metric in METRICS.items() if key in run.metrics]
    found, absent = findings(run)
    return {"headline": title, "lead": lead, "metrics": metrics, "findings": found,
            "absent": absent, "n_findings": plural(len(found), "finding"),
            "training": " ".join(training(run, epoch)), "facts": " · ".join(facts)}


def _classes(run):
    """Rows of the table of classes, its columns, and recall by number of training clips.

    A column is (heading, CSS class, hint).
    """
    split = f"{CLIPS[run.metrics['split']]}s"
    counts = [(split, "n", f"Number of {split} that have this class as a label.")]
    if run.train_counts is not None:
        counts.append(("training clips", "n", "Number of training clips with this label."))
    columns = [("class", "left", "Name of the class, as in the labels."),
               ("recall, 95% interval", "left",
                "Share of the clips with this label for which the class is predicted. The bar is "
                "the range that the true value is likely to be in."), *counts,
               *[(heading, "n", hint) for key, (heading, hint) in FIGURES.items()
                 if key in run.classes[0]],
               ("most confused with", "left",
                "The class that is most often predicted instead, and how often.")]
    return {"columns": columns, "classes": [_class_row(run, i) for i in range(len(run.names))],
            "thirds": _thirds(run)}


def _class_row(run, i):
    row, n = run.classes[i], run.support[i]
    # (text of the file, digits to show)
    figures = [(row[key], 1 if key == "false_alarms_per_hour" else 3)
               for key in FIGURES if key in row]
    confused, n_confused = None, int(row["confused_count"])
    if n_confused and row["confused_with"] in run.names:
        confused = {"name": row["confused_with"], "short": shorten(row["confused_with"], 22),
                    "key": f"{i},{run.names.index(row['confused_with'])}", "n": n_confused,
                    "share": n_confused / max(1, n)}
    return {"name": row["class"], "short": shorten(row["class"], 26), "n": n,
            "recall": run.correct[i] / n if n else None, "interval": wilson(run.correct[i], n),
            "n_train": None if run.train_counts is None else run.train_counts[i],
            "figures": figures, "confused": confused}


def _thirds(run):
    """Recall of frequent, middle and rare classes; None without training clips."""
    counts = run.train_counts
    if counts is None:
        return None
    if len(set(counts)) == 1:
        return {"equal": plural(int(counts[0]), "training clip")}
    if "recall_head" not in run.metrics:
        return None
    thirds = np.array_split(np.argsort(-counts, kind="stable"), 3)
    boxes = [(name, run.metrics[f"recall_{name}"], _third_size(counts[classes]))
             for name, classes in zip(THIRDS, thirds)]
    return {"equal": None, "boxes": boxes, "chart": page_charts.recall(run)}


def _third_size(counts):
    size = plural_es(len(counts), "class")
    if len(counts) == 0:
        return size
    low, high = counts.min(), counts.max()
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{size}, {each} training clips each"


def _reproduce(run, run_dir, command):
    """The commands that repeat the run and the evaluation, and the settings as a list."""
    commands, facts, r = [], [], run.run
    if r:
        if r.get("commit"):
            commands.append(f"git checkout {r['commit']}")
        commands += ["pip install -r requirements.txt",
                     f"python train.py {_flag_words(r['flags'])}"]
        machine = (f"{r['device']} ({r['device_name']}), {plural(r['threads'], 'thread')}, "
                   f"{plural_es(r.get('processes', 1), 'process')}")
        versions = [f"Python {r['python']}", *_pairs(r["versions"])]
        facts = [("weights", r["weights"]), ("model", ", ".join(_pairs(r["model"]))),
                 ("front end", ", ".join(_pairs(r["frontend"]))),
                 ("clips", ", ".join(f"{n:,} {name}" for name, n in r["clips"].items())),
                 ("split, sha256", r["split_sha256"]), ("precision", r["precision"]),
                 ("machine", machine), ("versions", ", ".join(versions)),
                 *[("data", note) for note in r.get("data", {}).get("notes", [])]]
    if command:
        commands.append(command)
    return {"commands": commands, "settings": [*facts, ("run folder", str(run_dir))]}


def _pairs(values):
    return [f"{name} {value}" for name, value in values.items()]


def _flag_words(flags):
    """The flags of a run as words of a command line."""
    words = []
    for name, value in flags.items():
        if name not in ("run_dir", "resume") and value is not None and value is not False:
            flag = f"--{name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag}={shlex.quote(str(value))}")
    return " ".join(words)
