"""Folders that are no classes are read for what they are, or refused."""
import pytest
from recordings import assert_not_loaded, groups_of, label_of, split_of, touch

from data.folder_words import fold_of, is_group, splits_of
from data.load import load_manifest

CLASSES = ["a", "b"]


def touch_tree(folder, *levels):
    """Two files in every combination of the folders."""
    paths = [""]
    for names in levels:
        paths = [f"{path}{name}/" for path in paths for name in names]
    touch(folder, *(f"{path}{i}.wav" for path in paths for i in range(2)))


@pytest.mark.parametrize("train, val, test", [
    ("train", "devel", "test"), ("train_data", "val_data", "test_data"),
    ("Training-Set", "Validation-Set", "Test-Set"), ("audio_train", "audio_dev", "audio_eval"),
    ("train_curated", "valid_curated", "testing"), ("trainData", "valData", "testData")])
def test_names_of_split_folders(tmp_path, train, val, test):
    touch_tree(tmp_path, [train, val, test], CLASSES)
    manifest = load_manifest(tmp_path)
    assert manifest.classes == CLASSES
    for path, split in split_of(manifest).items():
        assert path.split("/")[0] == [train, val, test][split]
    assert manifest.sources["split"].startswith("folders ")


def test_development_without_train_is_for_training(tmp_path):
    touch_tree(tmp_path, ["development", "evaluation"], CLASSES)
    manifest = load_manifest(tmp_path)
    assert set(manifest.split.tolist()) == {0, 2} and manifest.classes == CLASSES


def test_unlabelled_folders_are_left_out_and_noise_is_negative(tmp_path):
    touch_tree(tmp_path, ["train", "test"], [*CLASSES, "_background_noise_"])
    touch(tmp_path, "unlabeled/x.wav", "unlabeled/deep/y.wav")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == CLASSES and len(manifest) == 12
    for path, is_negative, split in zip(manifest.paths, manifest.is_negative, manifest.split):
        assert is_negative == ("_background_noise_" in path)
        assert split == ["train", "", "test"].index(path.split("/")[0])
    assert any("2 recordings in unlabeled" in note for note in manifest.notes)
    assert any("2 recordings in train/_background_noise_" in note for note in manifest.notes)


def test_splits_in_the_class_folders(tmp_path):
    touch_tree(tmp_path, CLASSES, ["train", "val", "test"])
    manifest = load_manifest(tmp_path)
    assert manifest.classes == CLASSES
    for path, split in split_of(manifest).items():
        assert path.split("/")[1] == ["train", "val", "test"][split]
    touch(tmp_path, "b/odd.wav")
    assert_not_loaded("b/odd.wav is in none", "move it", tmp_path)


@pytest.mark.parametrize("names", [["fold1", "fold2", "fold3"], ["Fold_01", "Fold_02", "Fold_03"],
                                   ["cv-1", "cv-2", "cv-3"]])
def test_fold_folders(tmp_path, names):
    touch_tree(tmp_path / "deep", names, CLASSES)
    manifest = load_manifest(tmp_path / "deep")
    assert manifest.classes == CLASSES and manifest.fold.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    touch_tree(tmp_path / "flat", names)
    assert_not_loaded("folds without class folders", "path,label,fold", tmp_path / "flat")


@pytest.mark.parametrize("tops", [
    ["Actor_01", "Actor_02"], ["id_00", "id_02", "id_04"], ["speaker1", "speaker2"],
    ["2019", "2020"], ["site-3", "site-11"], ["20210512", "20210513"],
    ["section_00", "section_01"]])
@pytest.mark.parametrize("inner", [[], [CLASSES]])
def test_persons_and_places_are_no_classes(tmp_path, tops, inner):
    touch_tree(tmp_path, tops, *inner)
    assert_not_loaded("look like persons, machines, places or days", "path,label,group", tmp_path)


@pytest.mark.parametrize("tops", [
    ["N1", "N2"], ["class_1", "class_2"], ["0", "1"], ["digit7", "digit8"], ["bird", "session"]])
def test_control_numbered_classes_are_classes(tmp_path, tops):
    touch_tree(tmp_path, tops)
    assert load_manifest(tmp_path).classes == tops


@pytest.mark.parametrize("tops", [["raw", "denoised"], ["siteA", "siteB"], ["summer", "winter"]])
def test_the_same_folders_in_all_top_folders(tmp_path, tops):
    touch_tree(tmp_path, tops, CLASSES)
    assert_not_loaded("contain the same folders, a, b", "put one folder per class", tmp_path)


def test_a_folder_around_the_class_folders_is_named(tmp_path):
    touch_tree(tmp_path, ["wrapped"], CLASSES)
    assert_not_loaded("only one class (wrapped)", f"give {tmp_path}/wrapped", tmp_path)


def test_classes_below_machines(tmp_path):
    touch_tree(tmp_path, ["fan", "pump"], ["id_00", "id_02"], ["normal", "abnormal"])
    assert_not_loaded("or abnormal, normal in the folders id_00, id_02", "CSV", tmp_path)


def test_persons_in_the_class_folders_are_groups(tmp_path):
    touch_tree(tmp_path, CLASSES, ["id_00", "id_02", "id_04"])
    manifest = load_manifest(tmp_path)
    assert manifest.classes == CLASSES and manifest.group_source == "folders id_00, id_02, id_04"
    for group in groups_of(manifest):
        assert len(group) == 4 and len({path.split("/")[1] for path in group}) == 1


def test_processed_copies_share_a_group(tmp_path):
    touch_tree(tmp_path, CLASSES, ["raw", "denoised"])
    touch(tmp_path, "a/raw/only.wav")
    assert groups_of(load_manifest(tmp_path)) == {
        *(frozenset({f"{c}/raw/{i}.wav", f"{c}/denoised/{i}.wav"}) for c in CLASSES
          for i in range(2)), frozenset({"a/raw/only.wav"})}


def test_selection_tables_beside_recordings(tmp_path):
    touch_tree(tmp_path, ["siteA", "siteB"])
    touch(tmp_path, "siteB/0.Table.1.selections.txt")
    assert_not_loaded("events are annotated in these recordings", "--annotated all", tmp_path)


def test_folders_of_the_system_are_skipped(tmp_path):
    touch_tree(tmp_path, CLASSES)
    touch(tmp_path, "@eaDir/x.wav", "a/@eaDir/0.wav/SYNO.jpg", "__MACOSX/a/._0.wav")
    assert set(label_of(load_manifest(tmp_path))) == {
        f"{c}/{i}.wav" for c in CLASSES for i in range(2)}


def test_words():
    assert splits_of(["train", "dev", "bus"]) == {"train": 0, "dev": 1}
    assert splits_of(["dev", "test"]) == {"dev": 0, "test": 2}
    assert splits_of(["training_1", "data", "trainer", "contest"]) == {"training_1": 0}
    assert [fold_of(name) for name in ("fold1", "Fold_02", "cv-3", "folder1", "fold")] == [
        1, 2, 3, None, None]
    assert is_group("id_00") and is_group("2021-05-12") and is_group("Actor 7")
    assert not any(map(is_group, ["A1", "1", "1234", "wren", "site"]))
