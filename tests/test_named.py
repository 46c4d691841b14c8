"""Data sets by name, fetched from a loopback server, also by processes that are killed."""

import csv
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from dataset_server import (
    FILES,
    MAKERS,
    assert_not_fetched,
    fetch_quietly,
    make_esc50,
    names_in_cache,
    publish,
    read_tree,
    running_server,
)

from data import download, named
from data.load import load_manifest
from data.manifest import DataError
from data.named import SOURCES, credit, fetch, find_data


@pytest.fixture
def server(monkeypatch):
    with running_server(monkeypatch) as server:
        yield server


@pytest.fixture
def put(server, monkeypatch):
    return partial(publish, server, monkeypatch)


# ---- what is published


def test_the_table_of_sources():
    from torchaudio.datasets import speechcommands as other

    for name, source in SOURCES.items():
        assert (
            source.url.startswith("https://")
            and source.licence.startswith("CC BY")
            and "20" in source.citation
        )
        assert source.about == (source.size or source.about) and re.fullmatch(
            r"[A-Za-z0-9_.-]+", source.file
        )
        assert (
            credit(f"/x/datasets/{name}/audio")[0].startswith(source.title)
            and credit(f"/x/{name}") == []
        )
    assert (
        SOURCES["speechcommands"].digest
        == "sha256:"
        + other._CHECKSUMS["http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"]
    )


# ---- a server that keeps to the rules


@pytest.mark.parametrize("name", SOURCES)
def test_a_data_set_is_fetched_once_unpacked_and_loaded(name, server, put, tmp_path):
    files, lines = put(name), []
    home = fetch(name, tmp_path, lines.append)
    assert (
        home == tmp_path / "datasets" / name
        and read_tree(home) == files
        and names_in_cache(tmp_path) == [name]
    )
    assert "127.0.0.1" in lines[0] and FILES[name] in lines[0]
    assert fetch(name, tmp_path, lines.append) == home and server.requests == [
        (None, 200)
    ]  # the second time from the disk
    manifest = load_manifest(home)
    assert manifest.paths and all(manifest.file(row).is_file() for row in range(len(manifest)))
    assert (
        sorted(set(manifest.classes))
        == {
            "esc50": ["dog", "rain"],
            "urbansound8k": ["air_conditioner", "car_horn"],
            "speechcommands": ["no", "yes"],
        }[name]
    )
    assert (
        (home / "audio").stat().st_mode & 0o055 == 0o055 if name != "speechcommands" else True
    )  # others may read it


def test_speech_commands_has_the_splits_and_speakers_of_torchaudio(server, put, tmp_path):
    from torchaudio.datasets import SPEECHCOMMANDS

    put("speechcommands")
    home = fetch_quietly("speechcommands", tmp_path)
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
    lines = []
    for data in ("my_birds", tmp_path / "x.csv", "./esc50", "demo"):
        assert find_data(data, tmp_path, lines.append) == data
    assert lines == [] and server.requests == []
    assert find_data("ESC-50", tmp_path, lines.append) == tmp_path / "datasets" / "esc50"
    (tmp_path / "esc50").mkdir()
    lines.clear()
    assert find_data("esc50", tmp_path, lines.append) == "esc50"
    assert len(lines) == 1 and "esc50 exists as a path" in lines[0]


# ---- a server that breaks off


def test_a_broken_download_continues(server, put, tmp_path):
    files = put("speechcommands")
    n = len(server.data)
    server.breaks = [n // 3, n // 3]
    assert read_tree(fetch_quietly("speechcommands", tmp_path)) == files
    assert server.requests == [
        (None, 200),
        (f"bytes={n // 3}-", 206),
        (f"bytes={2 * (n // 3)}-", 206),
    ]


def test_a_server_without_ranges_starts_again(server, put, tmp_path):
    files = put("speechcommands")
    server.breaks, server.ranges = [len(server.data) // 2], False
    assert read_tree(fetch_quietly("speechcommands", tmp_path)) == files
    assert [status for _, status in server.requests] == [200, 200] and server.requests[1][0]


@pytest.mark.parametrize("etag", ['W/"weak"', None])
def test_without_a_strong_etag_it_starts_again(etag, server, put, tmp_path):
    files = put("esc50")
    server.breaks, server.etag, server.ignores_if_range = [len(server.data) // 2], etag, True
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert server.requests == [(None, 200), (None, 200)]


@pytest.mark.parametrize("rude", [False, True])
def test_a_file_that_changed_in_between_is_not_mixed(rude, server, put, tmp_path):
    put("esc50")
    half = len(server.data) // 2
    server.breaks, server.statuses, server.ignores_if_range = [half], [200, 404], rude
    assert_not_fetched("esc50", tmp_path, "HTTP 404", f"continue after the first {half} bytes")
    new = make_esc50()
    new["ESC-50-master/README.md"] = b"another one of the same length" * 9
    files, server.etag = put("esc50", new), '"two"'
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert server.requests[2:] == (
        [(f"bytes={half}-", 206), (None, 200)] if rude else [(f"bytes={half}-", 200)]
    )


def test_a_file_that_became_shorter(server, put, tmp_path):
    put("esc50")
    server.breaks, server.statuses, server.ignores_if_range = (
        [len(server.data) - 10],
        [200, 404],
        True,
    )
    assert_not_fetched("esc50", tmp_path)
    files = put(
        "esc50",
        {name: data for name, data in make_esc50().items() if "20" not in name and name[-5] != "1"},
    )
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert [status for _, status in server.requests[2:]] == [416, 200]


def test_a_server_that_never_gets_to_the_end(server, put, tmp_path):
    put("urbansound8k")
    server.breaks, server.ranges = [1000] * 50, False
    assert_not_fetched(
        "urbansound8k",
        tmp_path,
        "cannot be fetched",
        "start again to continue after the first 1000 bytes",
        FILES["urbansound8k"],
    )
    assert len(server.requests) == download.TRIES


def test_chunks_that_break_off(server, put, tmp_path):
    files = put("esc50")  # as GitHub gives it: no length, no ranges
    server.chunked, server.ranges, server.breaks = True, False, [len(server.data) // 2]
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert [status for _, status in server.requests] == [200, 200]


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(server, put, tmp_path):
    files = put("urbansound8k")
    server.statuses = [503, 429]
    lines = []
    assert read_tree(fetch("urbansound8k", tmp_path / "a", lines.append)) == files
    assert sum("again in" in line for line in lines) == 2
    server.requests.clear()
    server.statuses = [403]
    assert_not_fetched(
        "urbansound8k", tmp_path / "b", "HTTP 403", "get http://127.0.0.1", "and put it at"
    )
    assert len(server.requests) == 1


def test_without_a_network_one_line_says_where_to_put_the_file(server, put, tmp_path, monkeypatch):
    put("urbansound8k")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WARBLE_DATASETS_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        message = assert_not_fetched("urbansound8k", tmp_path, "refused")
    archive = Path(re.search(r"put it at (\S+)", message)[1])
    assert archive == tmp_path / "datasets" / FILES["urbansound8k"] and server.requests == []
    archive.write_bytes(server.data)
    archive.with_name(archive.name + ".part").write_bytes(b"of an earlier try")
    home = fetch_quietly("urbansound8k", tmp_path)
    assert (
        len(load_manifest(home)) == 6 and archive.read_bytes() == server.data
    )  # a person's file stays
    assert names_in_cache(tmp_path) == [archive.name, "urbansound8k"]
    monkeypatch.setenv("WARBLE_DATASETS_URL", "/some/folder")
    with pytest.raises(DataError, match="begins with http"):
        fetch("urbansound8k", tmp_path / "other")


# ---- the disk, and processes


def test_too_little_room_is_lines_before_anything_is_fetched(server, put, tmp_path):
    put("esc50", about=10**18)
    assert_not_fetched("esc50", tmp_path, "needs 2500000000.0 GB", "are free", "--cache-dir")
    assert server.requests == []


def process(name, cache, before="", **options):
    """A process that fetches what `put` has put -> Popen."""
    code = (
        "import sys\nfrom data import download, named\nfrom data.manifest import DataError\n"
        "download.PAUSE = 0.01\n"
        f"named.SOURCES[{name!r}] = named.{named.SOURCES[name]!r}\n{before}\n"
        f"try:\n    print('got', named.fetch({name!r}, {str(cache)!r}), flush=True)\n"
        "except DataError as error:\n    sys.exit(f'refused {error}')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def largest_file(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_what_there_is(server, put, tmp_path):
    files = put("esc50")
    room = len(server.data) // 2
    out, lines = process("esc50", tmp_path, preexec_fn=largest_file(room)).communicate()
    assert (
        lines.startswith("refused --data esc50")
        and "File too large" in lines
        and "free some space" in lines
    ), lines + out
    assert (tmp_path / "datasets" / (FILES["esc50"] + ".part")).stat().st_size == room
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert server.requests == [(None, 200), (f"bytes={room}-", 206)]


def test_a_disk_that_fills_up_in_unpacking_keeps_the_archive(server, put, tmp_path):
    big = {
        "ESC-50-master/audio/big.wav": np.zeros(1 << 20, np.uint8).tobytes()
    }  # packs to almost nothing
    files = put("esc50", make_esc50() | big)
    room = len(server.data) + 1000
    out, lines = process("esc50", tmp_path, preexec_fn=largest_file(room)).communicate()
    assert lines.startswith("refused --data esc50") and "free some space" in lines, lines + out
    assert names_in_cache(tmp_path) == [FILES["esc50"] + ".part", FILES["esc50"] + ".part.json"]
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files and server.requests == [(None, 200)]


def test_killed_and_continued_by_a_new_process(server, put, tmp_path):
    files = put("speechcommands")
    half = len(server.data) // 2
    server.breaks = [half]
    server.may_disconnect.clear()
    child = process("speechcommands", tmp_path)
    part = tmp_path / "datasets" / (FILES["speechcommands"] + ".part")
    assert server.has_stopped.wait(30)
    deadline = time.monotonic() + 30
    while (
        part.stat().st_size < half // 2 and time.monotonic() < deadline
    ):  # the last bytes wait in a buffer
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert (
        child.wait() == -signal.SIGKILL
        and half // 2 <= part.stat().st_size <= half
        and not (tmp_path / "datasets" / "speechcommands").exists()
    )
    server.may_disconnect.set()
    kept = part.stat().st_size
    out, lines = process("speechcommands", tmp_path).communicate()
    assert "got" in out, lines
    assert read_tree(tmp_path / "datasets" / "speechcommands") == files
    assert server.requests == [(None, 200), (f"bytes={kept}-", 206)]


def test_killed_before_the_unpacked_folder_has_its_name(server, put, tmp_path):
    files = put("esc50")
    kill = "import os\nos.rename = lambda *_: os.kill(os.getpid(), 9)"
    assert process("esc50", tmp_path, kill).wait() == -signal.SIGKILL
    assert any(
        name.startswith(".esc50-") for name in names_in_cache(tmp_path)
    ) and "esc50" not in names_in_cache(tmp_path)
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert names_in_cache(tmp_path) == ["esc50"] and server.requests == [
        (None, 200)
    ]  # the archive was whole


def test_killed_between_the_notes_and_the_bytes_of_a_file_that_changed(server, put, tmp_path):
    put("esc50")
    server.breaks, server.statuses = [len(server.data) // 2], [200, 404]
    assert_not_fetched("esc50", tmp_path, "to continue")
    new = make_esc50()
    new["ESC-50-master/README.md"] = b"another one"
    files, server.etag = put("esc50", new), '"two"'
    kill = (
        "import os\nwrite = download.write_json\n"
        "download.write_json = lambda *a: (write(*a), os.kill(os.getpid(), 9))"
    )
    assert process("esc50", tmp_path, kill).wait() == -signal.SIGKILL
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files


def test_two_processes_at_once_fetch_once(server, put, tmp_path):
    files = put("speechcommands")
    server.seconds_per_block = 2 * 4096 / len(server.data)  # two seconds in all
    children = [process("speechcommands", tmp_path) for _ in range(2)]
    outs = [child.communicate() for child in children]
    assert all("got" in out for out, _ in outs), outs
    assert sum("waiting" in out for out, _ in outs) == 1 and server.requests == [(None, 200)]
    assert read_tree(tmp_path / "datasets" / "speechcommands") == files


# ---- the program

TINY = [
    "--weights",
    "none",
    "--dim",
    "32",
    "--depth",
    "1",
    "--heads",
    "2",
    "--seconds",
    "1",
    "--device",
    "cpu",
    "--amp",
    "off",
    "--epochs",
    "1",
    "--batch-size",
    "4",
    "--effective-batch",
    "4",
    "--cache-dir",
    "cache",
]


def program(script, *flags, cwd, change="pass"):
    """A script as a person would start it, after `change` -> CompletedProcess."""
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = {[script, *map(str, flags)]!r}\n{change}\n"
        f"import runpy\nrunpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(cwd)},
    )


def test_train_and_evaluate_by_name(server, put, tmp_path):
    put("esc50")
    done = program(
        "train.py", "--data", "esc50", "--folds", "all", "--run-dir", "runs/a", *TINY, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 folds, 20 clips" in done.stdout and server.requests == [(None, 200)]
    assert "CC BY-NC 3.0" in done.stdout and "K. J. Piczak" in done.stdout
    assert done.stdout.count("CC BY-NC 3.0") == 2  # once for each run
    server.requests.clear()
    done = program(
        "evaluate.py",
        "--ckpt",
        "runs/a/fold1/best.pt",
        "--data",
        "esc50",
        "--out",
        "out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == 10
        and server.requests == []
    )
    assert done.stdout.count("CC BY-NC 3.0") == 1 and done.stdout.count("K. J. Piczak") == 1


def test_train_on_speech_commands_and_a_refusal_is_one_line(server, put, tmp_path):
    put("speechcommands")
    source = named.SOURCES["speechcommands"]
    change = f"from data import named\nnamed.SOURCES['speechcommands'] = named.{source!r}"
    done = program(
        "train.py",
        "--data",
        "speechcommands",
        "--run-dir",
        "runs/s",
        *TINY,
        cwd=tmp_path,
        change=change,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "runs/s/split.csv", newline="") as file:
        split = {row["path"]: row["split"] for row in csv.DictReader(file)}
    lists = {
        name: MAKERS["speechcommands"]()[f"./{name}_list.txt"].decode().split()
        for name in ("testing", "validation")
    }
    assert {path for path in split if split[path] == "test"} == set(lists["testing"])
    assert {path for path in split if split[path] == "val"} == set(lists["validation"])
    assert (
        done.stdout.count("CC BY 4.0") == 1
        and "P. Warden" in done.stdout
        and "LEAK" not in done.stdout
    )
    done = program(
        "train.py", "--data", "speechcommands", *TINY, "--cache-dir", "other", cwd=tmp_path
    )  # not what is published
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "but 2428923189 are published" in done.stderr
    ), done.stderr
