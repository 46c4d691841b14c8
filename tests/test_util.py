"""Helpers that every layer uses."""
import os

import pytest

from util import InputError, atomic_write, plural, printable, sha256_of, summarize


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
