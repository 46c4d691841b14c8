"""Class names that look alike, and cells that mean nothing."""
import pytest
from recordings import assert_not_loaded, assert_refused, label_of, touch, write_table

from data.load import load_manifest
from data.names import unify_names


@pytest.mark.parametrize("names, expected", [
    (["Bl\u00e4uling", "Bla\u0308uling"], "Bl\u00e4uling"),  # composed and decomposed
    (["sea gull", "sea\u00a0gull", "sea  gull"], "sea gull"),  # no-break and double blanks
    (["wren", "wren\u200b", "\ufeffwren"], "wren"),  # invisible characters
    (["3", "3.0"], "3"),
])
def test_spellings_of_one_name(names, expected):
    unified, notes = unify_names([*names, "other"])
    assert unified == {**dict.fromkeys(names, expected), "other": "other"}
    assert len(notes) == 1 and ascii(names[0]) in notes[0]


def test_names_that_differ_stay(tmp_path):
    names = ["a-1", "a-11", "1", "11", "1.5", "2.0", "x", "xx", "Möwe", "Mowe"]
    unified, notes = unify_names(names)
    assert unified == {name: name for name in names} and notes == []


@pytest.mark.parametrize("names", [
    ("Dog", "dog"), ("dog bark", "dog_bark"), ("dog-bark", "Dog Bark"), ("1", "01"),
    ("STRASSE", "straße")])
def test_names_that_may_be_one_class_are_refused(names):
    assert_refused(f"{min(names)} and {max(names)}", "rename one",
                   unify_names, [*names, "cat"], data="here")


def test_a_checkpoint_s_spelling_wins():
    known = ["Bla\u0308uling", "Dog", "dog", "x"]
    assert unify_names(["Bl\u00e4uling", "x"], known)[0] == {
        "Bl\u00e4uling": "Bla\u0308uling", "x": "x"}
    assert unify_names(["Dog", "dog"], known)[0] == {"Dog": "Dog", "dog": "dog"}


@pytest.mark.parametrize("text", ["nan", "NaN", "NA", "N/A", "None", "null", "#N/A", "<NA>"])
def test_missing_values_are_no_classes(tmp_path, text):
    touch(tmp_path, "a.wav", "b.wav", "c.wav", "None/a.wav", "some/b.wav")
    table = write_table(tmp_path, f"path,label\na.wav,x\nb.wav,{text}\nc.wav,y\n")
    assert_not_loaded(f"row 3: label is '{text}'", "remove the row", table)
    table = write_table(tmp_path, "path,label\na.wav,x\nb.wav,none\nc.wav,y\n")
    assert load_manifest(table).classes == ["none", "x", "y"]


def test_folders_may_be_called_none_and_are_unified(tmp_path):
    touch(tmp_path, "None/a.wav", "Bl\u00e4u/b.wav", "Bla\u0308u/c.wav")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ["Bl\u00e4u", "None"]
    assert set(label_of(manifest)) == {"None/a.wav", "Bl\u00e4u/b.wav", "Bla\u0308u/c.wav"}
