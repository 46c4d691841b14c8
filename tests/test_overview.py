"""The table of classes, what decided labels and splits, and warnings."""
import numpy as np
import pytest
from recordings import make_manifest, write_table, write_wav

from data.overview import class_lines, source_lines, warning_lines
from data.prepare import prepare


def test_classes_with_clips_minutes_and_groups():
    manifest = make_manifest(["dog"] * 4 + ["cat"] * 2, group=[0, 0, 1, 1, 2, 3])
    manifest.duration = np.array([30, 30, 60, 60, 6, 6], np.float32)
    rows = [line.split() for line in class_lines(manifest)]
    assert rows == [["class", "clips", "minutes", "groups"], ["dog", "4", "3.0", "2"],
                    ["cat", "2", "0.2", "2"]]


def test_many_classes_take_at_most_twenty_lines():
    labels = [f"class {c:03d}" for c in range(100) for _ in range(c + 1)]
    lines = class_lines(make_manifest(labels))
    assert len(lines) == 20
    assert lines[1].split()[:3] == ["class", "099", "100"]
    assert lines[-1].split()[:3] == ["class", "000", "1"]
    assert [line for line in lines if "82 more, 10 to 91 clips each" in line] == [lines[10]]


def test_several_labels_count_for_each_class():
    manifest = make_manifest(["a", "b", "b"])
    manifest = manifest.with_label_sets([((0, 1), ()), ((1,), ()), ((1,), ())])
    rows = [line.split() for line in class_lines(manifest)]
    assert rows[1:] == [["b", "3", "0.0", "3"], ["a", "1", "0.0", "1"]]


def test_what_decided(tmp_path):
    manifest = make_manifest(["a", "b"])
    manifest.sources = {"time": "columns x as start", "label": "column species", "path": "column p"}
    assert source_lines(manifest) == [
        "path: column p", "label: column species", "split: none given, so a new one is made",
        "group: column group", "time: columns x as start"]


def with_splits(n_train, n_val, n_test, **options):
    split = [0] * n_train + [1] * n_val + [2] * n_test
    return make_manifest((["a", "b"] * len(split))[:len(split)], split=split, **options)


@pytest.mark.parametrize("sizes, named", [
    ((70, 15, 15), []), ((60, 20, 20), []), ((522, 9, 9), ["val", "test"]),
    ((40, 20, 40), ["test"])])
def test_splits_far_from_the_usual_share(sizes, named):
    lines = warning_lines(with_splits(*sizes))
    assert [line.split()[1] for line in lines] == named
    assert all(line.startswith("WARNING: ") for line in lines)
    assert warning_lines(with_splits(*sizes), by_fold=True) == []


def test_a_group_with_most_of_a_class():
    manifest = make_manifest(["a"] * 10 + ["b"] * 10, group=[0] * 7 + [*range(1, 14)])
    lines = warning_lines(manifest)
    assert len(lines) == 1 and "a (7 of 10 clips, e.g. a/000.wav)" in lines[0]


def test_very_uneven_classes_name_the_flags():
    uneven = make_manifest(["a"] * 210 + ["b"] * 10)
    lines = warning_lines(uneven)
    assert len(lines) == 1
    for flag in ("--logit-adjust 1", "--sampler balanced", "--min-clips"):
        assert flag in lines[0]
    assert warning_lines(make_manifest(["a"] * 200 + ["b"] * 10)) == []
    several = uneven.with_label_sets([((int(label),), ()) for label in uneven.labels])
    assert "--logit-adjust" not in warning_lines(several)[0]  # it needs a softmax


def test_the_start_prints_all_of_it(tmp_path):
    for i in range(40):
        write_wav(tmp_path / f"{i:02d}.wav", seed=i)
    rows = "".join(f"{i:02d}.wav,{'xy'[i % 2]},s{max(0, i - 20)}\n" for i in range(40))
    table = write_table(tmp_path, f"path,species,speaker_id\n{rows}")
    lines = []
    prepare(table, cache_dir=tmp_path / "cache", log=lines.append)
    text = "\n".join(lines)
    assert "  label: column species\n" in text and "  group: column speaker_id\n" in text
    assert ["x", "20", "0.0", "10"] in [line.split() for line in lines]
    assert "WARNING: one group (column speaker_id) holds most of a class" in text
