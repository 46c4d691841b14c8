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
    read_tree,
)

from data import download, named
from data.load import load_manifest
from data.manifest import DataError
from data.named import SOURCES, credit, fetch, find_data

# ---- the table of sources


def test_every_source_has_url_licence_citation_and_credit():
    for name, source in SOURCES.items():
        assert source.url.startswith("https://")
        assert source.licence.startswith("CC BY")
        assert "20" in source.citation  # a year
        assert source.about == (source.size or source.about)
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", source.file)
        assert credit(f"/x/datasets/{name}/audio")[0].startswith(source.title)
        assert credit(f"/x/{name}") == []


def test_digest_of_speech_commands_is_torchaudios():
    from torchaudio.datasets import speechcommands

    url = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
    assert SOURCES["speechcommands"].digest == "sha256:" + speechcommands._CHECKSUMS[url]


# ---- an ordinary server


@pytest.mark.parametrize("name", SOURCES)
def test_data_set_is_fetched_once_unpacked_and_loaded(name, server, put, tmp_path):
    files, log = put(name), []
    home = fetch(name, tmp_path, log.append)
    assert home == tmp_path / "datasets" / name
    assert read_tree(home) == files
    assert names_in_cache(tmp_path) == [name]
    assert "127.0.0.1" in log[0] and FILES[name] in log[0]
    assert fetch(name, tmp_path, log.append) == home
    assert server.requests == [(None, 200)]  # the second fetch reads the disk
    manifest = load_manifest(home)
    assert manifest.paths
    assert all(manifest.file(row).is_file() for row in range(len(manifest)))
    classes = {
        "esc50": ["dog", "rain"],
        "urbansound8k": ["air_conditioner", "car_horn"],
        "speechcommands": ["no", "yes"],
    }
    assert sorted(set(manifest.classes)) == classes[name]
    if name != "speechcommands":  # which has no folder "audio"
        assert (home / "audio").stat().st_mode & 0o055 == 0o055  # other users may read it


def test_speech_commands_has_the_splits_and_speakers_of_torchaudio(server, put, tmp_path):
    from torchaudio.datasets import SPEECHCOMMANDS

    put("speechcommands")
    home = fetch_quietly("speechcommands", tmp_path)
    manifest = load_manifest(home)
    (tmp_path / "SpeechCommands").mkdir()
    (tmp_path / "SpeechCommands" / "speech_commands_v0.02").symlink_to(home)
    speaker_of, n_clips = {}, 0
    for split, subset in (("train", "training"), ("val", "validation"), ("test", "testing")):
        reference = SPEECHCOMMANDS(tmp_path, subset=subset)
        row_of = {manifest.paths[row]: row for row in manifest.rows(split)}
        assert len(reference) == len(row_of) > 0
        for i in range(len(reference)):
            path, _, label, speaker, _ = reference.get_metadata(i)
            row = row_of[path.removeprefix("speech_commands_v0.02/")]
            assert manifest.classes[manifest.labels[row]] == label
            assert speaker_of.setdefault(manifest.group[row], speaker) == speaker
        n_clips += len(reference)
    assert n_clips == manifest.has_label.sum() == len(manifest) - 1  # one recording of noise
    assert len(speaker_of) == len(set(speaker_of.values())) == 12
    assert manifest.group_source == "file name (speaker)"
    assert any("negatives: 1 recording in _background_noise_" in note for note in manifest.notes)


def test_existing_path_wins_over_a_name_and_spelling_is_lenient(
    server, put, tmp_path, monkeypatch
):
    put("esc50")
    monkeypatch.chdir(tmp_path)
    log = []
    for data in ("my_birds", tmp_path / "x.csv", "./esc50", "demo"):
        assert find_data(data, tmp_path, log.append) == data
    assert log == [] and server.requests == []
    assert find_data("ESC-50", tmp_path, log.append) == tmp_path / "datasets" / "esc50"
    (tmp_path / "esc50").mkdir()
    log.clear()
    assert find_data("esc50", tmp_path, log.append) == "esc50"
    assert len(log) == 1 and "esc50" in log[0]


# ---- interrupted downloads


def test_interrupted_download_continues(server, put, tmp_path):
    files = put("speechcommands")
    third = len(server.data) // 3
    server.breaks = [third, third]
    assert read_tree(fetch_quietly("speechcommands", tmp_path)) == files
    assert server.requests == [
        (None, 200),
        (f"bytes={third}-", 206),
        (f"bytes={2 * third}-", 206),
    ]


def test_download_restarts_if_the_server_has_no_ranges(server, put, tmp_path):
    files = put("speechcommands")
    server.breaks = [len(server.data) // 2]
    server.ranges = False
    assert read_tree(fetch_quietly("speechcommands", tmp_path)) == files
    assert [status for _, status in server.requests] == [200, 200]
    assert server.requests[1][0]  # a range was asked for


@pytest.mark.parametrize("etag", ['W/"weak"', None])
def test_download_restarts_without_a_strong_etag(etag, server, put, tmp_path):
    files = put("esc50")
    server.breaks = [len(server.data) // 2]
    server.etag = etag
    server.ignores_if_range = True
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert server.requests == [(None, 200), (None, 200)]


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_old_and_new_versions_of_a_file_are_not_mixed(ignores_if_range, server, put, tmp_path):
    put("esc50")
    half = len(server.data) // 2
    server.breaks = [half]
    server.statuses = [200, 404]
    server.ignores_if_range = ignores_if_range
    assert_not_fetched("esc50", tmp_path, "HTTP 404", f"{half} bytes")
    new_files = make_esc50()
    new_files["ESC-50-master/README.md"] = b"another one of the same length" * 9
    files = put("esc50", new_files)
    server.etag = '"two"'
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    if ignores_if_range:
        assert server.requests[2:] == [(f"bytes={half}-", 206), (None, 200)]
    else:
        assert server.requests[2:] == [(f"bytes={half}-", 200)]


def test_download_restarts_if_the_file_became_shorter(server, put, tmp_path):
    put("esc50")
    server.breaks = [len(server.data) - 10]
    server.statuses = [200, 404]
    server.ignores_if_range = True
    assert_not_fetched("esc50", tmp_path)
    fewer = {
        name: content
        for name, content in make_esc50().items()
        if "20" not in name and name[-5] != "1"
    }
    files = put("esc50", fewer)
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert [status for _, status in server.requests[2:]] == [416, 200]


def test_number_of_tries_is_limited(server, put, tmp_path):
    put("urbansound8k")
    server.breaks = [1000] * 50
    server.ranges = False
    assert_not_fetched("urbansound8k", tmp_path, "1000 bytes", FILES["urbansound8k"])
    assert len(server.requests) == download.TRIES


def test_interrupted_chunked_download_restarts(server, put, tmp_path):
    files = put("esc50")
    server.chunked = True  # as GitHub sends it: no length, no ranges
    server.ranges = False
    server.breaks = [len(server.data) // 2]
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert [status for _, status in server.requests] == [200, 200]


@pytest.mark.parametrize("least", [10**6, 1])  # the second is the control: fast enough
def test_download_that_trickles_is_given_up(least, server, put, tmp_path, monkeypatch):
    put("esc50")
    server.ranges, server.seconds_per_block = False, 0.1
    monkeypatch.setattr(download, "LEAST_SPEED", least)
    monkeypatch.setattr(download, "SPEED_SECONDS", 0.3)
    if least == 1:
        assert fetch("esc50", tmp_path).is_dir()
        return
    with pytest.raises(DataError) as error:
        fetch("esc50", tmp_path)
    message = str(error.value)
    assert "kB/s" in message and "by other means" in message and "start again" in message
    assert len(server.requests) == download.TRIES


def test_busy_server_is_asked_again(server, put, tmp_path):
    files = put("urbansound8k")
    server.statuses = [503, 429]
    log = []
    assert read_tree(fetch("urbansound8k", tmp_path, log.append)) == files
    assert sum("again" in line for line in log) == 2


def test_refusal_by_the_server_is_final(server, put, tmp_path):
    put("urbansound8k")
    server.statuses = [403]
    assert_not_fetched("urbansound8k", tmp_path, "HTTP 403", "http://127.0.0.1")
    assert len(server.requests) == 1


def test_without_a_network_the_error_names_where_to_put_the_file(
    server, put, tmp_path, monkeypatch
):
    put("urbansound8k")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WARBLE_DATASETS_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        message = assert_not_fetched("urbansound8k", tmp_path, "refused")
    archive = tmp_path / "datasets" / FILES["urbansound8k"]
    assert str(archive) in re.findall(r"\S+", message)
    assert server.requests == []
    archive.write_bytes(server.data)
    archive.with_name(archive.name + ".part").write_bytes(b"of an earlier try")
    home = fetch_quietly("urbansound8k", tmp_path)
    assert len(load_manifest(home)) == 6
    assert archive.read_bytes() == server.data  # the user's file is not removed
    assert names_in_cache(tmp_path) == [archive.name, "urbansound8k"]


def test_base_url_without_http_is_refused(put, tmp_path, monkeypatch):
    put("urbansound8k")
    monkeypatch.setenv("WARBLE_DATASETS_URL", "/some/folder")
    with pytest.raises(DataError, match=r"http"):
        fetch("urbansound8k", tmp_path)


# ---- the disk, and processes


def test_too_little_space_is_reported_before_the_download(server, put, tmp_path):
    put("esc50", about=10**18)
    assert_not_fetched("esc50", tmp_path, "2500000000.0 GB", "--cache-dir")
    assert server.requests == []


def process(name, cache, before="", **options):
    """Start a process that fetches the data set that `put` has published -> Popen."""
    code = (
        "import sys\n"
        "from data import download, named\n"
        "from data.manifest import DataError\n"
        "download.PAUSE = 0.01\n"
        f"named.SOURCES[{name!r}] = named.{named.SOURCES[name]!r}\n"
        f"{before}\n"
        "try:\n"
        f"    print('got', named.fetch({name!r}, {str(cache)!r}), flush=True)\n"
        "except DataError as error:\n"
        "    sys.exit(f'refused {error}')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def limit_file_size(size):
    """-> a preexec_fn: no file of the process can be larger than this, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_during_the_download_leaves_what_was_fetched(server, put, tmp_path):
    files = put("esc50")
    space = len(server.data) // 2
    out, err = process("esc50", tmp_path, preexec_fn=limit_file_size(space)).communicate()
    assert err.startswith("refused --data esc50"), err + out
    assert "File too large" in err, err + out
    partial_file = tmp_path / "datasets" / (FILES["esc50"] + ".part")
    assert partial_file.stat().st_size == space
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert server.requests == [(None, 200), (f"bytes={space}-", 206)]


def test_full_disk_during_unpacking_leaves_the_archive(server, put, tmp_path):
    compressible = {"ESC-50-master/audio/big.wav": np.zeros(1 << 20, np.uint8).tobytes()}
    files = put("esc50", make_esc50() | compressible)
    space = len(server.data) + 1000
    out, err = process("esc50", tmp_path, preexec_fn=limit_file_size(space)).communicate()
    assert err.startswith("refused --data esc50"), err + out
    assert "free some space" in err, err + out
    assert names_in_cache(tmp_path) == [FILES["esc50"] + ".part", FILES["esc50"] + ".part.json"]
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert server.requests == [(None, 200)]


def test_download_of_a_killed_process_continues_in_a_new_one(server, put, tmp_path):
    files = put("speechcommands")
    half = len(server.data) // 2
    server.breaks = [half]
    server.may_disconnect.clear()
    child = process("speechcommands", tmp_path)
    partial_file = tmp_path / "datasets" / (FILES["speechcommands"] + ".part")
    assert server.has_stopped.wait(30)
    deadline = time.monotonic() + 30
    # The last bytes may still be in a buffer of the process: do not wait for all of them.
    while partial_file.stat().st_size < half // 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    n_fetched = partial_file.stat().st_size
    assert half // 2 <= n_fetched <= half
    assert not (tmp_path / "datasets" / "speechcommands").exists()
    server.may_disconnect.set()
    out, err = process("speechcommands", tmp_path).communicate()
    assert "got" in out, err
    assert read_tree(tmp_path / "datasets" / "speechcommands") == files
    assert server.requests == [(None, 200), (f"bytes={n_fetched}-", 206)]


def test_killed_before_the_unpacked_folder_is_renamed(server, put, tmp_path):
    files = put("esc50")
    kill = "import os\nos.rename = lambda *_: os.kill(os.getpid(), 9)"
    assert process("esc50", tmp_path, kill).wait() == -signal.SIGKILL
    names = names_in_cache(tmp_path)
    assert any(name.startswith(".esc50-") for name in names)
    assert "esc50" not in names
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files
    assert names_in_cache(tmp_path) == ["esc50"]
    assert server.requests == [(None, 200)]  # the archive was complete


def test_killed_between_the_record_and_the_bytes_of_a_new_version(server, put, tmp_path):
    put("esc50")
    server.breaks = [len(server.data) // 2]
    server.statuses = [200, 404]
    assert_not_fetched("esc50", tmp_path)
    new_files = make_esc50()
    new_files["ESC-50-master/README.md"] = b"another one"
    files = put("esc50", new_files)
    server.etag = '"two"'
    kill = (
        "import os\n"
        "write = download.write_json\n"
        "download.write_json = lambda *a: (write(*a), os.kill(os.getpid(), 9))"
    )
    assert process("esc50", tmp_path, kill).wait() == -signal.SIGKILL
    assert read_tree(fetch_quietly("esc50", tmp_path)) == files


def test_two_processes_at_once_fetch_once(server, put, tmp_path):
    files = put("speechcommands")
    server.seconds_per_block = 2 * 4096 / len(server.data)  # two seconds for all blocks
    children = [process("speechcommands", tmp_path) for _ in range(2)]
    outputs = [child.communicate() for child in children]
    assert all("got" in out for out, _ in outputs), outputs
    assert sum("waiting" in out for out, _ in outputs) == 1
    assert server.requests == [(None, 200)]
    assert read_tree(tmp_path / "datasets" / "speechcommands") == files


# ---- the programs

TINY = (
    "--weights none --dim 32 --depth 1 --heads 2 --seconds 1 --device cpu --amp off --epochs 1 "
    "--batch-size 4 --effective-batch 4 --cache-dir cache"
).split()


def program(script, *flags, cwd, before="pass"):
    """Run a script as a user would, after the line of Python `before` -> CompletedProcess."""
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = {[script, *map(str, flags)]!r}\n{before}\n"
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
    flags = ["--data", "esc50", "--folds", "all", "--run-dir", "runs/a", *TINY]
    done = program("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 folds, 20 clips" in done.stdout
    assert server.requests == [(None, 200)]
    assert "K. J. Piczak" in done.stdout
    assert done.stdout.count("CC BY-NC 3.0") == 2  # once for each run
    server.requests.clear()
    flags = ["--ckpt", "runs/a/fold1/best.pt", "--data", "esc50", "--out", "out"]
    done = program("evaluate.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == 10
    assert server.requests == []
    assert done.stdout.count("CC BY-NC 3.0") == 1
    assert done.stdout.count("K. J. Piczak") == 1


def test_train_on_speech_commands_uses_its_published_split(server, put, tmp_path):
    put("speechcommands")
    source = named.SOURCES["speechcommands"]
    before = f"from data import named\nnamed.SOURCES['speechcommands'] = named.{source!r}"
    flags = ["--data", "speechcommands", "--run-dir", "runs/s", *TINY]
    done = program("train.py", *flags, cwd=tmp_path, before=before)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "runs/s/split.csv", newline="") as file:
        split_of = {row["path"]: row["split"] for row in csv.DictReader(file)}
    files = MAKERS["speechcommands"]()
    for split, name in (("test", "testing"), ("val", "validation")):
        published = files[f"./{name}_list.txt"].decode().split()
        assert {path for path in split_of if split_of[path] == split} == set(published)
    assert done.stdout.count("CC BY 4.0") == 1
    assert "P. Warden" in done.stdout
    assert "LEAK" not in done.stdout


def test_archive_of_another_size_is_one_line_of_error(server, put, tmp_path):
    put("speechcommands")  # the process expects the size of the real archive
    done = program("train.py", "--data", "speechcommands", *TINY, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "speechcommands" in done.stderr and "2428923189" in done.stderr, done.stderr
