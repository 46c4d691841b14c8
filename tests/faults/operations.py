"""Let a process die, or a disk refuse, at each file operation of a save in turn."""
import builtins
import contextlib
import errno
import itertools
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import in_child, number, save

from core.run.checkpoint import CheckpointError, load_checkpoint, load_newest

DIED, COMPLETED, ENDED_EARLY = 77, 50, 51  # exit codes of a forked save


class Dead(BaseException):
    """The simulated end of the process."""


class Operations:
    """While entered, number every open, write, flush, close, fsync, link, replace, unlink and copy
    below a folder, and stop at number `stop_at`: "before" it, "after" it, or in the "half" of a
    write or copy.

    at_stop: what happens then. By default nothing more reaches the disk, as if the process had
    died. power_cut: bytes that were written and not synced are lost too.
    """

    def __init__(self, folder, stop_at=None, phase="before", at_stop=None, power_cut=False):
        self.folder, self.stop_at, self.phase = str(folder), stop_at, phase
        self.power_cut = power_cut
        self.at_stop = at_stop or self._die
        self.dead = False
        self.names = []  # of the operations so far
        self._unsynced = {}  # inode -> descriptor

    def _die(self):
        self.dead = True
        raise Dead

    def run(self, name, act, half=None):
        """Do the operation `act`, unless the process stops here."""
        if self.dead:
            raise Dead
        self.names.append(name)
        is_stop = len(self.names) - 1 == self.stop_at
        if is_stop and self.phase == "before":
            self._stop()
        if is_stop and self.phase == "half" and half:
            half()
            self._stop()
        try:
            return act()
        finally:
            if is_stop and self.phase == "after":
                self._stop()

    def _stop(self):
        if self.power_cut:
            for handle in self._unsynced.values():
                os.ftruncate(handle, 0)
        self.at_stop()

    def note_written(self, path_or_handle):
        if isinstance(path_or_handle, str):
            handle = os.open(path_or_handle, os.O_RDWR)
        else:
            handle = os.dup(path_or_handle)
        self.note_synced(handle)
        self._unsynced[os.fstat(handle).st_ino] = handle

    def note_synced(self, handle):
        unsynced = self._unsynced.pop(os.fstat(handle).st_ino, None)
        if unsynced is not None:
            os.close(unsynced)

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in ("replace", "link", "unlink"):
            self._patch.setattr(os, name, self._watched(name, getattr(os, name)))
        self._patch.setattr(builtins, "open", self._watched_open(builtins.open))
        self._patch.setattr(os, "fsync", self._watched_fsync(os.fsync))
        self._patch.setattr(shutil, "copyfile", self._watched_copy(shutil.copyfile))
        return self

    def _watched(self, name, real):
        def operation(*args, **kwargs):
            return self.run(name, lambda: real(*args, **kwargs))
        return operation

    def _watched_open(self, real_open):
        def opened(path, mode="r", *args, **kwargs):
            if not str(path).startswith(self.folder) or mode == "rb":
                return real_open(path, mode, *args, **kwargs)
            return self.run(
                "open", lambda: WatchedFile(self, real_open(path, mode, *args, **kwargs)))
        return opened

    def _watched_fsync(self, real_fsync):
        def fsync(handle):
            def act():
                real_fsync(handle)
                self.note_synced(handle)
            self.run("fsync", act)
        return fsync

    def _watched_copy(self, real_copy):
        def copyfile(source, target):
            def half():
                content = Path(source).read_bytes()
                Path(target).write_bytes(content[:len(content) // 2])

            def act():
                real_copy(source, target)
                self.note_written(str(target))
            self.run("copy", act, half)
        return copyfile

    def __exit__(self, *_):
        self._patch.undo()
        for handle in self._unsynced.values():
            os.close(handle)


class WatchedFile:
    """A file opened for writing without a buffer: a write has happened when it returns."""

    def __init__(self, operations, file):
        self.operations, self.file = operations, file

    def write(self, data):
        def put(content):
            self.file.write(content)
            self.file.flush()
            self.operations.note_written(self.file.fileno())
        self.operations.run("write", lambda: put(data), lambda: put(data[:len(data) // 2]))
        return len(data)

    def flush(self):
        self.operations.run("flush", self.file.flush)

    def close(self):
        self.operations.run("close", self.file.close)

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextlib.contextmanager
def without_fsync():
    """Saves that need not survive a power cut are faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def operations_of_last_save(folder, n_before):
    """Names of the operations of a save into a folder with `n_before` older checkpoints."""
    with Operations(folder) as operations:
        for n in range(2 - n_before, 3):
            operations.names.clear()
            save(folder, n)
    return operations.names


def try_deaths(folder, writer, n_before, power_cut=False, fork=False, places=None):
    """Let a process die before, within and after each operation of `writer(folder, 2)`.

    n_before: older checkpoints in the folder. fork: end a real process, at 50 ms each, instead of
    simulating its end. places: indices of the operations to try; by default all. Returns
    (deaths as (index, phase), problems as (index, phase, what is wrong)).
    """
    deaths, problems = [], []
    for phase in ("before", "half", "after"):
        for index in places or itertools.count():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with without_fsync():
                for n in range(2 - n_before, 2):
                    save(folder, n)
            died, completed = _die_once(folder, writer, index, phase, power_cut, fork)
            if completed:
                break
            if not died:
                continue  # an operation that has no half
            deaths.append((index, phase))
            problem = find_problem(folder, n_before)
            if problem:
                problems.append((index, phase, problem))
    return deaths, problems


def _die_once(folder, writer, index, phase, power_cut, fork):
    """Run `writer` and die at operation `index` -> (died, whether it has no such operation)."""
    end_process = (lambda: os._exit(DIED)) if fork else None
    operations = Operations(folder, index, phase, end_process, power_cut)

    def work():
        with operations:
            writer(folder, 2)

    def work_in_child():
        work()
        os._exit(ENDED_EARLY if len(operations.names) <= index else COMPLETED)

    if fork:
        code = in_child(work_in_child)
        assert code in (DIED, COMPLETED, ENDED_EARLY), code
        return code == DIED, code == ENDED_EARLY
    with contextlib.suppress(Dead, CheckpointError):
        work()
    return operations.dead, len(operations.names) <= index


def find_problem(folder, n_before):
    """What is wrong for the next start in a folder whose process died, or None."""
    try:
        state, _ = load_newest(folder)
        if state is None and n_before:
            return "no checkpoint"
        expected = (1, 2) if n_before else (2,)
        if state is not None and number(state) not in expected:
            return f"an older state, {state['n']}"
        if n_before and number(load_checkpoint(folder / "best.pt")) not in (1, 2):
            return "an older best.pt"
        with without_fsync():
            save(folder, 3)
        if [number(load_checkpoint(folder / name)) for name in ("last.pt", "best.pt")] != [3, 3]:
            return "the next save was lost"
        leftovers = [path.name for path in folder.glob("*.tmp")]
        if leftovers:
            return "left over: " + ", ".join(leftovers)
    except (CheckpointError, AssertionError) as error:
        return str(error)
    return None
