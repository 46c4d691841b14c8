"""Checkpoints: old or new but never half, damage is found, code never runs."""
import os
import pickle
import zipfile

import pytest
import torch

from core.run.checkpoint import (
    CheckpointError,
    link,
    load_checkpoint,
    load_newest,
    previous,
    save_checkpoint,
)
from core.run.log import CsvLog

STATE = {
    "model": {"a": torch.arange(5000.0), "b": torch.ones(3, dtype=torch.bfloat16)},
    "classes": ["ä", "b"],
    "progress": {"step": 3, "best": None},
}


def is_state(checkpoint):
    """Whether a checkpoint holds exactly STATE."""
    return (checkpoint["classes"] == STATE["classes"]
            and checkpoint["progress"] == STATE["progress"]
            and checkpoint["model"].keys() == STATE["model"].keys()
            and all(torch.equal(checkpoint["model"][name], value)
                    for name, value in STATE["model"].items()))


def test_checkpoint_reads_back_and_is_an_ordinary_torch_file(tmp_path):
    save_checkpoint(tmp_path / "last.pt", STATE)
    assert is_state(load_checkpoint(tmp_path / "last.pt"))
    assert is_state(torch.load(tmp_path / "last.pt", weights_only=True))
    assert sorted(os.listdir(tmp_path)) == ["last.pt"]


def test_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [(m.header_offset, m.file_size) for m in archive.infolist()]
    largest = max(members, key=lambda member: member[1])
    n_found = 0
    positions = [*range(0, len(good), 97), *range(len(good) - 700, len(good))]
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bad)
        try:
            assert is_state(load_checkpoint(path)), position
        except CheckpointError:
            n_found += 1
    assert n_found > 0.7 * len(positions)  # the rest: padding, time stamps
    # In the weights themselves every flip is found.
    for position in range(largest[0] + 200, largest[0] + largest[1], 997):
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_truncated_file_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    good = path.read_bytes()
    for length in (0, 3, 22, 1000, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"last\.pt"):
            load_checkpoint(path)


def test_compressed_archive_is_refused(tmp_path):
    """A small file could otherwise unpack to any size."""
    save_checkpoint(tmp_path / "last.pt", STATE)
    with (zipfile.ZipFile(tmp_path / "last.pt") as stored,
          zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed):
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        load_checkpoint(tmp_path / "bomb.pt")


def test_automatic_resume_falls_back_to_the_previous_checkpoint_and_names_the_damaged_one(tmp_path):
    path = tmp_path / "last.pt"
    assert load_newest(tmp_path) == (None, [])
    save_checkpoint(path, {**STATE, "n": 1})
    save_checkpoint(path, {**STATE, "n": 2})
    checkpoint, notes = load_newest(tmp_path)
    assert checkpoint["n"] == 2
    assert notes == []
    path.write_bytes(path.read_bytes()[:-100])
    checkpoint, notes = load_newest(tmp_path)
    assert checkpoint["n"] == 1
    assert str(path) in notes[0]
    previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_newest(tmp_path)


def test_linked_best_is_unchanged_when_last_moves_on(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {**STATE, "n": 1})
    link(tmp_path / "last.pt", tmp_path / "best.pt")
    save_checkpoint(tmp_path / "last.pt", {**STATE, "n": 2})
    save_checkpoint(tmp_path / "last.pt", {**STATE, "n": 3})
    names = ("best.pt", "last.pt", "last.pt.prev")
    assert [load_checkpoint(tmp_path / name)["n"] for name in names] == [1, 3, 2]


class Evil:
    """Pickled code that would make a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_never_runs(tmp_path):
    marker = tmp_path / "code-was-run"
    torch.save({"format": "warble", "version": 1, "model": Evil(marker)}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(marker)))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()


def test_control_pickled_code_would_run(tmp_path):
    marker = tmp_path / "code-was-run"
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()


def test_files_of_other_programs_and_versions_are_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save({"format": "warble", "version": 99}, tmp_path / "newer.pt")
    for name in ("other.pt", "newer.pt", "missing.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)


def test_version_1_is_converted(tmp_path):
    progress = {"epoch": 1, "window": 4, "step": 9}
    torch.save({"format": "warble", "version": 1, "piece": 3, "progress": progress},
               tmp_path / "old.pt")
    checkpoint = load_checkpoint(tmp_path / "old.pt")
    assert checkpoint["split_limit"] == 3
    assert checkpoint["progress"] == {"epoch": 1, "step_in_epoch": 4, "step": 9}


def test_log_continues_under_other_columns_by_name(tmp_path):
    """A newer version may have more columns; values must stay below their own names."""
    path = tmp_path / "history.csv"
    path.write_text("epoch,loss,lr\n1,0.5,0.1\n2,0.4,0.2\n3,0.3,0.3\n")
    log = CsvLog(path, ["epoch", "loss", "map", "lr"], last=2)
    log.append(epoch=3, loss=0.2, map=0.9, lr=0.3)
    log.sync()
    assert path.read_text().split() == [
        "epoch,loss,map,lr", "1,0.5,,0.1", "2,0.4,,0.2", "3,0.2,0.9,0.3"]
