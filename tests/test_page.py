"""report.html: in a real browser, at the width of a phone and of a desk, and its figures against other computations."""
import base64
import csv
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

import evaluate
import train
from conftest import ROOT, tone
from metrics import apply_temperature, recall_by_frequency, reliability
from core.run import EVENTS, HISTORY, STEPS
from data.audio import read as read_audio
from data.manifest import Manifest
from evaluate import Evaluation, write_results
from report import charts, examples, markup, page, verdict
from tests.faults.harness import TINY, calm

EVIL = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\"'><b>bold</b>&amp;", "طائر", "シジュウカラ",
        "a" * 60, "${alert(3)}", "javascript:alert(4)", "owl", "wren"]


def rows_of(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows(rows)


class Made:
    """A run folder with results and examples, all out of random numbers, and what the page is to say of them."""

    def __init__(self, folder, names, per_class=8, epochs=6, steps=400, seed=0, hard=0.3):
        rng = np.random.default_rng(seed)
        self.folder, self.names, n = folder, names, len(names) * per_class
        (folder / "audio").mkdir(parents=True)
        self.labels = np.repeat(np.arange(len(names)), per_class)
        # The last class is never given as an answer.
        logits = rng.normal(0, 1, (n, len(names))) + 3.2 * np.eye(len(names))[np.where(rng.random(n) < hard, (self.labels + 1) % len(names),
                                                                                       self.labels)]
        logits[:, -1] -= 50
        self.scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        counts = np.maximum(2, (200 / (1 + np.arange(len(names)))).astype(int))
        labels = np.concatenate([self.labels, np.repeat(np.arange(len(names)), counts)]).astype(np.int32)
        split = np.repeat([2, 0], [n, counts.sum()]).astype(np.int8)
        self.paths = [f"{i:05d} #1.wav" for i in range(len(labels))]
        self.paths[0], self.paths[1] = "<script>alert(5)</script>.wav", "not \udcff utf-8.wav"
        zeros = np.zeros(len(labels), np.float32)
        self.manifest = Manifest("made", folder / "audio", names, self.paths, labels, zeros, zeros * np.nan, np.arange(len(labels), dtype=np.int32),
                                 "each file alone", split, None, [])
        result = Evaluation(np.arange(n), self.labels, self.scores, -np.log(self.scores[np.arange(n), self.labels] + 1e-9), {},
                            np.ones(n, np.int64), self.scores.argmax(axis=1) == self.labels)
        calibration = {"temperature": 1.4, "thresholds": [0.5] * len(names)}
        write_results(folder / "test", result, self.manifest, names, "test", calibration)
        rows_of(folder / "split.csv", "path label split group start end".split(),
                [(path, names[label], "test" if part else "train", 0, 0, "") for path, label, part in zip(self.paths, labels, split)])
        e = np.arange(1, epochs + 1)
        val = 0.5 + 0.2 * np.sin(e / epochs * 2.2)
        self.best = int(val.argmax()) + 1
        rows_of(folder / "history.csv", HISTORY, [(i, 2 / i, 1 - 0.6 / i, 1 + 1 / i + 0.02 * i, v, v - 0.05, v + 0.08, 1e-5, 2e-4, 60, 90, 900,
                                                   int(i == 2)) for i, v in zip(e, val)])
        step = np.arange(1, steps + 1)
        factor = np.minimum(step / 40, 1) * 0.5 * (1 + np.cos(np.pi * step / steps)) + 1e-4
        rows_of(folder / "steps.csv", STEPS, zip(step, 1 + step // 70, 3 * np.exp(-step / 150) * rng.lognormal(0, 0.3, steps),
                                                 rng.lognormal(1, 0.5, steps), 5e-5 * factor, 1e-3 * factor, np.ones(steps), np.full(steps, 32)))
        rows_of(folder / "events.csv", EVENTS, [(77, 2, "skipped", "loss or gradients are not finite; clips: a.wav, <b>.wav")])
        rows_of(folder / "bad_files.csv", ["path", "reason"], [("broken <i>.wav", "empty file (0 bytes)")])
        self.run = {"flags": {"data": "made & <u>sold", "fold": None, "epochs": epochs, "monitor": "val_acc", "patience": 7, "clip_grad": 1.0,
                              "weights": "audioset", "lr_head": 1e-3, "plain": False, "cache_dir": None, "tensorboard": True,
                              "mixup_alpha": 0.4},
                    "classes": names, "clips": {"train": int(counts.sum()), "val": 9, "test": n}, "unreadable": 1,
                    "data": {"root": str(folder / "audio"), "notes": ["columns used: path, label",
                                                                     "LEAK: 2 groups (column recordist) in two splits, e.g. a.wav (train) and b.wav (test)"]},
                    "split_sha256": "5" * 64, "weights": "audioset, sha256 abc", "parameters": 86_200_000,
                    "model": {"dim": 768, "depth": 12, "patch": 16, "stride": 10}, "frontend": {"kind": "logmel", "sample_rate": 22050},
                    "precision": "bf16", "processes": 1, "commit": "c0ffee", "python": "3.11", "versions": {"torch": "2.11.0"}, "device": "cuda",
                    "device_name": "RTX", "threads": 8}
        (folder / "run.json").write_text(json.dumps(self.run))
        self.examples = self._examples(rng)
        self.bins = [reliability(scores, self.labels)[0] for scores in (self.scores, apply_temperature(self.scores, 1.4))]

    def _examples(self, rng):
        found, guesses = [], self.scores.argmax(axis=1)
        chosen = [(kind, row) for kind, row, _ in examples.choose(self.scores, self.labels)]
        for i, (kind, row) in enumerate([("suspect", 3), ("suspect", 4), *chosen]):
            hz = 300 * (1 + i % 8)
            wave = tone(2.0, 22050, hz, seed=i)
            spec = rng.normal(0, 0.4, (128, 87)) + 3 * np.exp(-((np.arange(128) - 12 * (1 + i % 8)) / 4) ** 2)[:, None]
            relevance = np.exp(-((np.arange(12) - 1 - i % 8) / 2) ** 2)[:, None] * rng.random(8)
            sf.write(self.folder / "audio" / f"{row}.wav", wave, 22050)
            found.append(examples.Example(kind, row, self.paths[row], self.folder / "audio" / f"{row}.wav", 12.0, 14.0, [int(self.labels[row])],
                                      [int(guesses[row])], int(guesses[row]), self.scores[row], spec.astype(np.float32),
                                      relevance if i % 5 else None, wave, 22050))
        return found

    def write(self, out=None, **changes):
        out = out or self.folder / "report.html"
        page.write_page(out, self.folder, self.folder / "test", **{
            "examples": self.examples, "bins": self.bins, "scored": (150, 900, 40), "root": self.folder / "audio",
            "mel_hz": np.geomspace(30, 11000, 128), "epoch": self.best, "command": "python evaluate.py --ckpt 'a b/best.pt'", **changes})
        return out


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    made = Made(tmp_path_factory.mktemp("small") / "run", EVIL)
    made.write()
    return made


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    made = Made(tmp_path_factory.mktemp("large") / "run", [f"Genusmaximus longissimus {i:03d}" for i in range(100)], per_class=12, epochs=50,
                steps=5000, seed=1)
    made.write()
    return made


class Text(html.parser.HTMLParser):
    """The elements of a page, and the text of what a reader sees."""

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


def parsed(made):
    return Text((made.folder / "report.html").read_text(encoding="utf-8"))


# --- what the page says ---

def test_a_page_of_its_own(small):
    """Nothing is asked from anywhere: no address but data:, fragments and the recordings on the disk."""
    source = (small.folder / "report.html").read_text(encoding="utf-8")
    addresses = [value for tag, attributes in parsed(small).tags for key, value in attributes.items() if key in ("src", "href", "srcset", "action")]
    assert len(addresses) > 50
    assert {re.match(r"data:|#|\./|\.\./", address)[0] for address in addresses} == {"data:", "#", "./"}
    assert "@import" not in source and "url(" not in source
    policy = next(a["content"] for tag, a in parsed(small).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_names_from_the_data_are_text(small):
    found = parsed(small)
    assert not [tag for tag, attributes in found.tags if tag in ("b", "u", "i", "img") and "onerror" in attributes]
    assert [tag for tag, _ in found.tags].count("script") == 2  # the data and the page's own
    words = "".join(found.words)
    for name in EVIL[:5] + ["made & <u>sold", "broken <i>.wav", "a.wav, <b>.wav"]:
        assert name in words, name
    source = (small.folder / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="clips">(.*?)</script>', source)[1])
    listed = [clip for cell in data["cells"].values() for clip in cell]
    assert data["names"] == EVIL and {"<script>alert(5)</script>.wav", "not \\udcff utf-8.wav"} <= {clip[0] for clip in listed}
    assert [clip[4] for clip in listed if clip[4]] == ["not%20%FF%20utf-8.wav"]  # an address of its own, the text will not do


def test_the_verdict_opens_the_page(small):
    metrics = json.loads((small.folder / "test" / "metrics.json").read_text())
    words = " ".join(parsed(small).words)
    low, high = metrics["accuracy_ci95"]
    assert f"{metrics['accuracy']:.1%} of 80 test clips are named right." in words and f"95% interval {100 * low:.1f} to {high:.1%}" in words
    assert "would be right in 10.0%" in words
    assert f"Of 6 epochs number {small.best} was best, by validation accuracy" in words and "a gap of 15 points" in words
    for odd in ("Optimiser steps were skipped: loss or gradients were not finite", "step 77, epoch 2: loss", "Leakage between the splits",
                "2 groups (column recordist) in two splits", "1 recording could not be read", "1 class never given as an answer: wren"):
        assert odd in words, odd
    assert "Looked for and not found: divergence, a changing ratio" in words and "bad files" not in words.split("not found:")[1][:200]
    assert words.index("named right") < words.index("things to know") < words.index("Loss by step") < words.rindex("Do it again")


def read(made, **changes):
    run = verdict.read_run(made.folder, made.folder / "test")
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def test_odd_things_are_seen_and_their_absence_too(small):
    quiet = read(small, events=[], bad_files=[], run={**small.run, "data": {"notes": []}})
    odd, absent = verdict.findings(quiet)
    assert not any("skipped" in what or "Leakage" in what or "could not be read" in what for what, _ in odd)
    assert {"divergence", "skipped steps", "bad files", "leakage between the splits"} <= set(absent)
    events = [{"step": "9", "epoch": "3", "event": event, "detail": "d"} for event in ("diverged", "rollback", "rollback", "new kind")]
    said = [what for what, _ in verdict.findings(read(small, events=events))[0]]
    assert "Validation fell away from its best" in said and "The run went back to its best weights, 2 times" in said and "new kind" in said
    old = verdict.findings(read(small, run={**small.run, "data": {}}))
    assert "leakage between the splits" not in old[1] and not any("Leakage" in what for what, _ in old[0])  # not known: not said
    steps = {**quiet.steps, "lr_backbone": quiet.steps["lr_backbone"].copy()}
    steps["lr_backbone"][:40] = steps["lr_head"][:40]  # the fault this project was made for
    assert any("ratio of the head's learning rate" in what for what, _ in verdict.findings(read(small, steps=steps))[0])
    low = {**quiet.metrics, "accuracy_ci95": [0.05, 0.2]}
    assert any("Not surely better" in what for what, _ in verdict.findings(read(small, metrics=low))[0])
    luck = verdict.findings(read(small, history={**quiet.history, "val_acc": quiet.history["val_acc"] + 0.28}))[0]
    assert any("lies outside of the test's interval" in what for what, _ in luck)


@pytest.mark.parametrize("values, flags, said", [
    ([.1, .2, .3], {"epochs": 3}, "still getting better when it ended"),
    ([.1, .3, .2, .2, .2], {"epochs": 50, "patience": 3}, "stopped early, after 3 epochs without a better one"),
    ([.1, .3, .2], {"epochs": 50, "patience": 7}, "was to have 50 epochs and ended before"),
    ([.3, .3, .2], {"epochs": 3}, "Of 3 epochs number 2 was best"),
    ([np.nan, .3, .2], {"epochs": 3}, "Of 3 epochs number 2 was best"),
    ([.2, .3, .3], {"epochs": 3}, "number 3 was best, by validation accuracy (0.300, the last of 2 equal ones)"),
])
def test_how_training_went(small, values, flags, said):
    n = len(values)
    history = {name: np.full(n, 0.5) for name in HISTORY} | {"epoch": np.arange(1, n + 1), "val_acc": np.array(values)}
    run = read(small, history=history, run={"flags": {"monitor": "val_acc", **flags}})
    assert said in " ".join(verdict.training(run))
    assert ("still getting better" in " ".join(verdict.training(run))) == (values == [.1, .2, .3])
    assert "are the weights after epoch 7" in " ".join(verdict.training(run, 7))


@pytest.mark.parametrize("looked, against, said", [(150, 0, None), (150, 15, "15 of them it answers otherwise: often the label is what is wrong"),
                                                   (150, 16, "16 of them it answers otherwise: with so many, most are mistakes of its own")])
def test_what_the_suspects_are(small, tmp_path, looked, against, said):
    words = " ".join(Text(small.write(tmp_path / "p.html", scored=(looked, 900, against)).read_text(encoding="utf-8")).words)
    assert "150 of the 900 training clips, drawn at random, were looked at" in words
    assert said in words if said else "answers otherwise" not in words


def test_the_best_epoch_by_loss_is_the_lowest(small):
    history = {**read(small).history, "val_loss": np.array([3, 1.5, 2, 1.5, 4, 5])}
    assert read(small, history=history, run={"flags": {"monitor": "val_loss"}}).best == 3


def test_the_interval_of_recall_is_wilsons():
    for hits, n in ((0, 1), (3, 8), (8, 8), (50, 1200)):
        want = binomtest(hits, n).proportion_ci(method="wilson")
        assert verdict.wilson(hits, n) == pytest.approx((want.low, want.high), abs=1e-6)
    assert verdict.wilson(0, 0) == (0, 1)


def test_figures_of_the_table_and_the_thirds(small):
    matrix = confusion_matrix(small.labels, small.scores.argmax(axis=1), labels=range(10))
    source = (small.folder / "report.html").read_text(encoding="utf-8")
    table = source[source.index("<tbody>"):source.index("</tbody>")].split("<tr>")[1:]
    for i, row in enumerate(table):
        low, high = binomtest(int(matrix[i, i]), 8).proportion_ci(method="wilson")
        assert f"{matrix[i, i] / 8:.0%} ({low:.0%} to {high:.0%})" in row
        wrong = matrix[i] - np.eye(10, dtype=int)[i] * matrix[i, i]
        assert f"{wrong.max()}× " in row if wrong.any() else "×" not in row
    thirds = recall_by_frequency(small.scores, small.labels, np.bincount(small.manifest.labels[80:]))
    for value in thirds.values():
        assert f"<b>{value:.3f}</b>" in source


def test_a_run_of_which_nothing_is_left_but_results(small, tmp_path):
    out = tmp_path / "page.html"
    page.write_page(out, tmp_path, small.folder / "test")
    words = " ".join(Text(out.read_text(encoding="utf-8")).words)
    assert "of 80 test clips are named right" in words and "do not lie beside this checkpoint" in words and "Loss by step" not in words
    small.write(out, examples=(), bins=None, scored=(0, 0, 0), root=None, mel_hz=None)
    assert "Listen" not in " ".join(Text(out.read_text(encoding="utf-8")).words).split("Do it again", 1)[1]


def test_the_last_line_of_a_killed_run_and_values_that_are_not_finite(small, tmp_path):
    for name in ("history.csv", "steps.csv", "run.json"):
        shutil.copy(small.folder / name, tmp_path)
    steps = (small.folder / "steps.csv").read_text().splitlines()
    steps[5] = steps[5].replace(steps[5].split(",")[3], "nan", 1)
    steps[6] = steps[6].replace(steps[6].split(",")[3], "inf", 1)
    (tmp_path / "steps.csv").write_text("\n".join(steps) + "\n401,6,0.5,1.")
    page.write_page(tmp_path / "page.html", tmp_path, small.folder / "test")
    assert len(verdict.read_run(tmp_path, small.folder / "test").steps["step"]) == 400
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Gradient norm" in source and not re.search(r'[ ",]-?(nan|inf)[ ",]', source)


def test_the_page_keeps_to_its_cap_and_says_what_has_no_player(small, tmp_path):
    whole, bare = small.write(tmp_path / "a.html"), small.write(tmp_path / "b.html", cap=1)
    n = len(small.examples)
    sound = whole.read_text(encoding="utf-8").count("data:audio/mpeg")
    assert sound == n and "every clip has a player" in whole.read_text(encoding="utf-8")
    text = bare.read_text(encoding="utf-8")
    assert text.count("<audio") == 0 and text.count("open the recording") == n and f"0 of {n} clips have a player" in text
    cap = (whole.stat().st_size + bare.stat().st_size) // 2
    half = small.write(tmp_path / "c.html", cap=cap)
    players = half.read_text(encoding="utf-8").count("<audio")
    assert 0 < players < n and f"{players} of {n} clips have a player" in half.read_text(encoding="utf-8")
    assert cap - 20000 < half.stat().st_size <= cap


def test_links_lead_to_the_recordings(small, tmp_path):
    """From wherever the page lies, whatever the name: percent-encoded bytes of a relative path."""
    from urllib.parse import unquote_to_bytes
    folder = tmp_path / "a #b"
    folder.mkdir()
    text = Text(small.write(folder / "p.html", cap=1).read_text(encoding="utf-8"))
    links = {attributes["href"] for tag, attributes in text.tags if tag == "a" and attributes["href"][0] == "."}
    assert len(links) > 5
    for link in links:
        assert "#" not in link and os.path.exists(os.path.join(os.fsencode(folder), unquote_to_bytes(link)))


def test_sound_is_what_the_model_heard(small):
    source = (small.folder / "report.html").read_text(encoding="utf-8")
    sounds = re.findall(r'<audio [^>]*src="data:audio/mpeg;base64,([^"]+)"', source)
    assert len(sounds) == len(small.examples)
    for sound, example in zip(sounds, sorted(small.examples, key=lambda e: list(examples.KINDS).index(e.kind)), strict=True):
        wave, rate = sf.read(io.BytesIO(base64.b64decode(sound)))
        assert rate == 22050 and abs(len(wave) - len(example.wave)) < 2000 and 0.7 < np.abs(wave).max() < 1.1
        spectrum, want = (np.abs(np.fft.rfft(part[:44100])) for part in (wave, example.wave))
        assert abs(int(spectrum.argmax()) - int(want.argmax())) <= 2  # the tone
    assert markup.mp3(np.zeros(100, np.float32), 22051) is None


def test_spectrograms_lie_the_right_way_up_on_one_scale(small):
    source = (small.folder / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', source)
    grey = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in pictures if alt.startswith("spectrogram")]
    over = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in pictures if alt.startswith("the patches")]
    shown = sorted(small.examples, key=lambda e: list(examples.KINDS).index(e.kind))
    assert len(grey) == len(shown) and len(over) == sum(e.relevance is not None for e in shown)
    for picture, example in zip(grey, shown):
        assert picture.shape == (128, 87)
        assert abs(int(picture[::-1].mean(axis=1).argmax()) - int(example.spectrogram.mean(axis=1).argmax())) <= 1
    values = np.concatenate([e.spectrogram.ravel() for e in shown])
    shades = np.concatenate([picture[::-1].ravel() for picture in grey]).astype(float)
    low, high = np.percentile(values, (1, 99.7))
    assert np.abs(shades - 255 * np.clip((values - low) / (high - low), 0, 1)).max() < 255 / 31
    for picture, example in zip(over, [e for e in shown if e.relevance is not None]):
        assert np.unravel_index(picture[::-1, :, 3].argmax(), (12, 8)) == np.unravel_index(example.relevance.argmax(), (12, 8))


def test_the_overlay_lies_over_its_patches(small):
    """Of 87 frames 8 patches of 16, every 10: the first is alone from 3 to 13."""
    source = (small.folder / "report.html").read_text(encoding="utf-8")
    left, width, bottom, height = (float(v) for v in re.search(
        r'class="over" style="left:([\d.]+)%;width:([\d.]+)%;bottom:([\d.]+)%;height:([\d.]+)%', source).groups())
    assert (left, width) == pytest.approx((100 * 3 / 87, 100 * 80 / 87), abs=0.01)
    assert (bottom, height) == pytest.approx((100 * 3 / 128, 100 * 120 / 128), abs=0.01)


def test_which_clips_are_chosen():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(5), 300)
    labels = np.where(rng.random(300) < 0.5, scores.argmax(axis=1), rng.integers(0, 5, 300))
    found = examples.choose(scores, labels)
    assert len({i for _, i, _ in found}) == len(found) and all(focus == scores[i].argmax() for _, i, focus in found)
    by_kind = {kind: [i for k, i, _ in found if k == kind] for kind in ("wrong", "uncertain", "right")}
    assert [len(by_kind[kind]) for kind in by_kind] == [10, 6, 5]  # right ones: of different classes, of which there are 5
    guesses = scores.argmax(axis=1)
    margins = [scores[i, guesses[i]] - scores[i, labels[i]] for i in by_kind["wrong"]]
    assert margins == sorted(margins, reverse=True) and margins[0] == max(scores[i].max() - scores[i, labels[i]] for i in range(300))
    pairs = [(labels[i], guesses[i]) for i in by_kind["wrong"]]
    assert all(pairs.count(pair) <= 2 and pair[0] != pair[1] for pair in pairs)
    torn = np.sort(scores, axis=1)[:, -1] - np.sort(scores, axis=1)[:, -2]
    assert set(by_kind["uncertain"]) <= set(np.argsort(torn)[:16].tolist())
    assert len({labels[i] for i in by_kind["right"]}) == 5 and all(labels[i] == guesses[i] for i in by_kind["right"])
    suspects = [i for _, i, _ in examples.choose(scores, labels, ("suspect",))]
    assert suspects == [int(i) for i in np.argsort(-(scores.max(axis=1) - scores[np.arange(300), labels]))[:12]]
    assert examples.choose(np.eye(3), np.arange(3), ("wrong", "suspect")) == []  # nothing wrong


def test_which_clips_of_several_labels_are_chosen():
    """The same by a loop over clips and classes."""
    rng = np.random.default_rng(0)
    scores, labels = rng.random((200, 4)), (rng.random((200, 4)) < 0.4).astype(float)
    labels[np.arange(200), rng.integers(0, 4, 200)] = 1
    labels[(labels == 0) & (rng.random((200, 4)) < 0.1)] = np.nan
    scores[:40] = np.where(labels[:40] == 1, 0.9, 0.05) * rng.random((40, 4)) ** 0.02  # right
    thresholds = np.array([0.3, 0.5, 0.6, 0.7])
    errors, distances = {}, {}
    for i in range(200):
        known = [c for c in range(4) if not np.isnan(labels[i, c])]
        wrong = {c: scores[i, c] if labels[i, c] == 0 else 1 - scores[i, c] for c in known if (scores[i, c] >= thresholds[c]) != labels[i, c]}
        distances[i] = min(abs(scores[i, c] - thresholds[c]) for c in known)
        if wrong:
            errors[i] = max(wrong.items(), key=lambda item: item[1])
    found = examples.choose(scores, labels, thresholds=thresholds)
    by_kind = {kind: [(i, focus) for k, i, focus in found if k == kind] for kind in examples.OF_TEST}
    assert [len(by_kind[kind]) for kind in examples.OF_TEST] == [10, 6, 4] and len({i for _, i, _ in found}) == 20
    assert all(errors[i][0] == focus for i, focus in by_kind["wrong"])
    values = [errors[i][1] for i, _ in by_kind["wrong"]]
    assert values == sorted(values, reverse=True) and values[0] == max(value for _, value in errors.values())
    kinds = [(labels[i, focus], focus) for i, focus in by_kind["wrong"]]
    assert max(map(kinds.count, kinds)) == 2  # of misses of one class, of false alarms of one class
    assert {i for i, _ in by_kind["uncertain"]} <= set(sorted(distances, key=distances.get)[:16])
    assert not any(i in errors for i, _ in by_kind["right"]) and sorted(focus for _, focus in by_kind["right"]) == [0, 1, 2, 3]
    suspects = [(i, focus) for _, i, focus in examples.choose(scores, labels, ("suspect",), thresholds)]
    assert suspects == [(i, errors[i][0]) for i in sorted(errors, key=lambda i: -errors[i][1])[:12]]


def test_a_million_steps_are_thinned(small, tmp_path):
    n = 1_000_000
    rng = np.random.default_rng(0)
    loss = np.exp(rng.normal(0, 0.2, n))
    loss[700_000], loss[3] = 99.0, np.nan
    x, mean, low, high = charts.envelope(np.arange(n), loss, 300)
    assert len(x) == 300 and high.max() == 99.0 and low.min() == np.nanmin(loss) and (low <= mean).all() and (mean <= high).all()
    assert np.average(mean) == pytest.approx(np.nanmean(loss), rel=1e-4)
    lr = np.sin(np.arange(n) / n * 3)
    x, y = charts.thinned(np.arange(n), lr)
    assert len(x) < 500 and {0, int(lr.argmax()), n - 1} <= set(x.astype(int))
    (tmp_path / "history.csv").write_text((small.folder / "history.csv").read_text())
    (tmp_path / "run.json").write_text(json.dumps(small.run))
    with open(tmp_path / "steps.csv", "w") as file:
        file.write(",".join(STEPS) + "\n")
        line = "".join(f"{{}},1,{value},2.0,{1e-5},{2e-4},1.0,32\n" for value in (0.5, 0.7))
        file.writelines(line.format(i, i + 1) for i in range(1, n, 2))
    page.write_page(tmp_path / "page.html", tmp_path, small.folder / "test")
    assert (tmp_path / "page.html").stat().st_size < 300_000


def test_many_clips_and_many_classes_are_listed_in_part(tmp_path, monkeypatch):
    made = Made(tmp_path / "run", [f"class {i}" for i in range(40)], per_class=9)
    monkeypatch.setattr(page, "MATRIX", 30)
    monkeypatch.setattr(page, "ALL_CELLS", 120)
    monkeypatch.setattr(page, "PER_CELL", 2)
    source = made.write(examples=()).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="clips">(.*?)</script>', source)[1])
    listed = sum(map(len, data["cells"].values()))
    assert listed <= 120 and max(map(len, data["cells"].values())) <= 2
    assert "At most 2 of a cell and 120 in all are listed" in source and "Of 40 classes the 30 with the most confusions are drawn" in source
    wrong = [cell for cell in data["cells"] if len(set(cell.split(","))) == 2]
    matrix = confusion_matrix(made.labels, made.scores.argmax(axis=1))
    assert len(wrong) == np.count_nonzero(matrix - np.diag(np.diag(matrix)))  # wrong ones come first


def test_a_failed_write_leaves_the_old_page(small, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            small.write(out)
    assert out.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_importing_the_page_loads_neither_torch_nor_pictures():
    code = "import sys, report.page; assert not {'torch', 'matplotlib', 'PIL', 'soundfile'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- out of a run ---

def test_the_program_writes_it(tones, tmp_path, monkeypatch, capsys):
    """After training and by evaluate.py: the clips that the files name, as they sound, and what the results say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with calm(monkeypatch) as patch:
        patch.setattr(train, "write_report", evaluate.write_report)
        assert train.main(["--data", str(tones), *TINY, "--run-dir", "run"]) == 0
    run, out = tmp_path / "run", capsys.readouterr().out
    assert "written: run/report.html" in out
    source = (run / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    words = " ".join(Text(source).words)
    n_train = json.loads((run / "run.json").read_text())["clips"]["train"]
    assert f"{metrics['accuracy']:.1%} of {metrics['n']} test clips" in words and f"All {n_train} were looked at" in words
    assert "leakage between the splits" in words.split("not found:")[1] and source.count("<audio") == source.count('class="card"') > 6
    assert source.count('class="over"') > 3 and "python evaluate.py --ckpt run/best.pt" in re.sub(" +", " ", words)
    for number in range(source.count('class="card"')):  # each card: its sound is the file's, at the second that it says
        card = re.search(rf'<article class="card" id="clip{number}">.*?</article>', source)[0]
        said = re.search(r'href="\.\./[^"]*/(\w+/\w+\.wav)"><bdi>[^<]*</bdi></a> ([\d.]+) to ([\d.]+) s', card)
        wave, rate = sf.read(io.BytesIO(base64.b64decode(re.search(r'data:audio/mpeg;base64,([^"]+)', card)[1])))
        want = read_audio(tones / said[1], rate, round(float(said[2]) * rate), len(wave))
        assert float(said[3]) - float(said[2]) == pytest.approx(0.9, abs=0.11)
        a, b = (np.abs(np.fft.rfft(part[:18000])) for part in (wave, want))
        assert np.corrcoef(a, b)[0, 1] > 0.9, said[1]

    (run / "report.html").unlink()
    evaluate.main(["--ckpt", "run/best.pt", "--device", "cpu", "--amp", "off"])
    assert "written: run/report.html" in capsys.readouterr().out
    same = (run / "report.html").read_text(encoding="utf-8")
    assert re.sub(r"data:[^\"]*", "", same) == re.sub(r"data:[^\"]*", "", source)
    evaluate.main(["--ckpt", "run/best.pt", "--device", "cpu", "--amp", "off", "--split", "train", "--out", "else where"])
    text = (tmp_path / "else where" / "report.html").read_text(encoding="utf-8")
    assert "training clips" in text and "The worst mistakes" not in text and (run / "report.html").read_text(encoding="utf-8") == same
    assert "--split=train" in text and "'--out=else" in re.sub("<[^>]+>", "", text).replace("&#x27;", "'")
    other = tmp_path / "other"
    for name in ("low", "high"):
        shutil.copytree(tones / name, other / name)
        for path in (other / name).iterdir():
            path.rename(path.with_name("x" + path.name))
    evaluate.main(["--ckpt", "run/best.pt", "--device", "cpu", "--amp", "off", "--data", str(other)])
    text = (run / "all" / "report.html").read_text(encoding="utf-8")
    assert "of 32 clips are named right" in text and "other, not the data it was trained on" in text and "were looked at" not in text and "1 class without a clip to judge by: mid" in text

    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # no page can be written there
    (run / "test" / "metrics.json").unlink()
    evaluate.main(["--ckpt", "run/best.pt", "--device", "cpu", "--amp", "off"])
    assert "run/report.html: cannot be written (Is a directory); the results are in run/test" in capsys.readouterr().out
    assert json.loads((run / "test" / "metrics.json").read_text()) == metrics


# --- in a browser ---

FLAGS = ("--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync --autoplay-policy=no-user-gesture-required").split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver here: the page is not tried in a browser (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def visit(browser, made, width=1280, dark=False, media=""):
    """Open a page at a width, and hold that it says nothing on the console and asks for nothing but itself."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    browser.get_log("performance"), browser.get_log("browser")
    address = (made.folder / "report.html").as_uri()
    browser.get(address)
    return lambda script, *arguments: browser.execute_script(f"return {script}", *arguments)


def hold_quiet(browser, address):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert address in asked and {url.split(":")[0] for url in asked if url != address} <= {"data"}, asked
    assert browser.get_log("browser") == []


def until(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.05)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    ActionChains(browser).send_keys(*keys).perform()


def point(browser, element, click=False):
    from selenium.webdriver.common.action_chains import ActionChains
    chain = ActionChains(browser).move_to_element(element)
    (chain.click() if click else chain).perform()


SHOWN = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[{}].dataset.value)"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("size", ["small", "large"])
def test_in_a_browser(browser, request, size, width):
    """It opens, sorts, lists the clips of a cell, plays, and asks for nothing, with 10 and 100 classes, on a phone and a desk."""
    made = request.getfixturevalue(size)
    js = visit(browser, made, width)
    assert js("document.title") == "made & <u>sold" and js("document.querySelectorAll('h1').length") == 1
    assert js("document.documentElement.scrollWidth") <= width and js("innerWidth") == width  # wide things scroll in their own boxes
    wide = js("[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && "
              "!e.closest('.scroll, .matrix, .picture')).map(e => e.outerHTML.slice(0, 80))")
    assert wide == []
    words = js("[...document.querySelectorAll('pre span')].map(e => { const text = document.createRange(); text.selectNodeContents(e); "
               "const r = text.getBoundingClientRect(); return [r.top, r.left, r.right]; })")
    assert len(words) > 10 and all(b[0] > a[0] or b[1] >= a[2] - 1 for a, b in zip(words, words[1:]))  # none over another

    # the table, by recall: rising at the second press, undefined at the end
    head = "document.querySelectorAll('thead button')[1]"
    matrix = confusion_matrix(made.labels, made.scores.argmax(axis=1), labels=range(len(made.names)))
    recall = np.diag(matrix) / matrix.sum(axis=1)
    assert js("document.querySelectorAll('thead th')[1].getAttribute('aria-sort')") == "none"
    js(f"{head}.click()")
    assert [float(v) for v in js(SHOWN.format(1))] == pytest.approx(sorted(recall, reverse=True), abs=1e-5)
    js(f"{head}.click()")
    assert [float(v) for v in js(SHOWN.format(1))] == pytest.approx(sorted(recall), abs=1e-5)
    assert js("document.querySelectorAll('thead th')[1].getAttribute('aria-sort')") == "ascending"
    js("document.querySelectorAll('thead button')[4].click()")
    precision = js(SHOWN.format(4))
    assert precision[-1] == "" and [float(v) for v in precision[:-1]] == sorted(map(float, precision[:-1]), reverse=True)
    js("document.querySelectorAll('thead button')[0].click()")
    assert js(SHOWN.format(0)) == js("[...arguments[0]].sort((a, b) => a.localeCompare(b))", made.names)

    # a cell of the matrix: its clips, all of them, the surest first
    wrong = matrix - np.diag(np.diag(matrix))
    truth, answer = (int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
    cell = f"document.querySelector('.cell[data-cell=\"{truth},{answer}\"]')"
    js(f"{cell}.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}})")
    point(browser, js(cell))
    assert js("document.getElementById('readout').textContent") == (
        f"{made.names[truth]} taken for {made.names[answer]}: {wrong.max()} of {matrix[truth].sum()} clips")
    point(browser, js(cell), click=True)
    guesses = made.scores.argmax(axis=1)
    rows = [i for i in np.argsort(-made.scores.max(axis=1), kind="stable") if (made.labels[i], guesses[i]) == (truth, answer)]
    assert js("[...document.querySelectorAll('#cell-clips li')].map(item => item.firstChild.textContent)") == [
        markup.clean(made.paths[i]) for i in rows]
    assert js("document.getElementById('cell-title').textContent") == f"{made.names[truth]} → {made.names[answer]}"
    assert "the surest first" in js("document.getElementById('cell-note').textContent")
    links = js("[...document.querySelectorAll('#cell-clips a[href^=\"#clip\"]')].map(a => a.getAttribute('href'))")
    assert links and all(js(f"document.querySelector('{link}') !== null") for link in links)  # the worst are heard below

    # sound: it plays, the line walks, another one stops it
    assert js("document.querySelectorAll('audio').length") == len(made.examples)
    playing = "document.querySelectorAll('audio')[{}]"
    js("void " + playing.format(0) + ".play()")
    until(lambda: js(playing.format(0) + ".currentTime") > 0.2)
    assert js(playing.format(0) + ".duration") == pytest.approx(2.0, abs=0.1)
    assert float(js("document.querySelector('.playing .head').style.left")[:-1]) > 5
    js("void " + playing.format(1) + ".play()")
    until(lambda: js(playing.format(0) + ".paused") and js(playing.format(1) + ".currentTime") > 0.1)
    picture = js("document.querySelectorAll('.picture')[2]")
    js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", picture)
    point(browser, picture, click=True)  # in its middle
    until(lambda: 1.0 <= js(playing.format(2) + ".currentTime") < 1.9)
    js("void document.querySelectorAll('audio').forEach(player => player.pause())")

    assert js("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    hold_quiet(browser, (made.folder / "report.html").as_uri())


def test_evil_names_are_shown_and_not_obeyed(browser, small):
    js = visit(browser, small)
    assert EVIL[0] in js("document.body.innerText") and js("document.querySelector('tbody th').title") == EVIL[0]
    assert js("document.querySelectorAll('img[src=x], body b b, u u, main script, [onerror]').length") == 0
    for i in range(len(EVIL)):  # through what the script writes, too
        for cell in js(f"Object.keys(clips.cells).filter(key => key.startsWith('{i},'))"):
            js("choose(arguments[0])", cell)
            assert js("document.querySelectorAll('#cell-clips script, #cell-clips img').length") == 0
            assert EVIL[i] in js("document.getElementById('cell-title').textContent")
    js("choose('0,0')")
    hrefs = js("Object.keys(clips.cells).flatMap(key => (choose(key), [...document.querySelectorAll('#cell-clips a')].map(a => a.getAttribute('href'))))")
    assert len(hrefs) >= 80 and all(href.startswith(("audio/", "#clip")) for href in hrefs)
    hold_quiet(browser, (small.folder / "report.html").as_uri())  # an alert would have stopped all this


def test_the_policy_stops_what_the_page_would_not_do(browser, small):
    """The browser itself refuses whatever a hole would let through: the control to the tests above."""
    js = visit(browser, small)
    js("void (document.querySelector('h1').innerHTML = '<img src=x onerror=\"window.obeyed = 1\">')")
    assert js("fetch('http://127.0.0.1:9/').then(() => 'sent', error => 'refused')") == "refused"
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert any("connect" in message and "Content Security Policy" in message for message in refused), refused
    assert any("img-src" in message or "image" in message for message in refused), refused
    assert js("window.obeyed") is None


def test_by_keyboard(browser, small):
    from selenium.webdriver.common.keys import Keys
    js = visit(browser, small)
    js("document.querySelector('thead button').focus()")
    press(browser, Keys.ENTER)
    assert js("document.querySelector('thead th').getAttribute('aria-sort')") == "ascending"
    assert js("[...document.querySelectorAll('.cell')].filter(cell => cell.tabIndex === 0).length") == 1  # one stop, not a hundred
    js("document.querySelector('.cell').focus()")
    press(browser, Keys.ARROW_DOWN)
    here = js("document.activeElement.dataset.cell")
    assert here != "0,0" and int(here.split(",")[0]) > 0
    assert js("document.activeElement.tabIndex") == 0 and js("document.querySelector('.cell').tabIndex") == -1
    assert js("document.getElementById('readout').textContent") == js("document.activeElement.getAttribute('aria-label')")
    press(browser, Keys.ENTER)
    assert js("document.querySelectorAll('#cell-clips li').length") == js("clips.cells[arguments[0]].length", here) > 0
    seen = set()
    for key in [Keys.ARROW_UP] * 12 + [Keys.ARROW_RIGHT] * 12 + [Keys.ARROW_DOWN] * 12 + [Keys.ARROW_LEFT] * 12:
        press(browser, key)
        seen.add(js("document.activeElement.dataset.cell"))
    assert len(seen) > 8
    js("document.querySelector('.largest button').focus()")
    press(browser, Keys.ENTER)
    assert js("document.activeElement.id") == "cell-title"  # the focus goes where the list is


def test_light_dark_and_print(browser, small):
    def brightness(js, what="backgroundColor", of="document.body"):
        return sum(map(int, re.findall(r"\d+", js(f"getComputedStyle({of}).{what}"))[:3])) / 765

    light, dark = (visit(browser, small, dark=dark) for dark in (False, True))
    assert brightness(dark) < 0.15 and brightness(dark, "color") > 0.85
    light = visit(browser, small)
    assert brightness(light) > 0.95 and brightness(light, "color") < 0.2
    printed = visit(browser, small, media="print")
    assert printed("[...document.querySelectorAll('audio, nav, .clips')].every(e => getComputedStyle(e).display === 'none')")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"])
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF") and 3 <= pages <= 15


def test_what_mattered_can_be_hidden(browser, small):
    js = visit(browser, small)
    shown = "[...document.querySelectorAll('.over')].map(e => getComputedStyle(e).display)"
    assert set(js(shown)) == {"block"}
    js("document.getElementById('mattered').click()")
    assert set(js(shown)) == {"none"}
