"""Data sets by name, fetched from a server on loopback that keeps to the rules or breaks them: real archives in the real
layouts, a few small files each, and real processes where one is killed or two run at once."""
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from conftest import ROOT, tone
from data import named
from data.load import load_manifest
from data.manifest import DataError
from data.named import SOURCES, credit, fetch, find_data

FILES = {name: source.file for name, source in SOURCES.items()}


class Server(BaseHTTPRequestHandler):
    """Serves `server.data` under every path. What is asked of it is in `server.asked`: (Range or None, status)."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, headers = self.server, {}
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        status = server.statuses.pop(0) if server.statuses else 200
        data, total = server.data, len(server.data)
        if status == 200 and wanted and server.ranges and (condition == server.etag or server.rude):
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            status = 206 if first < total else 416
            data = data[first:]
            headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}" if status == 206 else f"bytes */{total}"
        if status not in (200, 206):
            data = b""
        if server.etag:
            headers["ETag"] = server.etag
        if server.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(data) + server.lie * (status == 200))
        server.asked.append((wanted, status))
        self.send_response(status)
        for pair in headers.items():
            self.send_header(*pair)
        self.end_headers()
        self.close_connection = True
        stop = server.breaks.pop(0) if server.breaks else None
        data = data[:stop] if stop is not None else data[:len(data) + min(0, server.lie)]
        with contextlib.suppress(ConnectionError):  # where the other side has seen enough
            for start in range(0, len(data), 4096):
                block = data[start:start + 4096]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if server.chunked else block)
                time.sleep(server.slow)
            if server.chunked and stop is None:
                self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()
        if stop is not None:
            server.broken.set()
            server.hold.wait(30)  # the connection stays open, or breaks at once

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked, server.statuses, server.breaks = [], [], []
    server.ranges, server.rude, server.chunked, server.lie, server.etag, server.slow = True, False, False, 0, '"one"', 0
    server.broken, server.hold = threading.Event(), threading.Event()
    server.hold.set()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("WARBLE_DATASETS_URL", f"http://127.0.0.1:{server.server_port}/mirror/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(named, "PAUSE", 0.01)
    yield server
    server.hold.set()
    server.shutdown()
    server.server_close()


# ---- archives in the layouts of the real ones

def wav(hz, seconds=1.0, seed=0):
    out = io.BytesIO()
    sf.write(out, tone(seconds, hz=hz, seed=seed), 16000, format="WAV", subtype="PCM_16")
    return out.getvalue()


def esc50():
    files, lines = {"README.md": b"ESC-50", "LICENSE": b"authors"}, ["filename,fold,target,category,esc10,src_file,take"]
    for i in range(20):
        fold, (label, hz) = 1 + i % 2, [("dog", 300), ("rain", 3000)][i // 2 % 2]
        name = f"{fold}-{100 + i}-A-{i // 2 % 2}.wav"
        files[f"audio/{name}"] = wav(hz, seed=i)
        lines.append(f"{name},{fold},{i // 2 % 2},{label},False,{100 + i},A")
    return {f"ESC-50-master/{path}": data for path, data in (files | {"meta/esc50.csv": "\n".join(lines).encode()}).items()}


def urbansound8k():
    files = {"UrbanSound8K/audio/.DS_Store": b"x", "UrbanSound8K/FREESOUNDCREDITS.txt": b"authors"}
    lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for i in range(6):
        name = f"{100 + i}-{i % 2}-0-0.wav"
        files[f"UrbanSound8K/audio/fold{1 + i // 2}/{name}"] = wav(300 + i)
        lines.append(f"{name},{100 + i},3.0,4.0,1,{1 + i // 2},{i % 2},{['air_conditioner', 'car_horn'][i % 2]}")
    return files | {"UrbanSound8K/metadata/UrbanSound8K.csv": "\n".join(lines).encode()}


def speechcommands():
    files, lists = {"./_background_noise_/pink_noise.wav": wav(50, 3.0), "./_background_noise_/README.md": b"noise"}, {}
    for word, hz in (("yes", 400), ("no", 2500)):
        for speaker in range(12):
            for take in range(2):
                path = f"{word}/{0xab0000 + speaker:08x}_nohash_{take}.wav"
                files[f"./{path}"] = wav(hz + 5 * speaker, seed=2 * speaker + take)
                lists.setdefault({0: "testing", 1: "validation"}.get(speaker % 4, ""), []).append(path)
    return files | {f"./{name}_list.txt": "".join(f"{path}\n" for path in lists[name]).encode()
                    for name in ("testing", "validation")} | {"./LICENSE": b"CC BY 4.0"}


MAKERS = {"esc50": esc50, "urbansound8k": urbansound8k, "speechcommands": speechcommands}


def packed(files, kind):
    """Bytes of a ZIP or tar.gz of {name: bytes or a prepared member}."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(*((name, data) if isinstance(data, bytes) else data))
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name) if isinstance(data, bytes) else data
            if isinstance(data, bytes):
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data) if isinstance(data, bytes) else None)
    return out.getvalue()


@pytest.fixture
def put(server, monkeypatch):
    """put(name): serve a small archive of that name, and take what it is for what is published -> {path: bytes}."""
    def put(name, files=None, **changes):
        files = files if files is not None else MAKERS[name]()
        server.data = packed(files, "zip" if name == "esc50" else "tar.gz")
        if name != "esc50":
            kind = SOURCES[name].digest.split(":")[0]
            changes = {"size": len(server.data), "digest": f"{kind}:{hashlib.new(kind, server.data).hexdigest()}"} | changes
        monkeypatch.setitem(named.SOURCES, name, replace(SOURCES[name], **changes))
        top = {"esc50": "ESC-50-master/", "urbansound8k": "UrbanSound8K/", "speechcommands": "./"}[name]
        return {path.removeprefix(top): data for path, data in files.items()}
    return put


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def left(cache):
    """What lies in the folder of data sets, but for the lock."""
    return sorted(path.name for path in (cache / "datasets").iterdir() if not path.name.endswith(".lock"))


def refused(name, cache, *words):
    with pytest.raises(DataError) as caught:
        fetch(name, cache, log=lambda line: None)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(f"--data {name}: "), message
    assert all(word in message for word in words), message
    assert not (cache / "datasets" / name).exists()
    return message


# ---- what is published

def test_the_table_of_sources():
    from torchaudio.datasets import speechcommands as other
    for name, source in SOURCES.items():
        assert source.url.startswith("https://") and source.licence.startswith("CC BY") and "20" in source.citation
        assert source.about == (source.size or source.about) and re.fullmatch(r"[A-Za-z0-9_.-]+", source.file)
        assert credit(f"/x/datasets/{name}/audio")[0].startswith(source.title) and credit(f"/x/{name}") == []
    assert SOURCES["speechcommands"].digest == "sha256:" + other._CHECKSUMS[
        "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"]


# ---- a server that keeps to the rules

@pytest.mark.parametrize("name", SOURCES)
def test_fetched_once_unpacked_and_read(name, server, put, tmp_path):
    files, said = put(name), []
    home = fetch(name, tmp_path, said.append)
    assert home == tmp_path / "datasets" / name and tree(home) == files and left(tmp_path) == [name]
    assert "127.0.0.1" in said[0] and FILES[name] in said[0]
    assert fetch(name, tmp_path, said.append) == home and server.asked == [(None, 200)]  # the second time from the disk
    manifest = load_manifest(home)
    assert manifest.paths and all(manifest.file(row).is_file() for row in range(len(manifest)))
    assert sorted(set(manifest.classes)) == {"esc50": ["dog", "rain"], "urbansound8k": ["air_conditioner", "car_horn"],
                                             "speechcommands": ["no", "yes"]}[name]
    assert (home / "audio").stat().st_mode & 0o055 == 0o055 if name != "speechcommands" else True  # others may read it


def test_speech_commands_has_the_splits_and_speakers_of_torchaudio(server, put, tmp_path):
    from torchaudio.datasets import SPEECHCOMMANDS
    put("speechcommands")
    home = fetch("speechcommands", tmp_path, log=lambda line: None)
    manifest = load_manifest(home)
    (tmp_path / "SpeechCommands").mkdir()
    (tmp_path / "SpeechCommands" / "speech_commands_v0.02").symlink_to(home)
    speaker_of, seen = {}, 0
    for split, subset in (("train", "training"), ("val", "validation"), ("test", "testing")):
        other = SPEECHCOMMANDS(tmp_path, subset=subset)
        rows = {manifest.paths[row]: row for row in manifest.rows(split)}
        assert len(other) == len(rows) > 0
        for i in range(len(other)):
            path, _, label, speaker, _ = other.get_metadata(i)
            row = rows[path.removeprefix("speech_commands_v0.02/")]
            assert manifest.classes[manifest.labels[row]] == label
            assert speaker_of.setdefault(manifest.group[row], speaker) == speaker
        seen += len(other)
    assert seen == len(manifest) and len(speaker_of) == len(set(speaker_of.values())) == 12
    assert manifest.group_source == "file name (speaker)"
    assert any("--noise-dir" in note and "_background_noise_" in note for note in manifest.notes)


def test_a_path_of_that_name_is_taken_and_names_are_lenient(server, put, tmp_path, monkeypatch):
    put("esc50")
    monkeypatch.chdir(tmp_path)
    said = []
    for data in ("my_birds", tmp_path / "x.csv", "./esc50", "demo"):
        assert find_data(data, tmp_path, said.append) == data
    assert said == [] and server.asked == []
    assert find_data("ESC-50", tmp_path, said.append) == tmp_path / "datasets" / "esc50"
    (tmp_path / "esc50").mkdir()
    said.clear()
    assert find_data("esc50", tmp_path, said.append) == "esc50"
    assert len(said) == 1 and "esc50 is there as a path" in said[0]


# ---- a server that breaks off

def test_a_broken_fetch_goes_on_where_it_stopped(server, put, tmp_path):
    files = put("speechcommands")
    n = len(server.data)
    server.breaks = [n // 3, n // 3]
    assert tree(fetch("speechcommands", tmp_path, log=lambda line: None)) == files
    assert server.asked == [(None, 200), (f"bytes={n // 3}-", 206), (f"bytes={2 * (n // 3)}-", 206)]


def test_a_server_without_ranges_starts_again(server, put, tmp_path):
    files = put("speechcommands")
    server.breaks, server.ranges = [len(server.data) // 2], False
    assert tree(fetch("speechcommands", tmp_path, log=lambda line: None)) == files
    assert [status for _, status in server.asked] == [200, 200] and server.asked[1][0]


@pytest.mark.parametrize("etag", ['W/"weak"', None])
def test_without_a_strong_mark_nothing_is_continued(etag, server, put, tmp_path):
    files = put("esc50")
    server.breaks, server.etag, server.rude = [len(server.data) // 2], etag, True
    assert tree(fetch("esc50", tmp_path, log=lambda line: None)) == files
    assert server.asked == [(None, 200), (None, 200)]


@pytest.mark.parametrize("rude", [False, True])
def test_a_file_that_changed_in_between_is_not_mixed(rude, server, put, tmp_path):
    put("esc50")
    half = len(server.data) // 2
    server.breaks, server.statuses, server.rude = [half], [200, 404], rude
    refused("esc50", tmp_path, "HTTP 404", f"{half} bytes that are kept")
    new = esc50()
    new["ESC-50-master/README.md"] = b"another one of the same length" * 9
    files, server.etag = put("esc50", new), '"two"'
    assert tree(fetch("esc50", tmp_path, log=lambda line: None)) == files
    assert server.asked[2:] == ([(f"bytes={half}-", 206), (None, 200)] if rude else [(f"bytes={half}-", 200)])


def test_a_file_that_became_shorter(server, put, tmp_path):
    put("esc50")
    server.breaks, server.statuses, server.rude = [len(server.data) - 10], [200, 404], True
    refused("esc50", tmp_path)
    files = put("esc50", {name: data for name, data in esc50().items() if "20" not in name and name[-5] != "1"})
    assert tree(fetch("esc50", tmp_path, log=lambda line: None)) == files
    assert [status for _, status in server.asked[2:]] == [416, 200]


def test_a_server_that_never_gets_to_the_end(server, put, tmp_path):
    put("urbansound8k")
    server.breaks, server.ranges = [1000] * 50, False
    refused("urbansound8k", tmp_path, "cannot be fetched", "start again to go on after the 1000 bytes", FILES["urbansound8k"])
    assert len(server.asked) == named.TRIES


def test_chunks_that_break_off(server, put, tmp_path):
    files = put("esc50")  # as GitHub gives it: no length, no ranges
    server.chunked, server.ranges, server.breaks = True, False, [len(server.data) // 2]
    assert tree(fetch("esc50", tmp_path, log=lambda line: None)) == files
    assert [status for _, status in server.asked] == [200, 200]


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(server, put, tmp_path):
    files = put("urbansound8k")
    server.statuses = [503, 429]
    said = []
    assert tree(fetch("urbansound8k", tmp_path / "a", said.append)) == files
    assert sum("again in" in line for line in said) == 2
    server.asked.clear()
    server.statuses = [403]
    refused("urbansound8k", tmp_path / "b", "HTTP 403", "get http://127.0.0.1", "and put it at")
    assert len(server.asked) == 1


def test_without_a_network_one_line_says_where_to_put_the_file(server, put, tmp_path, monkeypatch):
    put("urbansound8k")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WARBLE_DATASETS_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        message = refused("urbansound8k", tmp_path, "refused")
    archive = Path(re.search(r"put it at (\S+)", message)[1])
    assert archive == tmp_path / "datasets" / FILES["urbansound8k"] and server.asked == []
    archive.write_bytes(server.data)
    archive.with_name(archive.name + ".part").write_bytes(b"of an earlier try")
    home = fetch("urbansound8k", tmp_path, log=lambda line: None)
    assert len(load_manifest(home)) == 6 and archive.read_bytes() == server.data  # a person's file stays
    assert left(tmp_path) == [archive.name, "urbansound8k"]
    monkeypatch.setenv("WARBLE_DATASETS_URL", "/some/folder")
    with pytest.raises(DataError, match="begins with http"):
        fetch("urbansound8k", tmp_path / "other")


# ---- a server that lies

def test_a_length_that_is_too_long(server, put, tmp_path):
    put("esc50")
    server.lie = 100
    refused("esc50", tmp_path, "cannot be fetched")
    assert [status for _, status in server.asked] == [200, 416, 200, 416]


def test_a_length_that_is_too_short(server, put, tmp_path):
    put("esc50")
    server.lie = -100  # a ZIP without its end
    refused("esc50", tmp_path, "damaged", "it was removed")
    assert left(tmp_path) == []
    put("speechcommands")
    n = len(server.data)
    refused("speechcommands", tmp_path, f"offers {n - 100} bytes, where {n} are published")
    assert left(tmp_path) == []


def test_more_than_there_may_be_is_not_written(server, put, tmp_path):
    put("speechcommands", size=5000)
    server.chunked = True
    refused("speechcommands", tmp_path, "more than the 5000 bytes")
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["urbansound8k", "speechcommands"])
def test_a_wrong_hash_is_removed_and_the_right_file_can_follow(name, server, put, tmp_path):
    files = put(name)
    right = server.data
    server.data = right[:1000] + bytes([right[1000] ^ 1]) + right[1001:]
    message = refused(name, tmp_path, hashlib.new(SOURCES[name].digest.split(":")[0], server.data).hexdigest(), "it was removed")
    assert hashlib.new(SOURCES[name].digest.split(":")[0], right).hexdigest() in message and left(tmp_path) == []
    archive = tmp_path / "datasets" / FILES[name]
    archive.write_bytes(server.data)  # the same by hand: left where it is
    refused(name, tmp_path, f"{archive}: has ", "replace it")
    assert archive.read_bytes() == server.data
    archive.unlink()
    server.data = right
    assert tree(fetch(name, tmp_path, log=lambda line: None)) == files


def member(name, kind, link="", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info, target


HOSTILE = {
    "zip ..": ("esc50", {"../outside.txt": b"x"}, "../outside.txt"),
    "zip .. further down": ("esc50", {"ESC-50-master/audio/../../../outside.txt": b"x"}, "lies outside"),
    "zip absolute": ("esc50", {"ROOM/outside.txt": b"x"}, "/outside.txt in it"),
    "zip link": ("esc50", {"l": zip_link("ESC-50-master/link", "../../..")}, "a link out of it"),
    "tar ..": ("urbansound8k", {"UrbanSound8K/../../outside.txt": b"x"}, "lies outside"),
    "tar absolute": ("speechcommands", {"ROOM/outside.txt": b"x"}, "/outside.txt in it"),
    "tar link": ("urbansound8k", {"l": member("UrbanSound8K/link", tarfile.SYMTYPE, "../../..")}, "a link out of it"),
    "tar absolute link": ("urbansound8k", {"l": member("link", tarfile.SYMTYPE, "/etc/passwd")}, "a link out of it"),
    "tar hard link": ("speechcommands", {"l": member("./a/link", tarfile.LNKTYPE, "../outside.txt")}, "a link out of it"),
    "tar link, then a file through it": ("urbansound8k", {"l": member("UrbanSound8K/out", tarfile.SYMTYPE, "../.."),
                                                          "UrbanSound8K/out/outside.txt": b"x"}, "a link out of it"),
    "tar device": ("speechcommands", {"d": member("./null", tarfile.CHRTYPE, devmajor=1, devminor=3)}, "device"),
    "tar pipe": ("speechcommands", {"d": member("./pipe", tarfile.FIFOTYPE)}, "device"),
    "zip bomb": ("esc50", {"ESC-50-master/zeros": bytes(9_000_000)}, "far more"),
    "tar bomb": ("speechcommands", {"./zeros": bytes(9_000_000)}, "far more"),
    "file as folder": ("speechcommands", {"./yes": b"x", "./yes/a.wav": b"x"}, "damaged"),
    "long name": ("esc50", {"ESC-50-master/" + "x" * 300: b"x"}, "damaged"),
    "of something else": ("esc50", {"alone": b"x"}, "has no meta/esc50.csv in it, so it is not ESC-50"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_write_nothing_outside(case, server, put, tmp_path):
    name, extra, words = HOSTILE[case]
    cache = tmp_path / "a" / "b"
    extra = {place.replace("ROOM", str(tmp_path)): data for place, data in extra.items()}
    put(name, extra if "alone" in extra else MAKERS[name]() | extra, about=2_000_000)
    refused(name, cache, words, "it was removed")
    assert left(cache) == []
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "datasets", f".{name}.lock"]


def test_links_within_are_left_out(server, put, tmp_path):
    files = put("urbansound8k", urbansound8k() | {"l": member("UrbanSound8K/audio/link", tarfile.SYMTYPE, "../metadata"),
                                                  "h": member("UrbanSound8K/h", tarfile.LNKTYPE, "UrbanSound8K/x")})
    assert tree(fetch("urbansound8k", tmp_path, log=lambda line: None)).keys() == files.keys() - {"l", "h"}


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_bytes_anywhere_are_a_line(name, server, put, tmp_path):
    files = put(name, size=None, digest=None)
    whole = server.data
    for i, at in enumerate(np.linspace(0, len(whole) - 1, 25).astype(int)):
        server.data = whole[:at] if i % 2 else whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:]
        try:
            home = fetch(name, tmp_path / str(i), log=lambda line: None)
        except DataError as error:
            assert "damaged" in str(error) or "has no" in str(error) or "lies outside" in str(error), error
        else:  # in what the checksums do not cover: names, dates, the tail of a tar
            assert set(tree(home).values()) <= set(files.values())
    server.data = b"<html>please log in</html>"
    refused(name, tmp_path / "html", "damaged")


# ---- the disk, and processes

def test_too_little_room_is_said_before_anything_is_fetched(server, put, tmp_path):
    put("esc50", about=10**18)
    refused("esc50", tmp_path, "needs 2500000000.0 GB", "are free", "--cache-dir")
    assert server.asked == []


def process(name, cache, before="", **options):
    """A process that fetches what `put` has put -> Popen."""
    code = ("import sys\nfrom data import named\nfrom data.manifest import DataError\nnamed.PAUSE = 0.01\n"
            f"named.SOURCES[{name!r}] = named.{named.SOURCES[name]!r}\n{before}\n"
            f"try:\n    print('got', named.fetch({name!r}, {str(cache)!r}), flush=True)\n"
            "except DataError as error:\n    sys.exit(f'refused {error}')\n")
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)


def largest_file(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_what_there_is(server, put, tmp_path):
    files = put("esc50")
    room = len(server.data) // 2
    out, said = process("esc50", tmp_path, preexec_fn=largest_file(room)).communicate()
    assert said.startswith("refused --data esc50") and "File too large" in said and "free some space" in said, said + out
    assert (tmp_path / "datasets" / (FILES["esc50"] + ".part")).stat().st_size == room
    assert tree(fetch("esc50", tmp_path, log=lambda line: None)) == files
    assert server.asked == [(None, 200), (f"bytes={room}-", 206)]


def test_a_disk_that_fills_up_in_unpacking_keeps_the_archive(server, put, tmp_path):
    big = {"ESC-50-master/audio/big.wav": np.zeros(1 << 20, np.uint8).tobytes()}  # packs to almost nothing
    files = put("esc50", esc50() | big)
    room = len(server.data) + 1000
    out, said = process("esc50", tmp_path, preexec_fn=largest_file(room)).communicate()
    assert said.startswith("refused --data esc50") and "free some space" in said, said + out
    assert left(tmp_path) == [FILES["esc50"] + ".part", FILES["esc50"] + ".part.json"]
    assert tree(fetch("esc50", tmp_path, log=lambda line: None)) == files and server.asked == [(None, 200)]


def test_killed_on_the_way_and_gone_on_with_in_a_new_process(server, put, tmp_path):
    files = put("speechcommands")
    half = len(server.data) // 2
    server.breaks = [half]
    server.hold.clear()
    child = process("speechcommands", tmp_path)
    part = tmp_path / "datasets" / (FILES["speechcommands"] + ".part")
    assert server.broken.wait(30)
    deadline = time.monotonic() + 30
    while part.stat().st_size < half // 2 and time.monotonic() < deadline:  # the last bytes wait in a buffer
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and half // 2 <= part.stat().st_size <= half and not (tmp_path / "datasets" / "speechcommands").exists()
    server.hold.set()
    kept = part.stat().st_size
    out, said = process("speechcommands", tmp_path).communicate()
    assert "got" in out, said
    assert tree(tmp_path / "datasets" / "speechcommands") == files
    assert server.asked == [(None, 200), (f"bytes={kept}-", 206)]


def test_killed_before_the_unpacked_folder_has_its_name(server, put, tmp_path):
    files = put("esc50")
    kill = "import os\nos.rename = lambda *_: os.kill(os.getpid(), 9)"
    assert process("esc50", tmp_path, kill).wait() == -signal.SIGKILL
    assert any(name.startswith(".esc50-") for name in left(tmp_path)) and "esc50" not in left(tmp_path)
    assert tree(fetch("esc50", tmp_path, log=lambda line: None)) == files
    assert left(tmp_path) == ["esc50"] and server.asked == [(None, 200)]  # the archive was whole


def test_killed_between_the_notes_and_the_bytes_of_a_file_that_changed(server, put, tmp_path):
    put("esc50")
    server.breaks, server.statuses = [len(server.data) // 2], [200, 404]
    refused("esc50", tmp_path, "that are kept")
    new = esc50()
    new["ESC-50-master/README.md"] = b"another one"
    files, server.etag = put("esc50", new), '"two"'
    kill = "import os\nwrite = named.write_atomic\nnamed.write_atomic = lambda *a: (write(*a), os.kill(os.getpid(), 9))"
    assert process("esc50", tmp_path, kill).wait() == -signal.SIGKILL
    assert tree(fetch("esc50", tmp_path, log=lambda line: None)) == files


def test_two_processes_at_once_fetch_once(server, put, tmp_path):
    files = put("speechcommands")
    server.slow = 2 * 4096 / len(server.data)  # two seconds in all
    children = [process("speechcommands", tmp_path) for _ in range(2)]
    outs = [child.communicate() for child in children]
    assert all("got" in out for out, _ in outs), outs
    assert sum("waiting" in out for out, _ in outs) == 1 and server.asked == [(None, 200)]
    assert tree(tmp_path / "datasets" / "speechcommands") == files


# ---- the program

TINY = ["--weights", "none", "--dim", "32", "--depth", "1", "--heads", "2", "--seconds", "1", "--device", "cpu", "--amp", "off",
        "--epochs", "1", "--batch-size", "4", "--effective-batch", "4", "--cache-dir", "cache"]


def program(script, *flags, cwd, change="pass"):
    """A script as a person would start it, after `change` -> CompletedProcess."""
    code = (f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv = {[script, *map(str, flags)]!r}\n{change}\n"
            f"import runpy\nrunpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n")
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(cwd)})


def test_train_and_evaluate_by_name(server, put, tmp_path):
    put("esc50")
    done = program("train.py", "--data", "esc50", "--folds", "all", "--run-dir", "runs/a", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 folds, 20 clips" in done.stdout and server.asked == [(None, 200)]
    assert "CC BY-NC 3.0" in done.stdout and "K. J. Piczak" in done.stdout
    assert done.stdout.count("CC BY-NC 3.0") == 2  # once for each run
    server.asked.clear()
    done = program("evaluate.py", "--ckpt", "runs/a/fold1/best.pt", "--data", "esc50", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == 10 and server.asked == []
    assert done.stdout.count("CC BY-NC 3.0") == 1 and done.stdout.count("K. J. Piczak") == 1


def test_train_on_speech_commands_and_a_refusal_is_one_line(server, put, tmp_path):
    put("speechcommands")
    change = f"from data import named\nnamed.SOURCES['speechcommands'] = named.{named.SOURCES['speechcommands']!r}"
    done = program("train.py", "--data", "speechcommands", "--run-dir", "runs/s", *TINY, cwd=tmp_path, change=change)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "runs/s/split.csv", newline="") as file:
        split = {row["path"]: row["split"] for row in csv.DictReader(file)}
    lists = {name: MAKERS["speechcommands"]()[f"./{name}_list.txt"].decode().split() for name in ("testing", "validation")}
    assert {path for path in split if split[path] == "test"} == set(lists["testing"])
    assert {path for path in split if split[path] == "val"} == set(lists["validation"])
    assert done.stdout.count("CC BY 4.0") == 1 and "P. Warden" in done.stdout and "LEAK" not in done.stdout
    done = program("train.py", "--data", "speechcommands", *TINY, "--cache-dir", "other", cwd=tmp_path)  # not what is published
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "where 2428923189 are published" in done.stderr, done.stderr
