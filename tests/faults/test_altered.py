"""Checkpoints that somebody altered: valid files whose contents are wrong (fault 17)."""
import contextlib
import resource
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from harness import program
from ways_in import PROGRAMS, check_refused

import core.run.checkpoint
import evaluate
import flags
import train
from build import load_data
from core.device.distributed import Distributed
from core.run import Run, StopRequest
from core.run.checkpoint import (
    DEFAULTS,
    PARTS,
    CheckpointError,
    as_checkpoint_error,
    load_checkpoint,
    save_checkpoint,
)
from core.scoring import calibration_of, restore

HEAD = "head.1.weight"
CPU = torch.device("cpu")


def change(*path_and_value):
    """-> edit of a state: the item at the path becomes the value, or value(item) for a function."""
    *path, value = path_and_value

    def edit(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value
    return edit


def first(value):
    """-> function that replaces the first item of a list."""
    return lambda items: [value, *items[1:]]


def remove(*path):
    """-> edit of a state: remove the item at the path."""
    def edit(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]
    return edit


WEIGHTS = {
    "another shape": change("model", HEAD, torch.zeros(3, 17)),
    "transposed": change("model", "blocks.0.mlp.fc1.weight", lambda value: value.T.contiguous()),
    "NaN": change("model", HEAD,
                  lambda value: value.index_fill(0, torch.tensor(1), float("nan"))),
    "inf": change("model", "cls_token", lambda value: value + float("inf")),
    "integers": change("model", HEAD, lambda value: value.long()),
    "sparse": change("model", HEAD, lambda value: value.to_sparse()),
    "on no device": change("model", HEAD, lambda value: value.to("meta")),
    "one number expanded": change("model", "pos_embed",
                                  lambda value: torch.zeros(1, 1, 1).expand(value.shape)),
    "one number expanded to a terabyte": change("model", "pos_embed",
                                                torch.zeros(1, 1, 1).expand(1, 10**6, 10**6)),
    "tensor missing": remove("model", HEAD),
    "tensor too many": change("model", "extra", torch.zeros(3)),
    "block too many": change("model", "blocks.7.norm1.weight", torch.zeros(16)),
    "name that is a number": change("model", 7, torch.zeros(3)),
    "name of two lines": change("model", "a\nb", torch.zeros(3)),
    "list for a tensor": change("model", HEAD, [1.0]),
    "no dict": change("model", [torch.zeros(3)]),
    "none": change("model", None),
    "missing": remove("model"),
}
CONFIGS = {
    "another version": change("version", 99),
    "version of two lines": change("version", "1\n2"),
    "dim of 10 ** 9": change("config", "dim", 10**9),
    "depth of 10 ** 9": change("config", "depth", 10**9),
    "classes of 10 ** 12": change("config", "n_classes", 10**12),
    "mels of 10 ** 30": change("config", "n_mels", 10**30),
    "grid of 10 ** 12": change("config", "time_patches", 10**12),
    "stride 0": change("config", "stride", 0),
    "heads 0": change("config", "heads", 0),
    "negative depth": change("config", "depth", -1),
    "dim of text": change("config", "dim", "16"),
    "mlp_ratio NaN": change("config", "mlp_ratio", float("nan")),
    "unknown config": change("config", "colour", 1),
    "config without classes": remove("config", "n_classes"),
    "config is a list": change("config", [1]),
    "frontend unknown": change("frontend", "kind", "wavelet"),
    "window of 10 ** 11": change("frontend", "n_fft", 10**11),
    "hop 0": change("frontend", "hop_length", 0),
    "rate 0": change("frontend", "sample_rate", 0),
    "frontend is none": change("frontend", lambda frontend: None),
    "clip of 10 ** 12": change("clip", "samples", 10**12),
    "clip of 1": change("clip", "samples", 1),
    "clip cut": change("clip", "short", "cut"),
    "loss unknown": change("loss", "name", "hinge"),
    "alpha too short": change("loss", "alpha", [1.0, 2.0]),
    "alpha is text": change("loss", "alpha", "balanced"),
}
CLIPS = {
    "outside": change("manifest", "paths", first("../../etc/passwd")),
    "outside below": change("manifest", "paths", first("low/../../x.wav")),
    "absolute": change("manifest", "paths", first("/etc/passwd")),
    "NUL in a path": change("manifest", "paths", first("low/\0.wav")),
    "paths of numbers": change("manifest", "paths", first(7)),
    "column too short": change("manifest", "labels", lambda labels: labels[1:]),
    "label too high": change("manifest", "labels", first(3)),
    "label too low": change("manifest", "labels", first(-2)),
    "label of text": change("manifest", "labels", first("low")),
    "split 3": change("manifest", "split", first(3)),
    "start NaN": change("manifest", "start", first(float("nan"))),
    "end before 0": change("manifest", "end", first(-1.0)),
    "group of 10 ** 10": change("manifest", "group", first(10**10)),
    "manifest lacks a column": remove("manifest", "split"),
    "manifest is text": change("manifest", "demo"),
    "root is a number": change("manifest", "root", 7),
    "other classes": change("classes", ["a", "b", "c"]),
    "classes are text": change("classes", "abc"),
    "bad files are no pairs": change("bad_files", [["a", "b", "c"]]),
}
TRAINING = {
    "progress unknown": change("progress", "luck", 1),
    "progress negative": change("progress", "step", -3),
    "progress is text": change("progress", "epoch", "2"),
    "schedule is a list": change("schedule", []),
    "split limit is text": change("split_limit", "half"),
    "flags are a list": change("flags", [1]),
    "moments of another shape": change("optimizer", "state", 0, "exp_avg", torch.zeros(2)),
    "moments NaN": change("optimizer", "state", 0, "exp_avg", lambda value: value * float("nan")),
    "moments of too many": change("optimizer", "state", 999, {}),
    "moments missing": remove("optimizer", "state", 0, "exp_avg_sq"),
    "optimizer is a list": change("optimizer", []),
    "calibration is a list": change("calibration", []),
    "temperature 0": change("calibration", "temperature", 0.0),
    "temperature NaN": change("calibration", "temperature", float("nan")),
    "thresholds too short": change("calibration", "thresholds", [0.5]),
    "threshold of text": change("calibration", "thresholds", first("high")),
}
EDITS = WEIGHTS | CONFIGS | CLIPS | TRAINING


@pytest.fixture
def altered(finished_run, tmp_path):
    """-> function: write x.pt, the finished run's checkpoint after `edit(state)` -> its path.

    The run's run.json is beside it, so that its recordings are read.
    """
    shutil.copy(finished_run / "run.json", tmp_path)

    def write(edit):
        state = dict(load_checkpoint(finished_run / "best.pt"))
        edit(state)
        version = state.pop("version")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core.run.checkpoint, "VERSION", version)
            save_checkpoint(tmp_path / "x.pt", state)
        return tmp_path / "x.pt"
    return write


def use(path):
    """Build all that the programs build from a checkpoint, without a step or a score."""
    checkpoint = load_checkpoint(path).require_all()
    # as evaluate.py does
    _, frontend = restore(checkpoint, CPU)
    calibration = calibration_of(checkpoint)
    manifest, *_ = evaluate.evaluation_data(checkpoint, None, None, "val")
    with as_checkpoint_error(path):
        evaluate.open_clips(checkpoint, manifest, frontend.config.sample_rate, Path("cache"))
        evaluate.restore_loss(checkpoint, CPU)
    # as train.py --resume does
    args, given = flags.parse([])
    args = flags.resumed(args, given, checkpoint)
    manifest, _ = load_data(args, checkpoint, Distributed())
    learner, *_ = train.build_learner(args, manifest, checkpoint, CPU, Distributed())
    learner.load_state_dict(checkpoint)
    Run(path.parent, Distributed(), StopRequest()).load_state(checkpoint, calibration)


@contextlib.contextmanager
def little_memory():
    """At most 8 GiB more than this process has: larger allocations fail instead of swapping."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + (8 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft_limit, hard_limit))


def test_control_unaltered_checkpoint_is_used(altered, restored_signals):
    with little_memory():
        use(altered(lambda state: None))


@pytest.mark.parametrize("kind", EDITS)
def test_altered_checkpoint_is_refused_by_name(kind, altered, recwarn, restored_signals):
    """Each file is whole and has valid CRCs: only its contents are wrong."""
    path = altered(EDITS[kind])
    with little_memory(), pytest.raises(CheckpointError) as error:
        use(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert not recwarn.list


@pytest.mark.parametrize("kind, programs", [
    ("NaN", PROGRAMS),
    ("sparse", PROGRAMS),
    ("name that is a number", PROGRAMS),
    ("no dict", PROGRAMS),
    ("another shape", ["evaluate", "resume"]),  # --weights makes a new head
    ("one number expanded to a terabyte", ["evaluate", "resume"]),
    ("tensor missing", ["evaluate", "resume"]),
    ("name of two lines", ["evaluate", "resume"]),
    ("dim of 10 ** 9", ["evaluate", "resume"]),
    ("depth of 10 ** 9", ["evaluate", "resume"]),
    ("outside", ["evaluate", "resume"]),
    ("manifest is text", ["evaluate", "resume"]),
    ("progress is text", ["resume"]),
])
def test_altered_checkpoint_is_refused_by_the_programs(kind, programs, altered, ways_in):
    path = altered(EDITS[kind])
    with little_memory():
        check_refused(ways_in, path, programs=programs)


@pytest.mark.parametrize("flag, value", [("epochs", [2]), ("dim", 17), ("loss", "hinge")])
def test_flags_that_the_command_line_would_refuse_are_refused(flag, value, altered, ways_in):
    check_refused(ways_in, altered(change("flags", flag, value)), programs=["resume"])


NEEDED = {
    "evaluate": ["model", "config", "frontend", "clip", "classes", "loss", "manifest"],
    "resume": sorted(PARTS.keys() - DEFAULTS.keys()),
    "weights": ["model"],
}


@pytest.mark.parametrize("program_name", PROGRAMS)
def test_checkpoint_that_lacks_a_needed_part_is_refused(program_name, altered, ways_in):
    for part in NEEDED[program_name]:
        names = [part] if part != "model" else []
        check_refused(ways_in, altered(remove(part)), *names, programs=[program_name])


def test_every_part_that_train_writes_is_declared(finished_run):
    parts = load_checkpoint(finished_run / "best.pt").keys()
    assert parts == PARTS.keys() | {"format", "version"}


def test_prefixes_of_ddp_and_compile_are_removed(finished_run, altered, ways_in, capsys):
    """All three programs take such a file, and its weights are the same."""
    plain = load_checkpoint(finished_run / "best.pt")["model"]

    def add_prefix(prefix):
        return lambda model: {prefix + name: value for name, value in model.items()}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        path = altered(change("model", add_prefix(prefix)))
        loaded = load_checkpoint(path)["model"]
        assert loaded.keys() == plain.keys()
        assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    predictions = []
    for checkpoint in (finished_run / "best.pt", path):
        assert ways_in.run("evaluate", checkpoint) == 0
        predictions.append((ways_in.folder / "out" / "predictions.csv").read_text())
    assert predictions[0] == predictions[1]
    capsys.readouterr()
    assert ways_in.run("weights", path) == 0
    assert "head" in capsys.readouterr().out  # the only weights that are not used
    # Nothing is left to do but the test.
    elsewhere = ["--run-dir", ways_in.folder / "resumed"]
    assert program(ways_in.monkeypatch, ways_in.folder, "--resume", path, *elsewhere) == 0


# --- contents that are far larger than the file ---

def nested(depth, width=1):
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


@pytest.mark.parametrize("part, value", [
    ("bad_files", nested(9, 10)),  # 10^9 items in a few bytes
    ("manifest", {"labels": nested(8, 10)}),
    ("bad_files", nested(400)),
    ("classes", ["x"] * 10**6),
    ("classes", ["x" * 10**7]),
    ("flags", {"help": True}),
    ("flags", {"data": nested(3, 3)}),
    ("flags", {"epochs": 10**6000}),
    ("flags", {"data": "x" * 10**6}),
])
def test_bomb_is_one_line_and_takes_no_memory(part, value, ways_in, altered):
    def swell(state):
        state[part] = {**state[part], **value} if isinstance(value, dict) else value
    started = time.monotonic()
    check_refused(ways_in, altered(swell), programs=["resume"])
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("seconds", [1e9, -1.0, float("nan"), float("inf")])
def test_duration_that_cannot_be_is_refused(seconds, ways_in, altered):
    def swell(state):
        n = len(state["manifest"]["paths"])
        state["manifest"] = {**state["manifest"], "duration": [seconds] * n}
    check_refused(ways_in, altered(swell), programs=["evaluate", "resume"])


@pytest.mark.parametrize("kind", ["compressed", "overlapping"])
def test_zip_bomb_is_not_unpacked(kind, tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**8))
        if kind == "overlapping":
            archive.filelist += archive.filelist * 1000
            for member in archive.filelist:
                member.compress_type = zipfile.ZIP_STORED
    started = time.monotonic()
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert time.monotonic() - started < 0.1
