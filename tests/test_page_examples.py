"""The clips that report.html shows: which ones, how they sound and look."""
import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile as sf
from PIL import Image

from report import examples, page
from report.media import mp3


def in_page_order(examples_):
    return sorted(examples_, key=lambda example: list(examples.KINDS).index(example.kind))


def test_sound_is_what_the_model_got(made, source):
    sounds = re.findall(r'<audio [^>]*src="data:audio/mpeg;base64,([^"]+)"', source)
    assert len(sounds) == len(made.examples)
    for sound, example in zip(sounds, in_page_order(made.examples), strict=True):
        wave, rate = sf.read(io.BytesIO(base64.b64decode(sound)))
        assert rate == 22050 and abs(len(wave) - len(example.wave)) < 2000
        assert 0.7 < np.abs(wave).max() < 1.1
        peaks = [int(np.abs(np.fft.rfft(part[:44100])).argmax()) for part in (wave, example.wave)]
        assert abs(peaks[0] - peaks[1]) <= 2  # the same tone
    assert mp3(np.zeros(100, np.float32), 22051) is None


def embedded_pictures(source, alt):
    found = re.findall(r'alt="([^"]+)"[^>]*src="data:image/png;base64,([^"]+)"', source)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            for text, data in found if text.startswith(alt)]


def test_spectrograms_are_upright_on_one_grey_scale(made, source):
    pictures = embedded_pictures(source, "spectrogram")
    shown = in_page_order(made.examples)
    for picture, example in zip(pictures, shown, strict=True):
        assert picture.shape == (128, 87)
        peaks = [int(part.mean(axis=1).argmax()) for part in (picture[::-1], example.spectrogram)]
        assert abs(peaks[0] - peaks[1]) <= 1
    values = np.concatenate([example.spectrogram.ravel() for example in shown])
    shades = np.concatenate([picture[::-1].ravel() for picture in pictures]).astype(float)
    low, high = np.percentile(values, (1, 99.7))
    expected = 255 * np.clip((values - low) / (high - low), 0, 1)
    assert np.abs(shades - expected).max() < 255 / 31


def test_relevance_maps_are_upright(made, source):
    pictures = embedded_pictures(source, "the patches")
    shown = [example for example in in_page_order(made.examples) if example.relevance is not None]
    assert len(shown) > 10
    for picture, example in zip(pictures, shown, strict=True):
        strongest = np.unravel_index(picture[::-1, :, 3].argmax(), (12, 8))
        assert strongest == np.unravel_index(example.relevance.argmax(), (12, 8))


def test_relevance_map_lies_over_its_patches(source):
    """8 patches of 16 frames, every 10, in 87 frames: the middle of the first starts at frame 3."""
    style = re.search(r'class="over" [^>]*style="([^"]+)"', source)[1]
    left, width, bottom, height = (float(value) for value in re.findall(r":([\d.]+)%", style))
    assert re.findall("[a-z]+", style) == ["left", "width", "bottom", "height"]
    assert (left, width) == pytest.approx((100 * 3 / 87, 100 * 80 / 87), abs=0.01)
    assert (bottom, height) == pytest.approx((100 * 3 / 128, 100 * 120 / 128), abs=0.01)


def test_choice_of_single_label_examples():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(5), 300)
    predicted = scores.argmax(axis=1)
    labels = np.where(rng.random(300) < 0.5, predicted, rng.integers(0, 5, 300))
    margins = scores.max(axis=1) - scores[np.arange(300), labels]
    chosen = examples.choose(scores, labels)
    assert len({i for _, i, _ in chosen}) == len(chosen)
    assert all(focus == predicted[i] for _, i, focus in chosen)
    by_kind = {kind: [i for k, i, _ in chosen if k == kind] for kind in examples.OF_TEST}
    # Correct clips are of different classes, of which there are 5.
    assert [len(rows) for rows in by_kind.values()] == [10, 6, 5]
    wrong = by_kind["wrong"]
    assert list(margins[wrong]) == sorted(margins[wrong], reverse=True)
    assert margins[wrong[0]] == margins.max()
    pairs = [(labels[i], predicted[i]) for i in wrong]
    assert all(pairs.count(pair) <= 2 and pair[0] != pair[1] for pair in pairs)
    ordered = np.sort(scores, axis=1)
    closest = np.argsort(ordered[:, -1] - ordered[:, -2])
    assert set(by_kind["uncertain"]) <= set(closest[:16].tolist())
    assert len({labels[i] for i in by_kind["right"]}) == 5
    assert all(labels[i] == predicted[i] for i in by_kind["right"])
    suspects = [i for _, i, _ in examples.choose(scores, labels, ("suspect",))]
    assert suspects == np.argsort(-margins)[:12].tolist()
    assert examples.choose(np.eye(3), np.arange(3), ("wrong", "suspect")) == []  # no mistakes


def multi_label_case():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((200, 4)), (rng.random((200, 4)) < 0.4).astype(float)
    labels[np.arange(200), rng.integers(0, 4, 200)] = 1
    labels[(labels == 0) & (rng.random((200, 4)) < 0.1)] = np.nan
    scores[:40] = np.where(labels[:40] == 1, 0.9, 0.05) * rng.random((40, 4)) ** 0.02  # correct
    return scores, labels, np.array([0.3, 0.5, 0.6, 0.7])


def test_choice_of_multi_label_examples():
    """The same by a loop over clips and classes."""
    scores, labels, thresholds = multi_label_case()
    errors, distances = {}, {}
    for i in range(200):
        known = [c for c in range(4) if not np.isnan(labels[i, c])]
        distances[i] = min(abs(scores[i, c] - thresholds[c]) for c in known)
        wrong = {}
        for c in known:
            if (scores[i, c] >= thresholds[c]) != labels[i, c]:
                wrong[c] = scores[i, c] if labels[i, c] == 0 else 1 - scores[i, c]
        if wrong:
            errors[i] = max(wrong.items(), key=lambda item: item[1])
    chosen = examples.choose(scores, labels, thresholds=thresholds)
    by_kind = {kind: [(i, focus) for k, i, focus in chosen if k == kind]
               for kind in examples.OF_TEST}
    assert [len(found) for found in by_kind.values()] == [10, 6, 4]
    assert len({i for _, i, _ in chosen}) == 20
    assert all(errors[i][0] == focus for i, focus in by_kind["wrong"])
    values = [errors[i][1] for i, _ in by_kind["wrong"]]
    assert values == sorted(values, reverse=True)
    assert values[0] == max(value for _, value in errors.values())
    alike = [(labels[i, focus], focus) for i, focus in by_kind["wrong"]]
    assert max(map(alike.count, alike)) == 2  # misses, or false alarms, of one class
    closest = sorted(distances, key=distances.get)[:16]
    assert {i for i, _ in by_kind["uncertain"]} <= set(closest)
    assert not any(i in errors for i, _ in by_kind["right"])
    assert sorted(focus for _, focus in by_kind["right"]) == [0, 1, 2, 3]
    suspects = [(i, focus) for _, i, focus in examples.choose(
        scores, labels, ("suspect",), thresholds)]
    assert suspects == [(i, errors[i][0]) for i in sorted(errors, key=lambda i: -errors[i][1])[:12]]


def test_round_seconds_lie_where_they_belong():
    for seconds in (0.3, 1.0, 2.0, 4.0, 10.24, 3600.0):
        ticks = examples.second_ticks(seconds)
        assert 2 <= len(ticks) <= 6
        assert all(float(text) == pytest.approx(place * seconds, abs=0.006)
                   for text, place in ticks)


def repeated(example, share):
    """An example whose clip of `share` of the window was repeated to fill it."""
    return replace(example, end=example.start + share * len(example.wave) / example.rate,
                   spectrogram=np.resize(example.spectrogram, example.spectrogram.shape))


def test_repeated_clip_is_shown_once_with_a_line(made, tmp_path):
    original = next(example for example in made.examples if example.relevance is not None)
    pages = {}
    for share in (0.25, 1.0):  # the second is the control
        out = made.write(tmp_path / f"{share}.html", examples=[repeated(original, share)])
        pages[share] = out.read_text(encoding="utf-8")
    assert "shorter than the window of 2.0 s" in " ".join(pages[0.25].split())
    assert "shorter than the window" not in " ".join(pages[1.0].split())
    assert embedded_pictures(pages[0.25], "spectrogram")[0].shape == (128, 22)  # of 87 frames
    assert embedded_pictures(pages[1.0], "spectrogram")[0].shape == (128, 87)
    assert embedded_pictures(pages[0.25], "the patches")[0].shape[:2] == (12, 2)
    assert 'data-seconds="0.5' in pages[0.25] and 'data-seconds="2.0' in pages[1.0]
    sound = re.search('src="data:audio/mpeg;base64,([^"]+)"', pages[0.25])[1]
    wave, rate = sf.read(io.BytesIO(base64.b64decode(sound)))
    assert len(wave) / rate == pytest.approx(0.5, abs=0.1)


def test_clip_padded_with_silence_is_shown_whole(made):
    short = repeated(made.examples[0], 0.25)
    assert examples.first_copy(short, (16, 10)).window == 2.0  # control
    run = json.loads((made.folder / "run.json").read_text())
    run["flags"]["short"] = "pad"
    assert not page.shown_once([short], run["flags"], (16, 10))[0].window
