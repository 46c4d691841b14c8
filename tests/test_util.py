"""Helpers that every layer uses."""
import errno
import os

import pytest

from util import (
    InputError,
    atomic_write,
    is_disk_error,
    plural,
    printable,
    sha256_of,
    summarize,
)


def test_printable():
    assert printable("a\nb\udcff é\t") == "a\\nb\\udcff é\\t"


def test_an_error_fits_on_one_line():
    assert str(InputError("a\nb")) == "a\\nb"


def test_counts_and_lists():
    assert plural(1, "clip") == "1 clip" and plural(2000, "clip") == "2,000 clips"
    assert summarize("abc") == "a, b, c" and summarize("abcdefg") == "a, b, c, d, e and 2 more"


def test_atomic_write(tmp_path):
    path = tmp_path / "new/folder/x"
    with atomic_write(path) as file:
        file.write("old")
    assert os.stat(path).st_mode & 0o777 == 0o644
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x"]


def test_sha256_of(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea")


# --- which errors are the disk's ---

def error_of(function, *args):
    with pytest.raises(OSError) as caught:
        function(*args)
    return caught.value


def test_a_folder_that_is_gone_is_the_disks_fault(tmp_path):
    (tmp_path / "file").touch()
    for error in (error_of(open, tmp_path / "gone" / "x"), error_of(os.mkdir, tmp_path / "file"),
                  error_of(open, tmp_path / "file" / "x"), error_of(open, tmp_path, "w"),
                  error_of(open, tmp_path / ("x" * 300)), OSError(errno.ENOSPC, "full"),
                  OSError(errno.EIO, "broken"), OSError(errno.EINVAL, "invalid", "a:b.wav"),
                  error_of(os.replace, str(tmp_path / "gone/x").encode(), b"y")):
        assert is_disk_error(error), error


def test_an_error_of_the_program_is_not(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "file") as file:
        invalid = error_of(os.lseek, file.fileno(), -5, os.SEEK_SET)
    for error in (error_of(open, tmp_path / "missing.json"), error_of(open, "missing.json"),
                  invalid, error_of(os.mkdir, tmp_path / "folder"), OSError("no errno"),
                  error_of(os.close, 10**6), ValueError("x"), FileNotFoundError("text only")):
        assert not is_disk_error(error), error
