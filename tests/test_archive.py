"""Archives that are damaged, hostile or not the published ones."""
import hashlib
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from dataset_server import (
    FILES,
    MAKERS,
    assert_not_fetched,
    fetch_quietly,
    make_urbansound8k,
    names_in_cache,
    read_tree,
)

from data.manifest import DataError
from data.named import SOURCES

# ---- not the published file

def test_a_length_that_is_too_long(server, put, tmp_path):
    put("esc50")
    server.excess_length = 100
    assert_not_fetched("esc50", tmp_path, "cannot be fetched")
    assert [status for _, status in server.requests] == [200, 416, 200, 416]


def test_a_length_that_is_too_short(server, put, tmp_path):
    put("esc50")
    server.excess_length = -100  # a ZIP without its end
    assert_not_fetched("esc50", tmp_path, "damaged", "it was removed")
    assert names_in_cache(tmp_path) == []
    put("speechcommands")
    n = len(server.data)
    assert_not_fetched("speechcommands", tmp_path, f"{n - 100} bytes, but {n} are published")
    assert names_in_cache(tmp_path) == []


def test_more_than_the_published_size_is_not_written(server, put, tmp_path):
    put("speechcommands", size=5000)
    server.chunked = True
    assert_not_fetched("speechcommands", tmp_path, "more than the 5000 bytes")
    assert names_in_cache(tmp_path) == []


@pytest.mark.parametrize("name", ["urbansound8k", "speechcommands"])
def test_a_wrong_digest_is_removed_and_the_right_file_can_follow(name, server, put, tmp_path):
    files = put(name)
    right = server.data
    wrong = right[:1000] + bytes([right[1000] ^ 1]) + right[1001:]
    server.data = wrong
    kind = SOURCES[name].digest.split(":")[0]
    digests = [hashlib.new(kind, content).hexdigest() for content in (wrong, right)]
    assert_not_fetched(name, tmp_path, *digests, "it was removed")
    assert names_in_cache(tmp_path) == []
    archive = tmp_path / "datasets" / FILES[name]
    archive.write_bytes(wrong)  # put there by a person: not removed
    assert_not_fetched(name, tmp_path, f"{archive}: has ", "replace it")
    assert archive.read_bytes() == wrong
    archive.unlink()
    server.data = right
    assert read_tree(fetch_quietly(name, tmp_path)) == files


# ---- hostile

def tar_member(name, kind, link="", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system = 3  # Unix
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target


OUTSIDE = "is outside its folder"
LEAVING_LINK = "a link that leads outside"
ZEROS = bytes(9_000_000)
HOSTILE = {  # data set, added members (ROOM is the test's folder), part of the message
    "zip ..": ("esc50", {"../outside.txt": b"x"}, "../outside.txt"),
    "zip .. further down": ("esc50", {"ESC-50-master/audio/../../../outside.txt": b"x"}, OUTSIDE),
    "zip absolute": ("esc50", {"ROOM/outside.txt": b"x"}, "/outside.txt"),
    "zip link": ("esc50", {"l": zip_link("ESC-50-master/link", "../../..")}, LEAVING_LINK),
    "tar ..": ("urbansound8k", {"UrbanSound8K/../../outside.txt": b"x"}, OUTSIDE),
    "tar absolute": ("speechcommands", {"ROOM/outside.txt": b"x"}, "/outside.txt"),
    "tar link": (
        "urbansound8k", {"l": tar_member("UrbanSound8K/link", tarfile.SYMTYPE, "../../..")},
        LEAVING_LINK),
    "tar absolute link": (
        "urbansound8k", {"l": tar_member("link", tarfile.SYMTYPE, "/etc/passwd")}, LEAVING_LINK),
    "tar hard link": (
        "speechcommands", {"l": tar_member("./a/link", tarfile.LNKTYPE, "../outside.txt")},
        LEAVING_LINK),
    "tar link, then a file through it": (
        "urbansound8k", {"l": tar_member("UrbanSound8K/out", tarfile.SYMTYPE, "../.."),
                         "UrbanSound8K/out/outside.txt": b"x"}, LEAVING_LINK),
    "tar device": (
        "speechcommands", {"d": tar_member("./null", tarfile.CHRTYPE, devmajor=1, devminor=3)},
        "device"),
    "tar pipe": ("speechcommands", {"d": tar_member("./pipe", tarfile.FIFOTYPE)}, "device"),
    "zip bomb": ("esc50", {"ESC-50-master/zeros": ZEROS}, "far more"),
    "tar bomb": ("speechcommands", {"./zeros": ZEROS}, "far more"),
    "file as folder": ("speechcommands", {"./yes": b"x", "./yes/a.wav": b"x"}, "damaged"),
    "long name": ("esc50", {"ESC-50-master/" + "x" * 300: b"x"}, "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_write_nothing_outside(case, server, put, tmp_path):
    name, added, reason = HOSTILE[case]
    cache = tmp_path / "a" / "b"
    added = {path.replace("ROOM", str(tmp_path)): content for path, content in added.items()}
    put(name, MAKERS[name]() | added, about=2_000_000)
    assert_not_fetched(name, cache, reason, "it was removed")
    assert names_in_cache(cache) == []
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "datasets", f".{name}.lock"]


def test_an_archive_of_something_else(server, put, tmp_path):
    put("esc50", {"alone": b"x"})
    assert_not_fetched("esc50", tmp_path, "has no meta/esc50.csv in it, so it is not ESC-50",
                       "it was removed")
    assert [path.name for path in tmp_path.rglob("*")] == ["datasets", ".esc50.lock"]


def test_links_inside_are_left_out(server, put, tmp_path):
    links = {"l": tar_member("UrbanSound8K/audio/link", tarfile.SYMTYPE, "../metadata"),
             "h": tar_member("UrbanSound8K/h", tarfile.LNKTYPE, "UrbanSound8K/x")}
    files = put("urbansound8k", make_urbansound8k() | links)
    unpacked = read_tree(fetch_quietly("urbansound8k", tmp_path))
    assert unpacked.keys() == files.keys() - links.keys()


# ---- damaged

@pytest.mark.parametrize("name", SOURCES)
def test_damage_anywhere_is_reported_in_one_line(name, server, put, tmp_path):
    files = put(name, size=None, digest=None)
    whole = server.data
    for i, position in enumerate(np.linspace(0, len(whole) - 1, 25).astype(int)):
        if i % 2:
            server.data = whole[:position]
        else:
            changed = bytes([whole[position] ^ 0x55])
            server.data = whole[:position] + changed + whole[position + 1:]
        try:
            home = fetch_quietly(name, tmp_path / str(i))
        except DataError as error:
            message = str(error)
            assert message.isprintable(), message
            assert any(part in message for part in ("damaged", "has no", OUTSIDE)), message
        else:  # checksums do not cover everything: names, dates, the end of a tar
            assert set(read_tree(home).values()) <= set(files.values())
    server.data = b"<html>please log in</html>"
    assert_not_fetched(name, tmp_path / "html", "damaged")
