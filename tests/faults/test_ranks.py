"""Several processes: the gradients, the clips and the verdicts of one (faults 8, 12, 13, 14)."""
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from harness import TINY, outcome, rows
from rank_step import step

import evaluate
from conftest import ROOT
from core.checkpoint import load_checkpoint
from core.distributed import Ranks
from metrics import point_metrics
from core.precision import Precision
from data.clips import Clips, evaluation_batches
from data.load import load_manifest
from data.scan import scan
from losses import CrossEntropy
from model.ast import AST, ASTConfig

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def environment(home):
    return {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}


def torchrun(n, script, *flags, cwd, check=True):
    done = subprocess.run([*TORCHRUN, str(n), ROOT / script, *map(str, flags)], cwd=cwd, env=environment(cwd),
                          capture_output=True, text=True, timeout=200)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


# --- gradients (fault 12)

@pytest.mark.parametrize("n, windows", [(2, ("4,4", "3,3,2", "4,4:6")), (3, ("5,3",))])
def test_gradients_of_several_processes_are_those_of_one_big_batch(n, windows, tmp_path):
    """Soft targets and class weights; a ragged window; more processes than micro-batches; and a value that is not
    finite on one rank, which stops the step on all."""
    whole = step(Ranks(), (8,))
    assert max(g.abs().max() for g in whole["gradients"].values()) > 1e-3
    torchrun(n, "tests/faults/rank_step.py", tmp_path / "out", *windows, cwd=tmp_path)
    ranks = [torch.load(f"{tmp_path}/out.{rank}") for rank in range(n)]
    for window in windows:
        parts = [found[window] for found in ranks]
        assert sorted(clip for part in parts for clip in part["clips"]) == list(range(8))
        for part in parts:
            if ":" in window:
                assert part["gradients"] == {} and part["steps"] == 0 and part["figures"][3] == 0
                continue
            for name, gradient in whole["gradients"].items():
                torch.testing.assert_close(part["gradients"][name], gradient, atol=1e-10, rtol=1e-10)
            assert part["figures"] == pytest.approx(whole["figures"], rel=1e-6) and part["steps"] == 1


def test_a_wrong_normalisation_would_be_seen():
    """The control: a rank that divides by its own clips and not by all."""
    whole, own = step(Ranks(), (8,)), step(Ranks(), (5,))
    assert any(not torch.allclose(own["gradients"][name], whole["gradients"][name] * 8 / 5, atol=1e-6)
               for name in own["gradients"])


# --- evaluation (fault 13)

class Fixed(torch.nn.Module):
    """A model whose scores are a simple function of the waveform, in float64."""
    def __init__(self):
        super().__init__()
        self.config, self.head = type("", (), {"n_classes": 3}), torch.nn.Identity()

    def forward(self, wave):
        return self.head(self.features(wave))

    def features(self, wave):
        return torch.stack([wave.double().std(1) * 9, wave.double()[:, ::7].abs().mean(1) * 20, wave.double()[:, 0]], 1)


@pytest.fixture(scope="module")
def seventeen(tones):
    manifest = load_manifest(tones)
    manifest.duration = scan(manifest, None, False).duration
    return manifest.select(np.arange(48)[::3][:17].tolist() + [1])


def share(n, rank, ranks):
    return np.arange(n)[rank::ranks]


def padded_share(n, rank, ranks):
    """As the usual distributed sampler does it: every rank the same number, the first rows twice."""
    return np.arange(-(-n // ranks) * ranks)[rank::ranks] % n


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_has_every_clip_once(ranks, seventeen):
    """N clips in batches of any size over any number of ranks, against one clip at a time; clips have 2 or 3 tiles."""
    check_evaluation(ranks, seventeen, share)


def test_evaluation_with_padded_shares_is_seen(seventeen):
    """The control."""
    with pytest.raises(AssertionError):
        check_evaluation(2, seventeen, padded_share)


def check_evaluation(ranks, seventeen, share):
    clips = Clips(seventeen, 16000, 6000)
    device = Precision(torch.device("cpu"), None, "")
    model, through = Fixed(), torch.nn.Identity()

    def reference(n):
        scores = [torch.stack([model(clips.batch([(row, start)]).wave)[0].softmax(0)
                               for start in clips.tiles(row)]).mean(0) for row in range(n)]
        return torch.stack(scores).numpy()
    wanted = reference(17)
    hits = [sum(int(model(clips.batch([(row, start)]).wave).argmax()) == seventeen.labels[row] for start in clips.tiles(row))
            for row in range(17)]
    for n in range(1, 18):
        for size in range(1, 7):
            parts = []
            for rank in range(ranks):
                mine = share(n, rank, ranks)
                parts.append(evaluate.evaluate(model, through, evaluation_batches(clips, mine, size), seventeen, mine,
                                               CrossEntropy(), device))
            result = evaluate.Evaluation.merge(parts)
            assert result.rows.tolist() == list(range(n)) and result.labels.tolist() == seventeen.labels[:n].tolist()
            np.testing.assert_allclose(result.scores, wanted[:n], atol=1e-7)
            assert result.tiles.tolist() == [len(clips.tiles(row)) for row in range(n)] and result.hits.tolist() == hits[:n]
            assert point_metrics(result.scores, result.labels)["accuracy"] == np.mean(
                wanted[:n].argmax(1) == seventeen.labels[:n])


# --- whole runs (fault 14)

@pytest.fixture(scope="module")
def one(tones, tmp_path_factory):
    """A run of one process under the same number of threads."""
    folder = tmp_path_factory.mktemp("one")
    subprocess.run([sys.executable, ROOT / "train.py", "--data", tones, *TINY, "--run-dir", folder / "run"], check=True,
                   env=environment(folder), capture_output=True, cwd=folder)
    return outcome(folder / "run")


def like(run, one):
    """The same run up to the order of sums: rows, clips, rates and skips, losses nearly."""
    for file in ("steps", "history"):
        for a, b in zip(run[file], one[file], strict=True):
            assert [float(a[k]) for k in a] == pytest.approx([float(b[k]) for k in b], rel=2e-3, abs=1e-4)
    return True


def test_two_processes_make_the_run_of_one(one, tones, tmp_path):
    done = torchrun(2, "train.py", "--data", tones, *TINY, "--run-dir", "run", cwd=tmp_path)
    assert "2 processes" in done.stdout and done.stdout.count("test: 8 clips") == 1  # one of them speaks
    assert like(outcome(tmp_path / "run"), one)


def test_weights_with_a_grid_of_their_own_reach_all_processes(tones, tmp_path):
    """One process reads them; the others' position grid takes on the same shape before it is shared."""
    model = AST(ASTConfig(5, dim=16, depth=1, heads=2, time_patches=9))
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "other.pth")
    flags = ["--data", tones, *TINY, "--epochs", "1", "--freeze-epochs", "0", "--weights", tmp_path / "other.pth"]
    torchrun(1, "train.py", *flags, "--run-dir", "one", cwd=tmp_path)
    assert "the weights' own grid 12x9, not 12x101" in torchrun(2, "train.py", *flags, "--run-dir", "two", cwd=tmp_path).stdout
    assert like(outcome(tmp_path / "two"), outcome(tmp_path / "one"))
    assert load_checkpoint(tmp_path / "two" / "best.pt")["model"]["pos_embed"].shape == (1, 2 + 12 * 9, 16)


def test_a_wrong_flag_is_said_once_and_ends_all(tones, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    done = torchrun(2, "train.py", "--data", tones, *TINY, "--run-dir", "run", cwd=tmp_path, check=False)
    assert done.returncode != 0 and done.stderr.count("error: --run-dir run: exists already") == 1


def begin(n, tones, cwd, *flags):
    """Start a long run under torchrun and wait until it trains -> (Popen, process ids of the ranks)."""
    process = subprocess.Popen([*TORCHRUN, str(n), ROOT / "train.py", "--data", tones, *TINY, "--epochs", "24", "--patience",
                                "24", "--run-dir", "run", *flags],
                               cwd=cwd, env=environment(cwd), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("epoch  2"):
            break
    return process, ranks_of(process.pid)


def ranks_of(parent):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    fields = file.read().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry))
    return sorted(found)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_one_killed_process_ends_all_and_the_run_goes_on_with_any_number(victim, tones, tmp_path):
    process, pids = begin(2, tones, tmp_path, "--save-every", "1")
    assert len(pids) == 2
    os.kill(pids[victim], signal.SIGKILL)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - started < 45
    time.sleep(0.2)
    assert not any(alive(pid) for pid in pids)  # no orphans
    step = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"]
    done = torchrun(1 + victim, "train.py", "--resume", "--run-dir", "run", cwd=tmp_path)
    assert int(re.search(r"resumed after step (\d+)", done.stdout)[1]) == step
    steps = rows(tmp_path / "run" / "steps.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 145))
    assert sum(int(row["clips"]) for row in steps) == 24 * 33


def test_a_signal_to_one_process_stops_all_with_one_checkpoint(tones, tmp_path):
    process, pids = begin(2, tones, tmp_path)
    os.kill(pids[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and not any(alive(pid) for pid in pids)
    assert "torchrun --nproc-per-node 2 train.py --resume --run-dir run" in out
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert len(rows(tmp_path / "run" / "steps.csv")) == state["progress"]["step"] > 6
    codes = re.findall(r"exitcode +: (-?\d+)", out)  # torchrun ends the one that is not gone yet when the other is
    assert "143" in codes and set(codes) <= {"143", "-15"}
