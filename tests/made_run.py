"""A run folder with results and examples, all from random numbers, for the tests of the page."""
import csv
import html.parser
import json

import numpy as np
import soundfile as sf
from conftest import tone

from core.run.log import EPOCH_COLUMNS as HISTORY
from core.run.log import EVENT_COLUMNS as EVENTS
from core.run.log import STEP_COLUMNS as STEPS
from core.scoring import Evaluation
from data.manifest import Manifest
from report import examples, page
from report.examples import SuspectSearch
from report.results import write_results

# Names that would break out of HTML, attributes or script, names from right to left, long names.
HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>",
           "\"'><b>bold</b>&amp;", "طائر", "シジュウカラ", "a" * 60, "${alert(3)}",
           "javascript:alert(4)", "owl", "wren"]
LEAK = "2 groups (column recordist) in two splits, e.g. a.wav (train) and b.wav (test)"


def write_rows(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows(rows)


class MadeRun:
    """A finished run in `folder`; the last class is never predicted."""

    def __init__(self, folder, names, per_class=8, epochs=6, steps=400, seed=0):
        rng = np.random.default_rng(seed)
        self.folder, self.names = folder, names
        (folder / "audio").mkdir(parents=True)
        self.labels = np.repeat(np.arange(len(names)), per_class)
        self.scores = self._random_scores(rng)
        self.train_counts = np.maximum(2, (200 / (1 + np.arange(len(names)))).astype(int))
        self.manifest = self._manifest()
        self.paths = self.manifest.paths
        self._write_results()
        self._write_history(epochs)
        self._write_steps(rng, steps)
        write_rows(folder / "events.csv", EVENTS, [
            (77, 2, "skipped", "loss or gradients are not finite; clips: a.wav, <b>.wav")])
        write_rows(folder / "bad_files.csv", ["path", "reason"],
                   [("broken <i>.wav", "empty file (0 bytes)")])
        self.run = self._run_json(epochs)
        (folder / "run.json").write_text(json.dumps(self.run))
        self.examples = self._examples(rng)

    def _random_scores(self, rng):
        n, n_classes = len(self.labels), len(self.names)
        logits = rng.normal(0, 1, (n, n_classes))
        confused = rng.random(n) < 0.3
        mostly = np.where(confused, (self.labels + 1) % n_classes, self.labels)
        logits += 3.2 * np.eye(n_classes)[mostly]
        logits[:, -1] -= 50
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    def _manifest(self):
        """The test clips, then the training clips."""
        n, counts = len(self.labels), self.train_counts
        labels = np.concatenate([self.labels, np.repeat(np.arange(len(counts)), counts)])
        split = np.repeat([2, 0], [n, counts.sum()]).astype(np.int8)
        paths = [f"{i:05d} #1.wav" for i in range(len(labels))]
        paths[:2] = ["<script>alert(5)</script>.wav", "not \udcff utf-8.wav"]
        zeros = np.zeros(len(labels), np.float32)
        return Manifest("made", self.folder / "audio", self.names, paths, labels.astype(np.int32),
                        zeros, zeros * np.nan, np.arange(len(labels), dtype=np.int32),
                        "each file alone", split, None, [])

    def _write_results(self):
        n = len(self.labels)
        losses = -np.log(self.scores[np.arange(n), self.labels] + 1e-9)
        result = Evaluation(np.arange(n), self.labels, self.scores, losses, {},
                            np.ones(n, np.int64), self.scores.argmax(axis=1) == self.labels)
        calibration = {"temperature": 1.4, "thresholds": [0.5] * len(self.names)}
        write_results(self.folder / "test", result, self.manifest, self.names, "test", calibration)
        rows = zip(self.paths, self.manifest.labels, self.manifest.split)
        write_rows(self.folder / "split.csv", ["path", "label", "split", "group", "start", "end"], [
            (path, self.names[label], "test" if part else "train", 0, 0, "")
            for path, label, part in rows])

    def _write_history(self, epochs):
        epoch = np.arange(1, epochs + 1)
        val = 0.5 + 0.2 * np.sin(epoch / epochs * 2.2)
        self.best = int(val.argmax()) + 1
        write_rows(self.folder / "history.csv", HISTORY, [
            (e, 2 / e, 1 - 0.6 / e, 1 + 1 / e + 0.02 * e, v, v - 0.05, v + 0.08, 1e-5, 2e-4, 60, 90,
             900, int(e == 2)) for e, v in zip(epoch, val)])

    def _write_steps(self, rng, steps):
        step = np.arange(1, steps + 1)
        factor = np.minimum(step / 40, 1) * 0.5 * (1 + np.cos(np.pi * step / steps)) + 1e-4
        loss = 3 * np.exp(-step / 150) * rng.lognormal(0, 0.3, steps)
        grad_norm = rng.lognormal(1, 0.5, steps)
        write_rows(self.folder / "steps.csv", STEPS, zip(
            step, 1 + step // 70, loss, grad_norm, 5e-5 * factor, 1e-3 * factor, np.ones(steps),
            np.full(steps, 32)))

    def _run_json(self, epochs):
        return {
            "flags": {"data": "made & <u>sold", "fold": None, "epochs": epochs,
                      "monitor": "val_acc", "patience": 7, "clip_grad": 1.0, "weights": "audioset",
                      "lr_head": 1e-3, "plain": False, "cache_dir": None, "tensorboard": True,
                      "mixup_alpha": 0.4},
            "classes": self.names, "unreadable": 1, "split_sha256": "5" * 64,
            "clips": {"train": int(self.train_counts.sum()), "val": 9, "test": len(self.labels)},
            "data": {"root": str(self.folder / "audio"),
                     "notes": ["columns used: path, label", f"LEAK: {LEAK}"]},
            "weights": "audioset, sha256 abc", "parameters": 86_200_000,
            "model": {"dim": 768, "depth": 12, "patch": 16, "stride": 10},
            "frontend": {"kind": "logmel", "sample_rate": 22050}, "precision": "bf16",
            "processes": 1, "commit": "c0ffee", "python": "3.11", "versions": {"torch": "2.11.0"},
            "device": "cuda", "device_name": "RTX", "threads": 8}

    def _examples(self, rng):
        """Tones of 300 to 2,400 Hz, with a line in the spectrogram and in the relevance."""
        predicted = self.scores.argmax(axis=1)
        chosen = [(kind, row) for kind, row, _ in examples.choose(self.scores, self.labels)]
        found = []
        for i, (kind, row) in enumerate([("suspect", 3), ("suspect", 4), *chosen]):
            k = i % 8
            wave = tone(2.0, 22050, 300 * (1 + k), seed=i)
            line = 3 * np.exp(-((np.arange(128) - 12 * (1 + k)) / 4) ** 2)
            spectrogram = rng.normal(0, 0.4, (128, 87)) + line[:, None]
            relevance = np.exp(-((np.arange(12) - 1 - k) / 2) ** 2)[:, None] * rng.random(8)
            file = self.folder / "audio" / f"{row}.wav"
            sf.write(file, wave, 22050)
            found.append(examples.Example(
                kind, row, self.paths[row], file, 12.0, 14.0, [int(self.labels[row])],
                [int(predicted[row])], int(predicted[row]), self.scores[row],
                spectrogram.astype(np.float32), relevance if i % 5 else None, wave, 22050))
        return found

    def write(self, out=None, **changes):
        """Write the page, with some arguments changed -> its path."""
        out = out or self.folder / "report.html"
        arguments = {
            "examples": self.examples, "search": SuspectSearch(150, 900, 40),
            "root": self.folder / "audio", "mel_hz": np.geomspace(30, 11000, 128),
            "epoch": self.best, "command": "python evaluate.py --ckpt 'a b/best.pt'", **changes}
        page.write_page(out, self.folder, self.folder / "test", **arguments)
        return out


class Text(html.parser.HTMLParser):
    """The elements of a page, and the text that a reader sees."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.inside = [], [], None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        """The text with single spaces."""
        return " ".join(" ".join(self.words).split())


def read_page(path):
    return Text(path.read_text(encoding="utf-8"))
