"""report.html: what a run has come to, on one page that needs nothing else.

Made from the files of a finished run and of its results, and from examples (`examples.py`) that the caller has filled with
what the model saw and heard. No network: style, script, pictures and sound are in the file, and its
Content-Security-Policy forbids the browser to ask for anything more.
"""
import base64
import hashlib
import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote

import numpy as np

from . import charts
from .examples import KINDS, card_of, listen_section, pictures_of
from .markup import Markup, bdi, clean, data_address, data_block, element, mp3, note, section
from .style import count, plain
from .verdict import CLIPS, findings, headline, read_run, some, training, wilson

CAP = 8 << 20  # bytes of a page: sound that would go beyond is linked instead
NONE = "(none)"  # of a miss where nothing else is said, or of what is said where nothing is missed
PER_CELL, ALL_CELLS = 50, 20_000  # clips that the confusion matrix lists: of one cell, and in all
MATRIX = 120  # classes that are drawn


def write_page(out, run_dir, results, examples=(), bins=None, scored=(0, 0, 0), root=None, mel_hz=None, patch=(16, 10), epoch=None,
               command="", cap=CAP):
    """Write the page to `out`, at most `cap` bytes but for what cannot be left out.

    run_dir: the folder with run.json, history.csv and so on, any of which may be missing. results: the folder of
    metrics.json, scores.npz and so on. examples: [Example]. bins: two lists of (confidence, share right, clips), before and
    after temperature scaling. scored: how many training clips were scored in search of suspects, of how many, and how many
    of them the answer contradicts. root: folder
    that the clips' paths are relative to. mel_hz: (n_mels,) centres. patch: (size, stride) of the model's patches. epoch:
    that the judged weights are of. command: the line that evaluates again.
    """
    out, run = Path(out), read_run(run_dir, results)
    here = Path(os.path.abspath(out.parent))
    shown = pictures_of(examples, patch)
    cells, listed = _cell_lists(run, examples, here, root)
    title = _title(run, root)

    def page(sounds):
        cards = [card_of(run, number, example, picture, sounds.get(number), here, mel_hz)
                 for number, (example, picture) in enumerate(zip(examples, shown, strict=True))]
        by_kind = {kind: [card for card, example in zip(cards, examples, strict=True) if example.kind == kind] for kind in KINDS}
        heard = f"{len(sounds)} of {len(examples)} clips have a player" if len(sounds) < len(examples) else "every clip has a player"
        return _document(title, [
            _head(run, title, epoch), _training_section(run), _class_section(run), _confusion_section(run, listed),
            _confidence_section(run, bins),
            listen_section(run, by_kind, scored, f"{heard}; the page may have {cap / 2**20:.0f} MB, sound beyond that is linked."),
            _settings_section(run, run_dir, command)], data_block("clips", cells))

    room, sounds = cap - len(page({}).encode()), {}
    for number, example in enumerate(examples):
        sound = mp3(example.wave, example.rate)
        address = sound and data_address("audio/mpeg", sound)
        if address and len(address) + 200 < room:  # 200: of the player around it
            room -= len(address) + 200
            sounds[number] = address
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page(sounds), encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _document(title, sections, data):
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
              "base-uri 'none'; form-action 'none'")
    head = element("head", element("meta", charset="utf-8"), element("meta", http_equiv="Content-Security-Policy", content=policy),
                   element("meta", name="viewport", content="width=device-width, initial-scale=1"),
                   element("meta", name="color-scheme", content="light dark"), element("link", rel="icon", href="data:,"),
                   element("title", title), element("style", Markup(style)))
    return Markup("<!doctype html>\n") + element("html", head, element("body", element("main", sections), data,
                                                 element("script", Markup(script))), lang="en") + "\n"


def _prose(text):
    """Text in which no flag is broken over two lines."""
    return [element("span", part, class_="flag") if i % 2 else part for i, part in enumerate(re.split(r"(--[a-z][a-z-]+)", text))]


def _title(run, root):
    data = run.run.get("flags", {}).get("data") if run.metrics["split"] != "all" else None
    name = Path(data or root or "recordings").name
    fold = run.run.get("flags", {}).get("fold")
    return plain(name, 60) + ("" if data else ", not the data it was trained on" if run.run else "") + (
        f", fold {fold}" if fold is not None and data else "")


# --- the verdict ---

def _head(run, title, epoch):
    first, second = headline(run)
    odd, absent = findings(run)
    model = run.run.get("model", {})
    facts = [f"{len(run.classes)} classes"]
    if model:
        facts += [f"AST, dim {model['dim']}, depth {model['depth']}, {run.run['parameters'] / 1e6:.1f}M parameters",
                  f"weights {run.run['flags']['weights']}"]
    links = [("training", "Training"), ("classes", "Classes"), ("confusions", "Confusions"), ("confidence", "Confidence"),
             ("listen", "Listen"), ("labels", "Labels to check"), ("again", "Do it again")]
    return element("header", element("p", bdi(title), class_="kicker"), element("h1", first), element("p", second, class_="lead"),
                   _figures(run), element("p", _prose(" ".join(training(run, epoch)))),
                   _findings(odd, absent), element("p", " · ".join(clean(fact) for fact in facts), class_="note"),
                   element("nav", [element("a", words, href=f"#{name}") for name, words in links], aria_label="sections"))


def _figures(run):
    boxes = []
    shown = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "map": "mAP"}
    if run.several:
        shown = {"map": "mAP", "macro_f1": "macro-F1", "micro_f1": "micro-F1", "accuracy": "surest class is a label"}
    for key, name in shown.items():
        value, (low, high) = run.metrics[key], run.metrics[f"{key}_ci95"]
        boxes.append(element("div", element("dt", name), element("dd", element("b", f"{value:.3f}"), _interval(value, low, high),
                                                                 element("small", f"{low:.3f} to {high:.3f}"))))
    m = run.metrics
    boxes.append(element("div", element("dt", "calibration error"), element("dd", element("b", f"{m['ece']:.3f}"), element(
        "small", f"{m['ece_calibrated']:.3f} at temperature {m['temperature']:.2f}"))))
    return element("dl", boxes, class_="figures")


def _interval(value, low, high):
    """A value with its interval on a line from 0 to 1."""
    return element("span", element("i", style=f"left:{low:.1%};width:{high - low:.1%}"), element("u", style=f"left:{value:.1%}"),
                   class_="interval", aria_hidden="true")


def _findings(odd, absent):
    items = [element("li", element("strong", what), [element("span", detail, class_="detail") for detail in details])
             for what, details in odd]
    looked = f"Looked for and not found: {some(absent, 20)}." if absent else None
    return [element("h2", f"{count(len(odd), 'thing')} to know" if odd else "Nothing odd was seen", class_="small"),
            element("ul", items, class_="findings") if odd else None, element("p", looked, class_="note") if looked else None]


# --- training ---

def _training_section(run):
    if not run.history:
        return None
    h, epochs = run.history, run.history["epoch"]
    best = epochs[run.best] if run.best is not None else None
    figures = [
        ("Loss", charts.line_chart("loss by epoch", [("training", epochs, h["train_loss"]), ("validation", epochs, h["val_loss"])],
                                   "epoch", best), _at_best(run, "train_loss", "val_loss")),
        ("Accuracy", charts.line_chart("accuracy by epoch", [("training", epochs, h["train_acc"]), ("validation", epochs, h["val_acc"])],
                                       "epoch", best, percent=True, top=1.0), _at_best(run, "train_acc", "val_acc")),
        ("Validation macro-F1 and mAP", charts.line_chart("macro-F1 and mAP by epoch", [
            ("macro-F1", epochs, h["val_macro_f1"]), ("mAP", epochs, h["val_map"])], "epoch", best, top=1.0),
         _at_best(run, "val_macro_f1", "val_map"))]
    if len(run.steps.get("step", ())):
        figures += _step_charts(run)
    said = "Dashed: the best epoch." if best is not None else None
    return section("training", "Training", note(said) if said else None, element("div", [
        element("figure", element("h3", name), chart, element("figcaption", caption)) for name, chart, caption in figures if chart],
        class_="charts"))


def _at_best(run, *columns):
    if run.best is None:
        return None
    names = {"train": "training", "val": "validation", "f1": "macro-F1", "map": "mAP"}
    values = ", ".join(f"{names[column.split('_')[-1 if 'f1' in column or 'map' in column else 0]]} {run.history[column][run.best]:.3f}"
                       for column in columns)
    return f"at epoch {run.history['epoch'][run.best]:.0f}: {values}"


def _step_charts(run):
    s, steps = run.steps, run.steps["step"]
    skipped = [int(event["step"]) for event in run.events if event["event"] == "skipped"][:200]
    groups = [(name, s[f"lr_{name}"]) for name in ("backbone", "head")]
    if np.array_equal(groups[0][1], groups[1][1]):
        groups = [("all", groups[0][1])]
    decay = run.run.get("flags", {}).get("layer_decay", 1.0)
    lr = charts.line_chart("learning rate by step", [(name, *charts.thinned(steps, values)) for name, values in groups],
                           "optimiser step", log=True)
    peaks = ", ".join(f"{name} {values.max():.1e}" for name, values in groups)
    caption = f"peaks: {peaks}" if len(groups) > 1 else f"one for all groups, peak {groups[0][1].max():.1e}"
    found = [("Learning rate of each group", lr, caption + (f"; each block's is {decay:g} of the next one's" if decay < 1 else ""))]
    clip = run.run.get("flags", {}).get("clip_grad", 0)
    for name, column, caption in (("Loss by step", "loss", "mean and range of neighbouring steps"),
                                  ("Gradient norm", "grad_norm", f"before clipping to {clip:g}" if clip else "not clipped")):
        x, mean, low, high = charts.envelope(steps, s[column], min(120, max(1, len(steps) // 4)))
        said = caption + (f"; {count(len(skipped), 'skipped step')} marked" if skipped else "")
        found.append((name, charts.line_chart(f"{name.lower()}", [("mean", x, mean)], "optimiser step",
                                              band=(x, low, high), marks=skipped), said))
    return found


# --- classes ---

def _class_section(run):
    names, support, hits = run.names, run.truth.sum(axis=0), (run.truth & run.said).sum(axis=0)
    trained = run.train_counts
    columns = [("class", "left"), ("recall, 95% interval", "left"), (CLIPS[run.metrics['split']] + "s", "n"),
               *([("training clips", "n")] if trained is not None else []), ("precision", "n"), ("F1", "n"), ("AP", "n"),
               *([("threshold", "n")] if run.several else []), ("most often taken for", "left")]
    rows = []
    for i, row in enumerate(run.classes):
        low, high = wilson(hits[i], support[i])
        recall = hits[i] / support[i] if support[i] else None
        other = names.index(row["confused_with"]) if row["confused_with"] in names and int(row["confused_count"]) else None
        rows.append(element("tr", element("th", bdi(plain(names[i], 26)), scope="row", data_value=clean(names[i]), title=clean(names[i])),
                            element("td", _interval(recall, low, high) if recall is not None else None,
                                    element("span", f"{recall:.0%} ({low:.0%} to {high:.0%})" if recall is not None else "–"),
                                    data_value="" if recall is None else f"{recall:.6f}", class_="recall"),
                            _number(support[i]), _number(trained[i]) if trained is not None else None,
                            *(element("td", f"{float(row[key]):.3f}" if row[key] else "–", data_value=row[key], class_="n")
                              for key in ("precision", "f1", "ap") + ("threshold",) * run.several),
                            element("td", None if other is None else element(
                                "button", f"{row['confused_count']}× ", bdi(plain(names[other], 22)), type="button",
                                class_="cell-link", data_go=f"{i},{other}", title=clean(names[other])),
                                    data_value="" if other is None else int(row["confused_count"]) / max(1, support[i]))))
    heads = [element("th", element("button", words, type="button"), scope="col", aria_sort="none",
                     data_numeric=words != "class", class_=side) for words, side in columns]
    table = element("table", element("thead", element("tr", heads)), element("tbody", rows), class_="sortable")
    return section("classes", "Classes", note("Press a heading to sort. The intervals are Wilson's. Undefined figures are –: precision of "
                                                "a class never given as an answer, recall of one without clips."),
                    element("div", table, class_="scroll tall", tabindex="0", role="region", aria_label="table of the classes"),
                    _thirds(run, hits, support))


def _number(value):
    return element("td", f"{value:,}", data_value=int(value), class_="n")


def _thirds(run, hits, support):
    """Recall of the frequent, the middling and the rare classes, and of each over its training clips."""
    if run.train_counts is None:
        return None
    title = element("h3", "Head, middle, tail", class_="thirds")
    if len(set(run.train_counts)) == 1:
        return [title, note(f"Each class has {count(int(run.train_counts[0]), 'training clip')}: none is frequent, none rare.")]
    if "recall_head" not in run.metrics:
        return None
    thirds = dict(zip(("head", "middle", "tail"), np.array_split(np.argsort(-run.train_counts, kind="stable"), 3), strict=True))
    boxes = []
    for name, classes in thirds.items():
        value, counts = run.metrics[f"recall_{name}"], run.train_counts[classes]
        span = f"{counts.min():,} to {counts.max():,}" if len(set(counts)) > 1 else f"{counts[0]:,}" if len(classes) else "no"
        there = f"{count(len(classes), 'class', 'classes')}, {span} training clips each"
        boxes.append(element("div", element("dt", name), element("dd", element("b", "–" if value is None else f"{value:.3f}"),
                                                                 element("small", there))))
    points = [(name, int(n), float(h / s)) for name, n, h, s in zip(run.names, run.train_counts, hits, support, strict=True) if s]
    return [title, note("Mean recall of the third of the classes with the most training clips, of the middle third and of the one with the "
                         "fewest."),
            element("div", element("dl", boxes, class_="figures"), element("figure", charts.scatter(
                "recall of each class over its training clips", points, "training clips", "recall"),
                element("figcaption", "recall of each class, by its training clips")), class_="beside")]


def _outcomes(run):
    """Every outcome: (m,) true class, (m,) answer, (m,) clip. Of clips with several labels each that was rightly said, and each
    that was missed with each that was wrongly said of the same clip; where there is none on one side, the number of
    classes stands for it."""
    if not run.several:
        return run.labels, run.said.argmax(axis=1), np.arange(len(run.labels))
    clip, right = np.nonzero(run.truth & run.said)
    found, none = [np.stack([right, right, clip], axis=1)], [len(run.names)]
    known = ~np.isnan(run.labels)
    for i in np.flatnonzero(((run.truth != run.said) & known).any(axis=1)):
        missed, alarms = np.flatnonzero(run.truth[i] & ~run.said[i]), np.flatnonzero(run.said[i] & ~run.truth[i])
        found.append(np.array([(t, a, i) for t in (missed if len(missed) else none) for a in (alarms if len(alarms) else none)]))
    return np.concatenate(found).T


def _outcome_names(run):
    return [*run.names, NONE] if run.several else run.names


def _matrix(run):
    """Number of outcomes, rows the truth, and the names of rows and columns."""
    names = _outcome_names(run)
    counts = np.zeros((len(names),) * 2, np.int64)
    np.add.at(counts, tuple(_outcomes(run)[:2]), 1)
    return counts, names


# --- confusions ---

def _cell_lists(run, examples, here, root):
    """What the page's script lists: {"names", "base", "cells": {"row,column": [[path, confidence, start, example, address]]}}
    -> that, and whether each clip is in it. The surest first; wrong ones before right ones where there are too many."""
    cards = {example.index: number for number, example in enumerate(examples) if example.kind != "suspect"}
    truth, answer, clips = _outcomes(run)
    if run.several:  # by the class that was said, or else missed
        about = np.where(answer < len(run.names), answer, truth)
        sure = run.scores[clips, about] * np.where(answer < len(run.names), 1, -1)
    else:
        sure = np.array([float(clip["confidence"]) for clip in run.clips])
    cells, total, whole = {}, 0, True
    for at in np.lexsort((-sure, answer == truth)):
        i = int(clips[at])
        cell = cells.setdefault(f"{truth[at]},{answer[at]}", [])
        if len(cell) >= PER_CELL or total >= ALL_CELLS:
            whole = False
            continue
        path, start = run.clips[i]["path"], float(run.clips[i]["start"])
        shown = clean(path)
        address = quote(os.fsencode(path))
        cell.append([shown, None if run.several else round(float(sure[at]), 3), start or None, cards.get(i),
                     address if root is not None and address != quote(shown) else None])
        total += 1
    base = None if root is None else quote(os.fsencode(os.path.relpath(root, here))) + "/"
    return {"names": [clean(name) for name in _outcome_names(run)], "base": base, "cells": cells}, whole


def _confusion_section(run, whole):
    matrix, names = _matrix(run)
    order, some_of = list(range(len(names))), None
    if len(names) > MATRIX:
        wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
        order = sorted(np.argsort(-wrong, kind="stable")[:MATRIX].tolist())
        some_of = f"Of {len(names):,} classes the {MATRIX} with the most confusions are drawn. "
    wrong, support = matrix - np.diag(np.diag(matrix)), matrix.sum(axis=1)
    pairs = sorted(zip(*np.nonzero(wrong)), key=lambda pair: (-wrong[pair], support[pair[0]]))[:12]
    largest = [element("li", element("button", bdi(names[i]), " → ", bdi(names[j]), element("small", f" {wrong[i, j]} of {support[i]}"),
                                     type="button", class_="cell-link", data_go=f"{i},{j}")) for i, j in pairs]
    said = f"{count(int(wrong.sum()), 'clip')} of {len(run.labels):,} named wrong, in {count(int((wrong > 0).sum()), 'way')}"
    if run.several:
        misses, alarms = int((run.truth & ~run.said).sum()), int((run.said & ~run.truth & ~np.isnan(run.labels)).sum())
        said = (f"{count(misses, 'label')} of {int(run.truth.sum()):,} missed, {count(alarms, 'class', 'classes')} wrongly said, of "
                f"{len(run.labels):,} clips")
    more = "" if whole else f"At most {PER_CELL} of a cell and {ALL_CELLS:,} in all are listed; predictions.csv has them all."
    lists = [element("div", element("h3", "Largest confusions"), element("ol", largest, class_="largest") if largest else
                     element("p", "None: every clip is named right.")),
             element("div", element("h3", "Clips", id="cell-title", tabindex="-1"), element("ul", id="cell-clips", class_="clips"),
                     element("p", "Press a cell or a confusion to list its clips.", id="cell-note", class_="note", data_more=more))]
    how = (f"A label that was missed in rows, what was wrongly said of the same clip in columns, {NONE} where there is no such thing; on "
           "the diagonal, blue, what was rightly said. A clip stands in as many cells as it has such pairs; the colour is the share of "
           "the row. " if run.several else "Truth in rows, answers in columns; the colour is the share of the row, blue where right. ")
    return section("confusions", "Confusions", note(some_of, how, "The arrow keys move between cells."),
                    element("p", said, id="readout", aria_live="polite"),
                    element("div", charts.matrix(matrix, names, order), element("div", lists, class_="halves"),
                            class_="confused" + " fits" * (len(order) <= charts.FITS)))


# --- confidence ---

def _confidence_section(run, bins):
    if bins is None:
        return None
    m = run.metrics
    curves = [(f"as it is, error {m['ece']:.3f}", bins[0]),
              (f"temperature {m['temperature']:.2f}, error {m['ece_calibrated']:.3f}", bins[1])]
    axes = ("score of a class", "share that hold it") if run.several else ("confidence in the answer given", "share right")
    question = ("Of the clips to which it gives a class 80%, do 80% hold that class?" if run.several else
                "When it is 80% sure, is it right in 80%?")
    over = "pairs of clip and class" if run.several else "clips"
    after = ("The thresholds of the classes, in the table above, are of scores at that temperature." if run.several else
             "No answer changes by that.")
    figure = element("figure", charts.reliability("reliability diagram", curves, axes))
    return section("confidence", "Confidence", element("div", figure, element(
        "div", element("p", f"{question} On the dashed line it would be so; below, it is too sure of itself, above, too modest. The expected "
                       f"calibration error, the mean distance from that line over all {over}, is {m['ece']:.3f}."),
        element("p", f"Dividing the logits by the temperature {m['temperature']:.2f}, fitted on the validation clips (C. Guo et al., 2017), "
                f"makes it {m['ece_calibrated']:.3f} on the clips here. {after} The scores below, in predictions.csv and by predict.py are "
                "at that temperature.")), class_="beside"))


# --- to do it again ---

def _settings_section(run, run_dir, command):
    r = run.run
    facts, lines = [], []
    if r:
        flags = {name: value for name, value in r["flags"].items() if name not in ("run_dir", "resume")}
        words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={shlex.quote(str(value))}") for name, value in flags.items()
                 if value is not None and value is not False]
        lines = [f"git checkout {r['commit']}" if r.get("commit") else None, "pip install -r requirements.txt",
                 "python train.py " + " ".join(words)]
        m, f = r["model"], r["frontend"]
        facts = [("weights", r["weights"]), ("model", ", ".join(f"{key} {value}" for key, value in m.items())),
                 ("front end", ", ".join(f"{key} {value}" for key, value in f.items())),
                 ("clips", ", ".join(f"{n:,} {name}" for name, n in r["clips"].items())), ("split, sha256", r["split_sha256"]),
                 ("precision", r["precision"]), ("machine", f"{r['device']} ({r['device_name']}), {count(r['threads'], 'thread')}, "
                                                f"{count(r.get('processes', 1), 'process', 'processes')}"),
                 ("versions", f"Python {r['python']}, " + ", ".join(f"{name} {v}" for name, v in r["versions"].items())),
                 *[("data", line) for line in r.get("data", {}).get("notes", [])]]
    lines.append(command)
    facts.append(("run folder", str(run_dir)))
    shown = [element("code", [[element("span", word), " "] for word in line.split(" ")]) for line in lines if line]
    return section("again", "Do it again", element("pre", shown),
                    element("dl", [[element("dt", key), element("dd", value)] for key, value in facts], class_="facts"))
