"""evaluate.py --data: the run's own data, other data, or some of both, by what is in the files."""
import shutil

import numpy as np
import pytest
import soundfile as sf
from conftest import tone

import evaluate
from core.run.checkpoint import Checkpoint, load_checkpoint
from data.content import content_key
from data.manifest import DataError


@pytest.fixture(scope="module")
def checkpoint(finished_run):
    return load_checkpoint(finished_run / "best.pt")


def read(checkpoint, data, data_is=None):
    return evaluate.evaluation_data(checkpoint, str(data), None, "test", data_is)


def second_season(tones, folder, n_same=0):
    """The same names, lengths and classes as `tones`; all recordings but n_same are others."""
    for i, file in enumerate(sorted(tones.rglob("*.wav"))):
        copy = folder / file.relative_to(tones)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if i < n_same:
            shutil.copy(file, copy)
        else:
            sf.write(copy, tone(1.0, seed=1000 + i), 16000)
    return folder


def as_older(checkpoint, root):
    """The checkpoint as it was before keys were stored, of recordings below `root`."""
    manifest = {**checkpoint["manifest"], "content": None, "root": str(root)}
    return Checkpoint(checkpoint.path, {**checkpoint, "manifest": manifest})


def table(path, tones, label_of):
    files = sorted(tones.rglob("*.wav"))
    lines = [f"{file.relative_to(tones)},{label_of(i, file)}" for i, file in enumerate(files)]
    path.write_text("\n".join(["path,label", *lines]))
    return path


def test_second_season_numbered_alike_is_scored_completely(checkpoint, tones, tmp_path):
    manifest, rows, split, notes = read(checkpoint, second_season(tones, tmp_path / "new"))
    assert (len(rows), split) == (48, "all")
    assert len(manifest.rows("train")) == 0
    assert "48 differ in content" in "\n".join(notes)


def test_moved_data_keep_the_split_of_the_run(checkpoint, tones, tmp_path):
    moved = shutil.copytree(tones, tmp_path / "moved")
    _, expected, *_ = evaluate.evaluation_data(checkpoint, None, None, "test")
    for given in (moved, tones):
        _, rows, split, notes = read(checkpoint, given)
        assert rows.tolist() == expected.tolist() and split == "test"
        assert "48 clips agree" in "\n".join(notes)


@pytest.mark.parametrize("n_same", [10, 40])
def test_data_of_both_kinds_are_refused_unless_a_flag_decides(checkpoint, tones, tmp_path, n_same):
    mixed = second_season(tones, tmp_path / "mixed", n_same)
    with pytest.raises(DataError, match=rf"{n_same} clips agree.*--data-is same"):
        read(checkpoint, mixed)
    manifest, rows, split, notes = read(checkpoint, mixed, "other")
    n_used = sum(i < n_same for i in used_files(checkpoint, tones))
    assert (len(rows), split) == (48, "all")
    assert f"LEAK: {n_used} of 48 clips" in "\n".join(notes)
    manifest, rows, split, notes = read(checkpoint, mixed, "same")
    assert (len(manifest), split) == (n_same, "test")
    assert f"{48 - n_same} clips not of the run" in "\n".join(notes)


def used_files(checkpoint, tones):
    """Places in the sorted files of those that the run was trained or selected on."""
    files = [str(file.relative_to(tones)) for file in sorted(tones.rglob("*.wav"))]
    manifest = checkpoint["manifest"]
    return [files.index(path) for path, split in zip(manifest["paths"], manifest["split"])
            if split != 2]


def test_corrected_labels_are_used_and_counted(checkpoint, tones, tmp_path):
    before, rows, *_ = evaluate.evaluation_data(checkpoint, None, None, "test")
    wrong = before.paths[rows[0]]

    def label_of(_, file):
        own = file.parent.name
        is_corrected = str(file.relative_to(tones)) == wrong
        return {"low": "mid"}.get(own, "low") if is_corrected else own

    data = table(tmp_path / "corrected.csv", tones, label_of)
    manifest, rows_now, split, notes = evaluate.evaluation_data(
        checkpoint, str(data), str(tones), "test")
    assert split == "test" and rows_now.tolist() == rows.tolist()
    expected = "mid" if wrong.startswith("low") else "low"
    assert manifest.label_text(rows_now[0]) == expected
    assert [manifest.label_text(r) for r in rows_now[1:]] == [
        before.label_text(r) for r in rows[1:]]
    assert "1 differ in label" in "\n".join(notes) and "1 changed" in "\n".join(notes)


def test_a_label_of_an_unknown_class_is_refused_by_name(checkpoint, tones, tmp_path):
    data = table(tmp_path / "new.csv", tones, lambda i, file: "owl" if i == 3 else file.parent.name)
    with pytest.raises(DataError, match="does not know: owl"):
        evaluate.evaluation_data(checkpoint, str(data), str(tones), "test")


def test_clips_that_are_gone_are_counted_and_not_scored(checkpoint, tones, tmp_path):
    moved = shutil.copytree(tones, tmp_path / "moved")
    before, rows, *_ = evaluate.evaluation_data(checkpoint, None, None, "test")
    (moved / before.paths[rows[0]]).unlink()
    _, rows_now, split, notes = read(checkpoint, moved)
    assert split == "test" and len(rows_now) == len(rows) - 1
    assert "1 of the run are gone" in "\n".join(notes)


def test_training_clips_under_other_names_are_a_leak(checkpoint, tones, tmp_path):
    for i, file in enumerate(sorted(tones.rglob("*.wav"))):
        copy = tmp_path / file.parent.name / f"season2_{i}.wav"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    _, rows, split, notes = read(checkpoint, tmp_path)
    assert (len(rows), split) == (48, "all")
    n_used = len(used_files(checkpoint, tones))
    assert f"LEAK: {n_used} of 48 clips" in "\n".join(notes)


def test_older_checkpoints_are_compared_by_files_if_these_are_there(checkpoint, tones, tmp_path):
    older = as_older(checkpoint, tones)
    _, rows, split, notes = read(older, second_season(tones, tmp_path / "new"))
    assert (len(rows), split) == (48, "all")
    assert "by length" not in "\n".join(notes)


def test_older_checkpoints_without_files_say_that_only_lengths_agree(checkpoint, tones, tmp_path):
    older = as_older(checkpoint, tmp_path / "gone")
    moved = shutil.copytree(tones, tmp_path / "moved")
    _, _, split, notes = read(older, moved)
    assert split == "test" and "by length and label only" in "\n".join(notes)
    for file in moved.rglob("*.wav"):  # longer ones under the same names
        sf.write(file, tone(1.2), 16000)
    _, rows, split, _ = read(older, moved)
    assert (len(rows), split) == (48, "all")


def test_flag_same_needs_a_clip_of_the_run(checkpoint, tones, tmp_path):
    with pytest.raises(DataError, match="--data-is same: no clip"):
        read(checkpoint, second_season(tones, tmp_path / "new"), "same")


def test_key_depends_on_size_and_content_not_on_the_name(tmp_path):
    block = np.random.default_rng(0).bytes(50_000)
    changed = [block, block[:-1], bytes([block[0] ^ 1]) + block[1:], block[:-1] + b"\0",
               block[:25_000] + b"\0\0\0\0" + block[25_004:]]
    for i, content in enumerate(changed):
        (tmp_path / f"{i}").write_bytes(content)
    (tmp_path / "copy").write_bytes(block)
    keys = [content_key(tmp_path / f"{i}") for i in range(len(changed))]
    assert len(set(keys)) == len(keys) and min(keys) > 0 and max(keys) < 2**63
    assert content_key(tmp_path / "copy") == keys[0]
    assert content_key(tmp_path / "none") == 0


def test_training_clips_in_another_format_are_a_leak(checkpoint, tones, tmp_path):
    other = second_season(tones, tmp_path / "new")
    files = sorted(tones.rglob("*.wav"))
    used = [files[i] for i in used_files(checkpoint, tones)[:5]]
    for file in used:
        wave, rate = sf.read(file)
        copy = other / file.relative_to(tones).with_name(f"again {file.stem}.flac")
        sf.write(copy, wave / 2, rate)
    *_, notes = read(checkpoint, other)
    leaks = [note for note in notes if note.startswith("LEAK")]
    assert len(leaks) == 1 and f"{len(used)} of 53" in leaks[0] and "again" in leaks[0]


def test_control_other_recordings_are_no_leak(checkpoint, tones, tmp_path):
    *_, notes = read(checkpoint, second_season(tones, tmp_path / "new"))
    assert not any("LEAK" in note for note in notes)


def test_a_run_without_prints_says_what_is_not_checked(checkpoint, tones, tmp_path):
    manifest = {**checkpoint["manifest"], "sound": None}
    older = Checkpoint(checkpoint.path, {**checkpoint, "manifest": manifest})
    *_, notes = read(older, second_season(tones, tmp_path / "new"))
    assert any("not looked for" in note for note in notes)


def test_times_in_milliseconds_are_named(checkpoint, tones, tmp_path):
    folder = second_season(tones, tmp_path / "new")
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*.wav"))]
    path = folder / "clips.csv"
    lines = [f"{file},{file.parent.name},{100 * (i % 5)},1000" for i, file in enumerate(files)]
    path.write_text("\n".join(["path,label,start,end", *lines]))
    with pytest.raises(DataError, match="milliseconds"):
        read(checkpoint, path)
    path.write_text(path.read_text().replace("start,end", "start_ms,end_ms"))
    assert len(read(checkpoint, path)[1]) == len(files)
