"""Checkpoints: whole or absent, damage found, code never run."""
import os
import pickle

import pytest
import torch

from core.checkpoint import CheckpointError, link, load_checkpoint, load_newest, previous, save_checkpoint

STATE = {"model": {"a": torch.arange(5000.0), "b": torch.ones(3, dtype=torch.bfloat16)}, "classes": ["ä", "b"],
         "progress": {"step": 3, "best": None}}


def test_round_trip_and_it_is_an_ordinary_torch_file(tmp_path):
    save_checkpoint(tmp_path / "last.pt", STATE)
    for state in (load_checkpoint(tmp_path / "last.pt"), torch.load(tmp_path / "last.pt", weights_only=True)):
        assert torch.equal(state["model"]["a"], STATE["model"]["a"]) and state["classes"] == ["ä", "b"]
        assert state["progress"] == STATE["progress"]
    assert sorted(os.listdir(tmp_path)) == ["last.pt"]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    good = path.read_bytes()
    places = [*range(0, len(good), 997), *range(len(good) - 120, len(good))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    for length in (0, 3, 22, 1000, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="last.pt"):
            load_checkpoint(path)


def test_automatic_resume_takes_the_previous_one_and_says_so(tmp_path):
    path = tmp_path / "last.pt"
    assert load_newest(tmp_path) == (None, [])
    save_checkpoint(path, {**STATE, "n": 1})
    save_checkpoint(path, {**STATE, "n": 2})
    state, notes = load_newest(tmp_path)
    assert state["n"] == 2 and notes == []
    path.write_bytes(path.read_bytes()[:-100])
    state, notes = load_newest(tmp_path)
    assert state["n"] == 1 and "last.pt" in notes[0] and "passed over" in notes[0]
    previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_newest(tmp_path)


def test_a_linked_best_keeps_its_bytes_when_last_moves_on(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {**STATE, "n": 1})
    link(tmp_path / "last.pt", tmp_path / "best.pt")
    save_checkpoint(tmp_path / "last.pt", {**STATE, "n": 2})
    save_checkpoint(tmp_path / "last.pt", {**STATE, "n": 3})
    assert [load_checkpoint(tmp_path / name)["n"] for name in ("best.pt", "last.pt", "last.pt.prev")] == [1, 3, 2]


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/warble_was_here",)


def test_code_in_a_checkpoint_never_runs(tmp_path):
    torch.save({"format": "warble", "version": 1, "model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match="never run|not a checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not os.path.exists("/tmp/warble_was_here")


def test_other_formats(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="--weights"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no such"):
        load_checkpoint(tmp_path / "none.pt")
