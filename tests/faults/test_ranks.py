"""Several processes have the gradients, the clips and the ending of one (faults 8, 12, 13, 14)."""
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from harness import TINY, outcome, rows
from rank_step import step

from core.device.distributed import Distributed, Heartbeats
from core.device.precision import Precision
from core.run.checkpoint import load_checkpoint
from core.scoring import Evaluation, Scorer, evaluate
from data.clips import Clips, TileKey, evaluation_batches
from data.load import load_manifest
from data.scan import scan
from losses import CrossEntropy
from metrics import point_metrics
from model.ast import AST, ASTConfig

# --standalone takes a free port, so that tests can run at the same time.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def environment(home):
    return {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}


def torchrun(n_ranks, script, *flags, cwd, check=True):
    """Run a script in `n_ranks` processes -> CompletedProcess with text."""
    command = [*TORCHRUN, str(n_ranks), ROOT / script, *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, env=environment(cwd), capture_output=True, text=True,
                          timeout=200)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


# --- gradients (fault 12) ---

@pytest.mark.parametrize("n_ranks, steps", [
    (2, ("4,4", "3,3,2", "4,4:6")),
    (3, ("5,3",)),  # more processes than micro-batches
])
def test_gradients_of_several_processes_are_those_of_one_large_batch(n_ranks, steps, tmp_path):
    """With soft targets and class weights. A NaN on one rank stops the step on all."""
    whole = step(Distributed(), (8,))
    assert max(g.abs().max() for g in whole["gradients"].values()) > 1e-3
    torchrun(n_ranks, "tests/faults/rank_step.py", tmp_path / "out", *steps, cwd=tmp_path)
    ranks = [torch.load(f"{tmp_path}/out.{rank}") for rank in range(n_ranks)]
    for name in steps:
        results = [rank[name] for rank in ranks]
        assert sorted(clip for result in results for clip in result["clips"]) == list(range(8))
        for result in results:
            if ":" in name:
                check_skipped(result)
            else:
                check_same_step(result, whole)


def check_same_step(result, whole):
    assert result["gradients"].keys() == whole["gradients"].keys()
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-10, rtol=1e-10)
    assert result["numbers"] == pytest.approx(whole["numbers"], rel=1e-6)
    assert result["n_steps"] == 1


def check_skipped(result):
    *_, applied, _ = result["numbers"]
    assert applied == 0
    assert result["gradients"] == {}
    assert result["n_steps"] == 0


def test_control_mean_over_a_ranks_own_clips_gives_other_gradients():
    """A rank that divides by the number of its own clips and not of all."""
    whole, own = step(Distributed(), (8,)), step(Distributed(), (5,))
    assert any(not torch.allclose(own["gradients"][name], gradient * 8 / 5, atol=1e-6)
               for name, gradient in whole["gradients"].items())


# --- evaluation (fault 13) ---

class WaveformScores(torch.nn.Module):
    """A model whose scores are a simple function of the waveform, in float64."""

    def __init__(self):
        super().__init__()
        self.config, self.head = SimpleNamespace(n_classes=3), torch.nn.Identity()

    def forward(self, wave):
        return self.head(self.features(wave))

    def features(self, wave):
        wave = wave.double()
        return torch.stack([wave.std(1) * 9, wave[:, ::7].abs().mean(1) * 20, wave[:, 0]], 1)


@pytest.fixture(scope="module")
def manifest(tones):
    """17 clips of the three classes, and one of them again."""
    manifest = load_manifest(tones)
    manifest.duration = scan(manifest, None, False).duration
    return manifest.select([*np.arange(48)[::3][:17].tolist(), 1])


def share(n_rows, rank, n_ranks):
    return np.arange(n_rows)[rank::n_ranks]


def padded_share(n_rows, rank, n_ranks):
    """As in torch's DistributedSampler: all ranks have equally many, so some rows occur twice."""
    n_padded = -(-n_rows // n_ranks) * n_ranks
    return np.arange(n_padded)[rank::n_ranks] % n_rows


def evaluate_each_clip(model, clips):
    """The first 17 clips, one tile at a time -> scores (17, 3), correct tiles (17,)."""
    scores, n_correct = [], []
    for row in range(17):
        tiles = torch.cat([model(clips.batch([TileKey(row, start)]).wave)
                           for start in clips.tiles(row)])  # (tiles, 3)
        scores.append(tiles.softmax(1).mean(0).numpy())
        n_correct.append(int((tiles.argmax(1) == int(clips.manifest.labels[row])).sum()))
    return np.stack(scores), n_correct


def check_evaluation(n_ranks, manifest, share):
    clips, model = Clips(manifest, 16000, 6000), WaveformScores()
    precision = Precision(torch.device("cpu"), None, "")
    scorer = Scorer(model, torch.nn.Identity(), CrossEntropy(), precision)
    scores, n_correct = evaluate_each_clip(model, clips)
    n_tiles = [len(clips.tiles(row)) for row in range(17)]
    for n in range(1, 18):
        labels = manifest.labels[:n]
        for size in range(1, 7):
            parts = []
            for rank in range(n_ranks):
                own_rows = share(n, rank, n_ranks)
                batches = evaluation_batches(clips, own_rows, size)
                parts.append(evaluate(scorer, batches, manifest, own_rows))
            result = Evaluation.merge(parts)
            assert result.rows.tolist() == list(range(n))
            assert result.labels.tolist() == labels.tolist()
            np.testing.assert_allclose(result.scores, scores[:n], atol=1e-7)
            assert result.n_tiles.tolist() == n_tiles[:n]
            assert result.correct_tiles.tolist() == n_correct[:n]
            accuracy = point_metrics(result.scores, result.labels)["accuracy"]
            assert accuracy == np.mean(scores[:n].argmax(1) == labels)


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_evaluation_on_any_number_of_ranks_has_every_clip_once(n_ranks, manifest):
    """Clips of 2 or 3 tiles, in batches of any size, against one tile at a time."""
    check_evaluation(n_ranks, manifest, share)


def test_control_evaluation_with_padded_shares_is_detected(manifest):
    with pytest.raises(AssertionError):
        check_evaluation(2, manifest, padded_share)


# --- whole runs (fault 14) ---

@pytest.fixture(scope="module")
def one_process(tones, tmp_path_factory):
    """The outcome of a run of one process with the same number of threads."""
    folder = tmp_path_factory.mktemp("one")
    command = [sys.executable, ROOT / "train.py", "--data", tones, *TINY, "--run-dir", "run"]
    subprocess.run(command, check=True, env=environment(folder), capture_output=True, cwd=folder)
    return outcome(folder / "run")


def check_same_run(result, expected):
    """The same up to the order of sums: rows, clips, rates and skips; losses nearly."""
    for table in ("steps", "history"):
        for row, expected_row in zip(result[table], expected[table], strict=True):
            assert row.keys() == expected_row.keys()
            numbers = [float(value) for value in row.values()]
            expected_numbers = [float(value) for value in expected_row.values()]
            assert numbers == pytest.approx(expected_numbers, rel=2e-3, abs=1e-4)


def test_two_processes_make_the_run_of_one_and_one_prints(one_process, tones, tmp_path):
    done = torchrun(2, "train.py", "--data", tones, *TINY, "--run-dir", "run", cwd=tmp_path)
    assert "2 processes" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(set(lines)) == len(lines)
    check_same_run(outcome(tmp_path / "run"), one_process)


def test_weights_with_a_position_grid_of_their_own_reach_all_processes(tones, tmp_path):
    """One process reads them; the position grids of the others take their shape."""
    model = AST(ASTConfig(5, dim=16, depth=1, heads=2, time_patches=9))
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "other.pth")
    flags = ["--data", tones, *TINY, "--epochs", "1", "--freeze-epochs", "0",
             "--weights", tmp_path / "other.pth"]
    torchrun(1, "train.py", *flags, "--run-dir", "one", cwd=tmp_path)
    done = torchrun(2, "train.py", *flags, "--run-dir", "two", cwd=tmp_path)
    assert "12x9" in done.stdout  # the grid of the file is reported
    check_same_run(outcome(tmp_path / "two"), outcome(tmp_path / "one"))
    position = load_checkpoint(tmp_path / "two" / "best.pt")["model"]["pos_embed"]
    assert position.shape == (1, 2 + 12 * 9, 16)


def test_invalid_flag_is_reported_once_and_ends_all_processes(tones, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    done = torchrun(2, "train.py", "--data", tones, *TINY, "--run-dir", "run", cwd=tmp_path,
                    check=False)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "--run-dir run" in errors[0]


# --- the end of a process ---

def start_long_run(n_ranks, tones, cwd, *flags):
    """Start a run under torchrun and wait until it trains -> (Popen, process ids of the ranks)."""
    command = [*TORCHRUN, str(n_ranks), ROOT / "train.py", "--data", tones, *TINY, "--epochs", "24",
               "--patience", "24", "--run-dir", "run", *flags]
    process = subprocess.Popen(command, cwd=cwd, env=environment(cwd), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("epoch  2"):
            break
    return process, children_of(process.pid)


def process_status(pid):
    """(state letter, process id of the parent), or None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, parent = file.read().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return None
    return state, int(parent)


def is_alive(pid):
    status = process_status(pid)
    return status is not None and status[0] != "Z"


def children_of(parent):
    pids = []
    for entry in os.listdir("/proc"):
        status = process_status(entry) if entry.isdigit() else None
        if status is not None and status[0] != "Z" and status[1] == parent:
            pids.append(int(entry))
    return sorted(pids)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_one_killed_process_ends_all_and_any_number_can_resume(victim, tones, tmp_path):
    process, pids = start_long_run(2, tones, tmp_path, "--save-every", "1")
    assert len(pids) == 2
    os.kill(pids[victim], signal.SIGKILL)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - started < 45
    time.sleep(0.2)
    assert not any(is_alive(pid) for pid in pids)
    step_saved = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"]
    done = torchrun(1 + victim, "train.py", "--resume", "--run-dir", "run", cwd=tmp_path)
    assert int(re.search(r"after step (\d+)", done.stdout)[1]) == step_saved
    steps = rows(tmp_path / "run" / "steps.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 145))
    assert sum(int(row["clips"]) for row in steps) == 24 * 33


def test_signal_to_one_process_stops_all_with_one_checkpoint(tones, tmp_path):
    process, pids = start_long_run(2, tones, tmp_path)
    os.kill(pids[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(is_alive(pid) for pid in pids)
    assert "torchrun --nproc-per-node 2 train.py --resume --run-dir run" in out
    progress = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]
    assert len(rows(tmp_path / "run" / "steps.csv")) == progress["step"] > 6
    # When the first process has ended, torchrun ends the other one if it is still there.
    exit_codes = re.findall(r"exitcode +: (-?\d+)", out)
    assert "143" in exit_codes
    assert set(exit_codes) <= {"143", "-15"}


def continue_all(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(pids, seconds):
    until = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def test_ranks_save_and_end_if_torchrun_is_killed(tones, tmp_path):
    process, pids = start_long_run(2, tones, tmp_path)
    process.kill()
    try:
        assert wait_until_gone(pids, 30)
    finally:
        continue_all(pids)
    progress = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]
    assert len(rows(tmp_path / "run" / "steps.csv")) == progress["step"] > 6


def test_rank_that_is_stopped_is_named_after_a_signal(tones, tmp_path):
    """The other one waits for it in vain; a signal shortens the limit of a minute."""
    process, pids = start_long_run(2, tones, tmp_path)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(1)
    os.kill(pids[0], signal.SIGTERM)
    try:
        assert wait_until_gone(pids[:1], 30)
    finally:
        continue_all(pids)
    out, _ = process.communicate(timeout=60)
    assert re.search(r"error: rank 1 of 2 has not answered for 1\d s.*--resume", out)


def two_ranks(code, tmp_path):
    """Run `code` after `ranks.start(cpu, timeout of 3 s)` on two ranks -> [(exit code, stderr)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = ("import os, time, torch\nfrom datetime import timedelta\n"
             "from core.device.distributed import Distributed\nranks = Distributed()\n"
             "ranks.start(torch.device('cpu'), timedelta(seconds=3))\n")
    processes = [subprocess.Popen(
        [sys.executable, "-c", start + code], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=environment(tmp_path) | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    return list(zip([process.returncode for process in processes], errors, strict=True))


def test_ranks_wait_for_long_work_of_the_first_one(tmp_path):
    """Longer than the exchange of gradients may take: it may fetch recordings for an hour."""
    code = "assert ranks.on_first_rank(lambda: time.sleep(7) or 5) == 5\nranks.leave(0)\n"
    for exit_code, error in two_ranks(code, tmp_path):
        assert exit_code == 0, error


def test_rank_that_has_ended_is_named(tmp_path):
    code = "if ranks.rank == 1:\n    os._exit(9)\nranks.all_reduce_sum(1)\n"
    (exit_code, error), (killed_code, _) = two_ranks(code, tmp_path)
    assert killed_code == 9
    assert exit_code not in (0, 9)
    assert "DistributedError: rank 1 of this run has ended" in error


class DictStore:
    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]


def test_silence_is_measured_from_the_last_sign_of_life(monkeypatch):
    store, now = DictStore(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda _: (_ for _ in ()).throw(RuntimeError))
    beats = Heartbeats(store, 0, 3)
    store.values |= {"alive/1": "1", "alive/2": "1"}
    assert beats.silent_for()[1] == 0
    now[0], store.values["alive/1"] = 50.0, "2"
    assert beats.silent_for() == (2, 50.0)
    now[0], store.values["alive/2"] = 70.0, "2"
    assert beats.silent_for() == (1, 20.0)


def test_signal_ends_a_rank_that_waits_for_others_that_never_come(tmp_path):
    """Nobody listens at the port of the first rank."""
    environment_of_rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--device", "cpu"], cwd=tmp_path,
        env=environment(tmp_path) | environment_of_rank, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while len(os.listdir(f"/proc/{process.pid}/task")) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3)
    process.terminate()
    started = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 143, error
    assert time.monotonic() - started < 10
    assert "Traceback" not in error


def test_dry_run_of_several_processes_is_refused_in_one_line(tones, tmp_path):
    """The ranks would leave its loop by their own clocks."""
    done = torchrun(2, "train.py", "--data", tones, *TINY, "--smoke", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "error: --smoke: excludes torchrun" in done.stderr


def finish_and_check(tones, folder):
    done = torchrun(2, "train.py", "--data", tones, *TINY, "--epochs", "1", "--run-dir", "run",
                    cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr
    assert (folder / "run" / "report.html").exists()


@pytest.mark.long
def test_ends_of_untouched_runs_are_clean(tones, tmp_path):
    for k in range(14):
        (tmp_path / str(k)).mkdir()
        finish_and_check(tones, tmp_path / str(k))
