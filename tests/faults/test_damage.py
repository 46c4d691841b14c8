"""Damaged checkpoints, and files that are no checkpoints (faults 4 and 17)."""
import contextlib
import errno
import io
import os
import pickle
import random
import zipfile

import pytest
import torch
from checkpoints import (
    WEIGHTS,
    check_one_line,
    command,
    flipped,
    is_numbered,
    number,
    save,
    truncated,
    with_flipped_weight,
)
from harness import program, record_clips, rows
from ways_in import MARKER, Evil, check_refused

import core.run.checkpoint
from core.run.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    previous,
    save_checkpoint,
)


@pytest.fixture
def two_saves(tmp_path):
    """(last.pt of state 2, its bytes); last.pt.prev holds state 1."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path / "last.pt", (tmp_path / "last.pt").read_bytes()


def check_falls_back(path):
    """Check that last.pt is refused by name, and that automatic resuming uses last.pt.prev."""
    with pytest.raises(CheckpointError, match=r"last\.pt") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    state, notes = load_newest(path.parent)
    assert number(state) == 1
    [note] = notes
    assert f"{path}: " in note
    assert "last.pt.prev" in note


def test_truncated_checkpoint_is_found_and_the_previous_one_used(two_saves):
    path, good = two_saves
    for bad in truncated(good, seed=4, count=100):
        path.write_bytes(bad)
        check_falls_back(path)


def test_flipped_bit_is_found_or_changes_nothing(two_saves):
    """Flips in padding and time stamps change nothing and are in no CRC-32."""
    path, good = two_saves
    n_found = 0
    for bad in flipped(good, seed=4, count=300):
        path.write_bytes(bad)
        try:
            assert is_numbered(load_checkpoint(path), 2)
        except CheckpointError:
            check_falls_back(path)
            n_found += 1
    assert n_found > 200


def fill_free_memory():
    """Put other numbers where the last checkpoint's tensors were, so that a tensor that is not read
    from the file does not get its right values by chance."""
    for _ in range(3):
        torch.full_like(WEIGHTS["a"], -1.0)


def test_any_flipped_bit_in_a_header_is_found_or_changes_nothing(two_saves):
    """Headers of the zip archive are in no CRC-32; there are a few hundred bytes of them."""
    path, good = two_saves
    with zipfile.ZipFile(path) as archive:
        headers = [range(m.header_offset, m.header_offset + 64) for m in archive.infolist()]
        headers.append(range(archive.start_dir, len(good)))
    for position in sorted({place for header in headers for place in header}):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            path.write_bytes(bad)
            fill_free_memory()
            with contextlib.suppress(CheckpointError):
                assert is_numbered(load_checkpoint(path), 2), (position, bit)


def test_control_without_the_crc_a_flipped_weight_goes_unnoticed(two_saves, monkeypatch):
    path, good = two_saves
    monkeypatch.setattr(core.run.checkpoint, "_verify_archive", lambda path: None)
    n_unnoticed = 0
    for bad in flipped(good, seed=4, count=100):
        path.write_bytes(bad)
        with contextlib.suppress(CheckpointError):
            n_unnoticed += not is_numbered(load_checkpoint(path), 2)
    assert n_unnoticed > 20


def test_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(path, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    monkeypatch.setattr(core.run.checkpoint, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match=rf"best\.pt: .*{os.strerror(errno.EIO)}"):
        load_checkpoint(tmp_path / "best.pt")


def test_given_damaged_checkpoint_is_refused_and_resume_uses_the_previous_one(
        run_copy, tmp_path, monkeypatch, capsys):
    path = run_copy / "last.pt"
    path.write_bytes(with_flipped_weight(path.read_bytes()))
    done = command("train", "--resume", path, cwd=tmp_path)
    assert done.returncode == 2
    check_one_line(done.stderr, str(path))
    assert load_checkpoint(previous(path))["progress"]["epoch"] == 1
    steps = rows(run_copy / "steps.csv")
    record = []
    assert program(monkeypatch, tmp_path, "--resume", prepare=record_clips(record)) == 0
    assert "last.pt.prev" in capsys.readouterr().out
    assert len(record) == sum(row["epoch"] == "2" for row in steps)
    assert rows(run_copy / "steps.csv") == steps
    assert [row["epoch"] for row in rows(run_copy / "history.csv")] == ["1", "2"]
    assert load_checkpoint(path)["progress"]["epoch"] == 2


# --- files that are no checkpoints ---

def zip_of(members):
    """Bytes of a zip archive of {name: bytes}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def members_of(good):
    """{name: bytes} of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def without_tensors(good):
    return zip_of({name: content for name, content in members_of(good).items()
                   if name.endswith(("/data.pkl", "/version"))})


def with_short_tensor(good):
    """A checkpoint with fewer bytes of one tensor than its shape needs."""
    return zip_of({name: content[:8] if name.endswith("data/0") else content
                   for name, content in members_of(good).items()})


VERSION_MEMBER = {"archive/version": b"3\n"}
NO_CHECKPOINTS = {  # kind -> bytes, made from a good checkpoint
    "pickle": lambda good: pickle.dumps(Evil()),
    "pickle in a zip": lambda good: zip_of(
        {"archive/data.pkl": pickle.dumps(Evil()), **VERSION_MEMBER}),
    "empty": lambda good: b"",
    "text": lambda good: b"not a checkpoint at all, only some words\n" * 9,
    "bytes after PK": lambda good: b"PK\x03\x04" + random.Random(1).randbytes(3000),
    "bytes between the ends of a zip":
        lambda good: good[:30] + random.Random(2).randbytes(3000) + good[-200:],
    "zip of nothing": lambda good: zip_of({}),
    "zip of something else": lambda good: zip_of({"a.txt": b"hello"}),
    "zip with a bad pickle": lambda good: zip_of(
        {"archive/data.pkl": b"\x80\x02junk", **VERSION_MEMBER}),
    "zip without its tensors": without_tensors,
    "TorchScript": lambda good: zip_of(
        {"archive/constants.pkl": b"3", "archive/data.pkl": b"3", **VERSION_MEMBER}),
    "tensor longer than its bytes": with_short_tensor,
    "truncated": lambda good: good[:-500],
    "flipped": with_flipped_weight,
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_file_that_is_no_checkpoint_is_refused_by_every_program(kind, finished_run, ways_in):
    path = ways_in.folder / "x.pt"
    path.write_bytes(NO_CHECKPOINTS[kind]((finished_run / "best.pt").read_bytes()))
    check_refused(ways_in, path)


def test_weights_with_names_that_are_no_text_are_refused(ways_in):
    path = ways_in.folder / "x.pt"
    torch.save({1: torch.zeros(3)}, path)
    check_refused(ways_in, path, programs=["weights"])


def test_code_in_a_checkpoint_never_runs(finished_run, ways_in, monkeypatch):
    """Wherever it is in the checkpoint."""
    state = load_checkpoint(finished_run / "best.pt")
    path = ways_in.folder / "x.pt"
    for key in ("model", "flags", "extra"):
        save_checkpoint(path, {**state, key: Evil()})
        check_refused(ways_in, path)


def test_control_code_in_a_checkpoint_runs_if_torch_may_unpickle_it(finished_run, tmp_path,
                                                                   monkeypatch):
    state = load_checkpoint(finished_run / "best.pt")
    save_checkpoint(tmp_path / "x.pt", {**state, "extra": Evil()})
    monkeypatch.chdir(tmp_path)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / MARKER).exists()
