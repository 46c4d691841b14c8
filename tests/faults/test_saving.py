"""Saving a checkpoint when the process dies or the disk is full (faults 2 and 5)."""
import collections
import contextlib
import errno
import os
import resource
import shlex
import shutil

import pytest
import torch
from checkpoints import check_one_line, command, in_child, number, numbered, save
from harness import TINY, exit_code, outcome, program, stop_at, without_pictures
from operations import (
    Operations,
    no_space,
    operations_of_last_save,
    try_deaths,
    without_fsync,
)

import core.run.log
import train
import util
from core.folds import is_done
from core.run.checkpoint import (
    FORMAT,
    VERSION,
    CheckpointError,
    link,
    load_checkpoint,
    load_newest,
    previous,
    save_checkpoint,
)

SAVE_OPERATIONS = {"open", "write", "flush", "close", "fsync", "link", "replace", "unlink"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are slower in several threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


# --- death around each operation (fault 2) ---

def no_links(*_, **__):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("how, n_before", [
    ("killed", 0),  # what was written stays
    ("killed", 2),
    ("power cut", 0),  # what was not synced is lost
    ("power cut", 2),
    ("power cut without links", 1),  # as on a FAT disk
])
def test_death_around_every_operation_of_a_save_loses_nothing(how, n_before, tmp_path, monkeypatch):
    expected_operations = SAVE_OPERATIONS
    if how == "power cut without links":
        monkeypatch.setattr(os, "link", no_links)
        expected_operations = SAVE_OPERATIONS | {"copy"}
    names = operations_of_last_save(tmp_path, n_before)
    count = collections.Counter(names)
    assert count.keys() == expected_operations
    deaths, problems = try_deaths(tmp_path / "run", save, n_before, power_cut="power cut" in how)
    assert not problems, problems[:5]
    assert len(deaths) == 2 * len(names) + count["write"] + count["copy"]
    print(f"{how}, {n_before} before: {len(deaths)} deaths at {dict(count)}")


def test_real_death_loses_nothing(tmp_path):
    """A process that really ends, at all operations but the writes, and at some of those."""
    names = operations_of_last_save(tmp_path, 1)
    places = [i for i, name in enumerate(names) if name != "write" or i % 4 == 1]
    deaths, problems = try_deaths(tmp_path / "run", save, 1, fork=True, places=places)
    assert not problems, problems[:5]
    n_writes = sum(names[i] == "write" for i in places)
    assert len(deaths) == 2 * len(places) + n_writes > 40
    print(f"{len(deaths)} deaths of processes")


def overwrite_in_place(folder, n):
    with open(folder / "last.pt", "wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **numbered(n)}, file)
        file.flush()
        os.fsync(file.fileno())


def save_without_fsync(folder, n):
    with without_fsync():
        save(folder, n)


def unlink_best_first(folder, n):
    save_checkpoint(folder / "last.pt", numbered(n))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / "best.pt")
    os.link(folder / "last.pt", folder / "best.pt")


def remove_old_first(folder, n):
    os.unlink(folder / "last.pt")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(previous(folder / "last.pt"))
    save(folder, n)


@pytest.mark.parametrize("naive_writer, power_cut", [
    (overwrite_in_place, False),
    (save_without_fsync, True),
    (unlink_best_first, False),
    (remove_old_first, False),
])
def test_control_naive_writer_loses_a_checkpoint(naive_writer, power_cut, tmp_path):
    deaths, problems = try_deaths(tmp_path / "run", naive_writer, 1, power_cut)
    assert problems
    print(f"{naive_writer.__name__}: {len(problems)} of {len(deaths)} deaths lose something, "
          f"such as {problems[0]}")


@pytest.mark.parametrize("best_file", ["missing", "damaged", "of an earlier epoch"])
def test_best_pt_is_linked_on_resume_after_death_between_last_and_best(
        best_file, run_copy, tmp_path, monkeypatch):
    """last.pt says that its epoch is the best one, but best.pt was not linked to it yet."""
    last, best = run_copy / "last.pt", run_copy / "best.pt"
    state = load_checkpoint(last)
    best.unlink()
    save_checkpoint(last, {**state, "progress": {**state["progress"], "best_epoch": 2}})
    if best_file == "damaged":
        best.write_bytes(b"PK")
    elif best_file == "of an earlier epoch":
        best.write_bytes(previous(last).read_bytes())
    assert program(monkeypatch, tmp_path, "--resume") == 0
    assert best.read_bytes() == last.read_bytes()


# --- a full disk (fault 5) ---

def test_limit_on_the_size_of_files_keeps_the_old_checkpoint(tmp_path):
    """The limit falls into the head, the tensors or the end of the file."""
    save(tmp_path, 1)
    size = (tmp_path / "last.pt").stat().st_size
    refused = 7  # exit code

    def save_with_limit(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_checkpoint(tmp_path / "last.pt", numbered(2))
        except CheckpointError as error:
            message = str(error)
            assert "last.pt" in message
            assert os.strerror(errno.EFBIG) in message
            assert "\n" not in message
            os._exit(refused)

    for limit in (0, 1, 100, 2000, size // 2, size - 200, size - 1):
        assert in_child(lambda limit=limit: save_with_limit(limit)) == refused, limit
        state, notes = load_newest(tmp_path)
        assert number(state) == 1
        assert notes == []
        assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]
    assert in_child(lambda: save_with_limit(size)) == 0
    assert number(load_checkpoint(tmp_path / "last.pt")) == 2


def test_no_space_at_any_operation_gives_an_error_or_a_whole_save(tmp_path):
    names = set()
    for k in range(1000):
        folder = tmp_path / str(k)
        folder.mkdir()
        with without_fsync():
            save(folder, 0)
            save(folder, 1)
        operations = Operations(folder, k, "before", no_space)
        with operations, contextlib.suppress(CheckpointError):
            save_checkpoint(folder / "last.pt", numbered(2))
        if k >= len(operations.names):
            break
        names.add(operations.names[k])
        state, notes = load_newest(folder)
        assert number(state) in (1, 2)
        assert notes == []
        assert not list(folder.glob("*.tmp")), operations.names[k]
        save(folder, 3)
        assert number(load_checkpoint(folder / "best.pt")) == 3
    assert names == SAVE_OPERATIONS


def test_control_plain_save_loses_the_old_checkpoint_on_a_full_disk(tmp_path):
    path = tmp_path / "last.pt"
    torch.save(numbered(1), path)

    def save_with_limit():
        hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard_limit))
        with contextlib.suppress(OSError, RuntimeError):
            torch.save(numbered(2), path)
    in_child(save_with_limit)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_no_space_is_one_line_that_names_the_file_and_the_reason(operation, tmp_path):
    save(tmp_path, 1)
    with Operations(tmp_path) as operations:
        save(tmp_path, 1)
    place = operations.names.index(operation)
    if operation == "write":
        place += 1  # the second one, within torch.save
    with (Operations(tmp_path, place, "before", no_space),
          pytest.raises(CheckpointError) as error):
        save_checkpoint(tmp_path / "last.pt", numbered(2))
    message = str(error.value)
    assert "last.pt" in message
    assert os.strerror(errno.ENOSPC) in message
    assert "\n" not in message
    assert number(load_checkpoint(tmp_path / "last.pt")) == 1


@pytest.mark.parametrize("failing", ["rename", "copy"])
def test_link_that_fails_leaves_nothing_behind(failing, tmp_path, monkeypatch):
    """There is no space for the new name, or for the copy that replaces a link."""
    save(tmp_path, 1)
    save_checkpoint(tmp_path / "last.pt", numbered(2))
    files = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patch:
        if failing == "rename":
            patch.setattr(os, "replace", no_space)
        else:
            patch.setattr(os, "link", no_space)
            patch.setattr(shutil, "copyfile", no_space)
        with pytest.raises(OSError) as error:
            link(tmp_path / "last.pt", tmp_path / "best.pt")
    assert error.value.errno == errno.ENOSPC
    assert sorted(os.listdir(tmp_path)) == files
    assert number(load_checkpoint(tmp_path / "best.pt")) == 1


def test_full_disk_ends_a_run_with_one_line(tones, tmp_path):
    """The tables and pictures fit on the disk, the first checkpoint does not."""
    limit = 1_000_000

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = command("train", "--data", tones, *TINY, "--dim", 64, "--run-dir", "run", cwd=tmp_path,
                   preexec_fn=limit_files)
    assert done.returncode == 2, done.stderr
    check_one_line(done.stderr, "run/last.pt", os.strerror(errno.EFBIG), "--resume")
    assert "epoch  1/2" in done.stdout
    assert not list((tmp_path / "run").glob("*.pt*"))
    assert (tmp_path / "run" / "batch.png").stat().st_size < limit


# --- disks that go away, file systems that lack things ---

@pytest.mark.parametrize("operation", ["fsync", "replace", "write row"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT,
                                  errno.ENODEV])
def test_disk_that_goes_away_is_one_line_with_the_command_to_continue(
        operation, code, tones, tmp_path, monkeypatch, capsys):
    """In the second epoch; the checkpoint of the first can be continued."""
    def prepare(patch):
        real_step, n_done = train.train_step, 0

        def fail(*_, **__):
            raise OSError(code, os.strerror(code))

        def train_step(*args):
            nonlocal n_done
            n_done += 1
            if n_done == 8:
                if operation == "write row":
                    patch.setattr(core.run.log.CsvLog, "append", fail)
                else:
                    patch.setattr(os, operation, fail)
            return real_step(*args)
        patch.setattr(train, "train_step", train_step)
    assert program(monkeypatch, tmp_path, data=tones, prepare=prepare) == 2
    check_one_line(capsys.readouterr().err, os.strerror(code),
                   f"--resume --run-dir {tmp_path / 'run'}")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 1
    assert program(monkeypatch, tmp_path, "--resume") == 0


def unsupported(code, only_folders=False):
    real = os.fsync

    def operation(target, *_, **__):
        if only_folders and not os.path.isdir(f"/proc/self/fd/{target}"):
            return real(target)
        raise OSError(code, os.strerror(code))
    return operation


@pytest.mark.parametrize("name, code, only_folders", [
    ("chmod", errno.EPERM, False), ("chmod", errno.ENOTSUP, False), ("fchmod", errno.EPERM, False),
    ("fsync", errno.EINVAL, True), ("fsync", errno.ENOTSUP, True), ("link", errno.EPERM, False)])
def test_file_system_that_lacks_an_operation_is_used_without(
        name, code, only_folders, tones, finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(util, "_told", set())

    def prepare(patch):
        patch.setattr(os, name, unsupported(code, only_folders))
    assert program(monkeypatch, tmp_path, "--ema", 0, data=tones, prepare=prepare) == 0
    assert capsys.readouterr().out.count("note: this file system") == (name in ("chmod", "fsync"))
    assert outcome(tmp_path / "run") == outcome(finished_run)


def test_control_disk_that_fails_to_sync_is_no_file_system_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", unsupported(errno.EIO))
    with pytest.raises(CheckpointError):
        save(tmp_path, 1)


# --- folds ---

def test_fold_counts_as_done_only_if_it_is_complete(run_copy):
    report = run_copy / "report.html"
    report.touch()
    assert is_done(run_copy)
    for file in (report, run_copy / "test" / "metrics.json", run_copy / "test" / "scores.npz"):
        content = file.read_bytes()
        file.unlink()
        assert not is_done(run_copy), file
        file.write_bytes(content)
    (run_copy / "test" / "scores.npz").write_bytes(content[:len(content) // 2])
    assert not is_done(run_copy)


@pytest.mark.parametrize("name", ["scores.npz", "predictions.csv", "per_class.csv"])
def test_results_are_replaced_whole(name, run_copy, tmp_path, monkeypatch):
    """A death in the middle of writing leaves the old file."""
    before = (run_copy / "test" / name).read_bytes()
    real = os.replace

    def die(source, target):
        if str(target).endswith(name):
            raise KeyboardInterrupt
        real(source, target)

    def prepare(patch):
        patch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        program(monkeypatch, tmp_path, "--resume", prepare=prepare)
    assert (run_copy / "test" / name).read_bytes() == before


def test_interrupted_fold_names_the_command_for_all_folds(tones, tmp_path, monkeypatch, capsys):
    table = tmp_path / "folds.csv"
    lines = [f"{path.relative_to(tones)},{path.parent.name},{i % 3}"
             for i, path in enumerate(sorted(tones.glob("*/*.wav")))]
    table.write_text("path,label,fold\n" + "\n".join(lines) + "\n")
    flags = ["--folds", "all", "--audio-dir", tones]
    assert program(monkeypatch, tmp_path, *flags, data=table, prepare=stop_at(3)) == 143
    command = shlex.split(capsys.readouterr().out.split("continue with:\n")[1])
    assert command[:2] == ["python", "train.py"]
    assert {"--folds=all", f"--run-dir={tmp_path / 'run'}"} <= set(command)
    with without_pictures(monkeypatch):
        assert exit_code(train.main, *command[2:]) == 0
    assert (tmp_path / "run" / "folds.json").exists()
