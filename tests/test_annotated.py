"""Annotated recordings as training data: from tables of events to windows with labels."""
import numpy as np
import pytest

from data.annotations import AnnotationRules
from data.load import load_manifest
from data.manifest import DataError
from data.prepare import prepare
from tests.recordings import write_wav

HEADER = "\t".join(["Selection", "View", "Channel", "Begin Time (s)", "End Time (s)",
                    "Low Freq (Hz)", "High Freq (Hz)", "Species"])
# Recording -> (seconds, [(start, end, label)])
RECORDINGS = {
    "a": (20.0, [(1.0, 2.0, "owl"), (3.9, 4.1, "owl"), (9.0, 13.0, "wren")]),
    "b": (20.0, [(0.5, 0.6, "wren"), (0.7, 3.0, "owl")]),
    "c": (20.0, []),  # an empty table: nothing is there
    "d": (20.0, [(10.0, 10.0, "owl"), (16.0, 19.0, "wren")]),  # a point label
    "e": (20.0, [(5.0, 6.0, "wren")]), "f": (20.0, [(5.0, 6.0, "owl")]),
    "g": (20.0, [(5.0, 6.0, "wren"), (13.0, 14.0, "owl")]),
}


@pytest.fixture
def raven(tmp_path):
    """A folder of recordings, each beside its Raven selection table."""
    for i, (name, (seconds, events)) in enumerate(RECORDINGS.items()):
        write_wav(tmp_path / "data" / f"{name}.wav", i, round(8000 * seconds), 8000)
        rows = [f"{k}\tSpectrogram 1\t1\t{start}\t{end}\t100\t3000\t{label}"
                for k, (start, end, label) in enumerate(events, 1)]
        table = tmp_path / "data" / f"{name}.Table.1.selections.txt"
        table.write_text("\n".join([HEADER, *rows]) + "\n", newline="")
    return tmp_path


def prepared(folder, **rules):
    manifest, bad = prepare(folder / "data", cache_dir=folder / "cache", log=lambda line: None,
                            multi_label=None, seconds=4.0, annotations=AnnotationRules(**rules))
    assert not bad
    return manifest


def expected_windows(annotated):
    """{(recording, start): (classes present, classes unknown)} by a loop over milliseconds."""
    windows = {}
    for name, (seconds, events) in RECORDINGS.items():
        for begin in range(0, round(1000 * seconds), 4000):
            present, partial = set(), set()
            for start, end, label in events:
                start, end = round(1000 * start), round(1000 * end)
                inside = sum(begin <= t < begin + 4000 for t in range(start, max(end, start + 1)))
                length = max(end - start, 1)
                if inside and (inside >= 250 or 2 * inside >= length):
                    present.add(label)
                elif inside:
                    partial.add(label)
            if annotated == "all" or present:
                windows[name, begin / 1000] = (present, partial - present)
    return windows


@pytest.mark.parametrize("annotated", ["all", "parts"])
def test_windows_have_the_classes_of_the_events_in_them(raven, annotated):
    manifest = prepared(raven, annotated=annotated)
    assert manifest.classes == ["owl", "wren"]
    names = np.array(manifest.classes)
    found = {}
    for row, path in enumerate(manifest.paths):
        present, unknown = manifest.label_sets[manifest.label_set[row]]
        found[path.removesuffix(".wav"), float(manifest.start[row])] = (
            set(names[list(present)]), set(names[list(unknown)]))
        assert manifest.end[row] - manifest.start[row] == manifest.duration[row] == 4
    assert found == expected_windows(annotated)
    assert manifest.is_negative.any() == (annotated == "all")


def test_windows_of_a_recording_are_in_one_split(raven):
    manifest = prepared(raven, annotated="all")
    split_of_path = {}
    for path, split in zip(manifest.paths, manifest.split.tolist()):
        assert split_of_path.setdefault(path, split) == split
    assert set(split_of_path.values()) == {0, 1, 2}


def test_annotations_without_a_word_on_the_rest_are_refused(raven):
    with pytest.raises(DataError) as caught:
        load_manifest(raven / "data")
    assert "--annotated all" in str(caught.value) and "--annotated parts" in str(caught.value)


def test_annotated_for_class_folders_is_refused(raven):
    for name in "abcdefg":
        (raven / "data" / f"{name}.Table.1.selections.txt").unlink()
    for name, label in zip("abcdefg", "xyxyxyx"):
        target = raven / "data" / label
        target.mkdir(exist_ok=True)
        (raven / "data" / f"{name}.wav").rename(target / f"{name}.wav")
    assert load_manifest(raven / "data").classes == ["x", "y"]
    with pytest.raises(DataError, match="--annotated"):
        load_manifest(raven / "data", annotated="all")


def test_softmax_loss_for_annotations_is_refused(raven):
    with pytest.raises(DataError, match="--loss"):
        prepare(raven / "data", cache_dir=raven / "cache", log=lambda line: None,
                multi_label=False, annotations=AnnotationRules("all"))


def test_negatives_are_added_to_annotated_parts(raven):
    write_wav(raven / "quiet" / "q.wav", 99, 8 * 8000, 8000)
    manifest = prepare(raven / "data", cache_dir=raven / "cache", log=lambda line: None,
                       multi_label=None, seconds=4.0, negatives=raven / "quiet",
                       annotations=AnnotationRules("parts"))[0]
    negatives = {manifest.paths[row] for row in np.flatnonzero(manifest.is_negative)}
    assert negatives == {"quiet/q.wav"} and manifest.is_negative.sum() == 2


def test_rows_of_ones_and_zeros_tell_what_is_empty_also_for_parts(raven):
    lines = ["file,start_time,end_time,owl,wren"]
    for i, name in enumerate("abcdefg"):
        (raven / "data" / f"{name}.Table.1.selections.txt").unlink()
        lines += [f"{name}.wav,0,4,{i % 2},{1 - i % 2}", f"{name}.wav,4,8,0,0"]
    (raven / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    manifest = prepare(raven / "data" / "labels.csv", cache_dir=raven / "cache", seconds=4.0,
                       log=lambda line: None, multi_label=None,
                       annotations=AnnotationRules("parts"))[0]
    assert sorted(set(manifest.start.tolist())) == [0, 4]
    assert (manifest.is_negative == (manifest.start == 4)).all()
