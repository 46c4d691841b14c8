"""The whole program through its command line, and its step against float64."""
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf
import torch
from PIL import Image

import evaluate
import train
from conftest import ROOT, tone
from metrics import fit_temperature
from core.checkpoint import load_checkpoint
from core.precision import Precision
from data.augment import Augment
from data.clips import Batch, epoch_order, epoch_steps
from losses import FocalLoss
from model.ast import AST, ASTConfig
from model.frontend import build_frontend, FrontendConfig
from model.groups import parameter_groups
from sched import RelativeSchedule

SMALL = ["--weights", "none", "--dim", "32", "--depth", "2", "--heads", "2", "--seconds", "0.9", "--device", "cpu",
         "--amp", "off", "--lr-backbone", "1e-3", "--lr-head", "2e-3"]


def run(script, *flags, cwd, check=True):
    """Run a script of the project in `cwd` as a person would -> CompletedProcess with text."""
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, flags)], cwd=cwd, capture_output=True,
                          text=True, timeout=200, env={**os.environ, "HOME": str(cwd), "OMP_NUM_THREADS": "2"})
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tones, tmp_path_factory):
    """A finished run with warm-up, accumulation, augmentation: (working folder, run folder, output)."""
    cwd = tmp_path_factory.mktemp("work")
    done = run("train", "--data", tones, *SMALL, "--epochs", 6, "--warmup-epochs", 2, "--batch-size", 2,
               "--effective-batch", 6, "--freq-mask", 8, "--time-mask", 8, "--mixup-alpha", 0.4, "--drop-path", 0.1, "--run-dir",
               "runs/a", "--tensorboard", cwd=cwd)
    return cwd, cwd / "runs" / "a", done.stdout


def test_run_folder_is_whole(trained):
    _, folder, out = trained
    for name in ("run.json history.csv steps.csv best.pt last.pt curves.png schedule.png batch.png bad_files.csv split.csv "
                 "test/metrics.json test/predictions.csv test/per_class.csv test/confusion.png tensorboard").split():
        assert (folder / name).exists(), name
    assert len(rows(folder / "history.csv")) == 6
    assert list(rows(folder / "history.csv")[0]) == (
        "epoch,train_loss,train_acc,val_loss,val_acc,val_macro_f1,val_map,lr_backbone,lr_head,seconds,clips_per_second,"
        "peak_memory_mb,skipped_steps").split(",")
    n_train = json.loads((folder / "run.json").read_text())["clips"]["train"]
    steps = rows(folder / "steps.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, len(steps) + 1))
    assert sum(int(row["clips"]) for row in steps) == 6 * n_train
    metrics = json.loads((folder / "test" / "metrics.json").read_text())
    assert {"accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "map", "n", "accuracy_ci95"} <= set(metrics)
    assert "warm-up" in out and "best.pt" in out


def test_what_tensorboard_shows(trained):
    """Read back with TensorBoard's own reader: curves, LRs, pictures, hyperparameters and the figures of the test."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, folder, _ = trained
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    steps, metrics = rows(folder / "steps.csv"), json.loads((folder / "test" / "metrics.json").read_text())
    for name in ("loss", "lr_backbone", "lr_head"):
        assert [event.value for event in board.Scalars(f"step/{name}")] == pytest.approx([float(row[name]) for row in steps])
    assert [event.value for event in board.Scalars("epoch/val_acc")] == pytest.approx(
        [float(row["val_acc"]) for row in rows(folder / "history.csv")])
    assert set(board.Tags()["images"]) == {"schedule", "batch", "curves", "test/confusion"}
    with Image.open(folder / "curves.png") as wanted, Image.open(io.BytesIO(board.Images("curves")[0].encoded_image_string)) as shown:
        assert np.array_equal(np.asarray(wanted.convert("RGB")), np.asarray(shown))
    assert board.Scalars("test/accuracy")[0].value == pytest.approx(metrics["accuracy"])
    flags = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"warmup_epochs" in flags and b"lr_backbone" in flags


def test_unequal_lrs_keep_their_ratio_at_every_step_of_a_real_run(trained):
    steps = rows(trained[1] / "steps.csv")
    ratios = [float(row["lr_head"]) / float(row["lr_backbone"]) for row in steps]
    assert len(ratios) > 20 and ratios == pytest.approx([2.0] * len(ratios), rel=1e-9)
    lrs = [float(row["lr_backbone"]) for row in steps]
    assert lrs[0] < lrs[5] < max(lrs) == pytest.approx(1e-3) and lrs[-1] < 1e-4


def test_evaluate_finds_the_newest_run_and_repeats_the_test(trained):
    cwd, folder, _ = trained
    before = json.loads((folder / "test" / "metrics.json").read_text())
    done = run("evaluate", "--ckpt", "best.pt", "--device", "cpu", "--amp", "off", cwd=cwd)
    assert "runs/a/best.pt" in done.stdout
    after = json.loads((folder / "test" / "metrics.json").read_text())
    assert after["accuracy"] == before["accuracy"] and after["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_best_pt_is_calibrated_on_validation(trained, tmp_path):
    """What the checkpoint keeps is what the scores of its own validation clips give."""
    run("evaluate", "--ckpt", trained[1] / "best.pt", "--split", "val", "--device", "cpu", "--amp", "off", "--out", tmp_path / "val",
        cwd=trained[0])
    with np.load(tmp_path / "val" / "scores.npz") as file:
        scores, labels = file["scores"].astype(np.float64), file["labels"]
    kept = load_checkpoint(trained[1] / "best.pt")["calibration"]
    assert kept["temperature"] == json.loads((tmp_path / "val" / "metrics.json").read_text())["temperature"]
    assert np.log(kept["temperature"]) == pytest.approx(np.log(fit_temperature(scores, labels)), abs=0.01)
    assert len(kept["thresholds"]) == scores.shape[1] and set(kept["thresholds"]) != {0.5}


def test_predictions_against_a_recomputation(trained):
    predictions = rows(trained[1] / "test" / "predictions.csv")
    split = {row["path"] for row in rows(trained[1] / "split.csv") if row["split"] == "test"}
    assert {row["path"] for row in predictions} == split
    accuracy = np.mean([row["label"] == row["prediction"] for row in predictions])
    assert json.loads((trained[1] / "test" / "metrics.json").read_text())["accuracy"] == pytest.approx(accuracy)


def test_the_training_data_in_another_place_keeps_its_split(trained, tones, tmp_path):
    (tmp_path / "moved").symlink_to(tones)
    done = run("evaluate", "--ckpt", trained[1] / "best.pt", "--data", tmp_path / "moved", "--out", tmp_path / "out",
               cwd=trained[0])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == len(rows(trained[1] / "test" /
                                                                                         "predictions.csv"))
    assert "the split made in training" in done.stdout


def test_other_data_is_evaluated_whole(trained, tmp_path):
    for name, hz in (("low", 310), ("high", 4100)):
        (tmp_path / name).mkdir()
        for i in range(3):
            sf.write(tmp_path / name / f"x{i}.wav", tone(2.3, 44100, hz, seed=i), 44100)
    run("evaluate", "--ckpt", trained[1] / "best.pt", "--data", tmp_path, "--out", tmp_path / "out", cwd=trained[0])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == 6


def test_interrupted_and_resumed_equals_uninterrupted(trained, tones, tmp_path):
    flags = json.loads((trained[1] / "run.json").read_text())["flags"]
    command = [sys.executable, ROOT / "train.py", "--data", tones, *SMALL, "--epochs", "6", "--warmup-epochs", "2",
               "--batch-size", "2", "--effective-batch", "6", "--freq-mask", "8", "--time-mask", "8", "--mixup-alpha",
               "0.4", "--drop-path", "0.1", "--run-dir", "runs/b"]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "2"})
    for line in process.stdout:
        if line.startswith("epoch  2"):
            time.sleep(0.15)  # somewhere in the third epoch
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    at = load_checkpoint(tmp_path / "runs/b/last.pt")["progress"]
    assert at["epoch"] < 6
    done = run("train", "--resume", cwd=tmp_path)
    assert f"resumed after step {at['step']}" in done.stdout
    whole, parts = (load_checkpoint(folder / "last.pt") for folder in (trained[1], tmp_path / "runs/b"))
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])
    assert rows(trained[1] / "steps.csv") == rows(tmp_path / "runs/b" / "steps.csv")
    for a, b in zip(rows(trained[1] / "history.csv"), rows(tmp_path / "runs/b" / "history.csv"), strict=True):
        for timed in ("seconds", "clips_per_second", "peak_memory_mb"):
            a.pop(timed), b.pop(timed)
        assert a == b
    assert flags["effective_batch"] == 6


def test_a_changed_flag_on_resume_is_refused(trained):
    done = run("train", "--resume", "--lr-head", "5e-3", cwd=trained[0], check=False)
    assert done.returncode == 2 and "--lr-head" in done.stderr


# --- wrong input: exit 2, one line, the mend in it, nothing left behind ---

def bad_data(kind, tmp_path, tones):
    data = tmp_path / "data"
    data.mkdir()
    if kind == "empty":
        return [data], "no audio"
    if kind == "one class":
        (data / "only").symlink_to(tones / "low")
        return [data], "one class"
    if kind == "no labels":
        (data / "a.csv").write_text("path,colour\na.wav,red\n")
        return [data / "a.csv"], "label"
    if kind == "missing file":
        (data / "a.csv").write_text("path,label\nnone.wav,red\n")
        return [data / "a.csv"], "none.wav"
    if kind == "outside":
        (data / "a.csv").write_text("path,label\n../../x.wav,red\n")
        return [data / "a.csv"], "outside"
    if kind == "all broken":
        for name in ("a", "b"):
            (data / name).mkdir()
            for i in range(4):
                (data / name / f"{i}.wav").write_text("no audio")
        return [data], "cannot be read"
    if kind == "one clip":
        for name in ("low", "mid"):
            (data / name).symlink_to(tones / name)
        (data / "rare").mkdir()
        (data / "rare" / "a.wav").symlink_to(tones / "high" / "high0.wav")
        return [data], "--min-clips"
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["empty", "one class", "no labels", "missing file", "outside", "all broken", "one clip"])
def test_wrong_data(kind, tmp_path, tones, capsys, monkeypatch):
    (path,), says = bad_data(kind, tmp_path, tones)
    refused(["--data", str(path), *SMALL], says, capsys, monkeypatch, tmp_path)


@pytest.mark.parametrize("flags, says", [
    (["--data", "nowhere"], "nowhere"),
    (["--epochs", "3", "--warmup-epochs", "4"], "--warmup-epochs"),
    (["--batch-size", "5", "--effective-batch", "32"], "35"),
    (["--batch-size", "0"], "--batch-size"),
    (["--effective-batch", "0"], "--effective-batch"),
    (["--device", "tpu"], "--device"),
    (["--device", "cuda:99"], "--device"),
    (["--lr-head", "nan"], "--lr-head"),
    (["--alpha", "some"], "--alpha"),
    (["--alpha", "balanced", "--loss", "bce"], "--alpha balanced: belongs to a focal loss"),
    (["--label-smoothing", "0.1"], "--label-smoothing: belongs to cross-entropy"),
    (["--fmax", "20000"], "--fmax"),
    (["--heads", "5"], "heads"),
    (["--schedule", "cosinus"], "--schedule"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--seconds", "0.2"], "--seconds"),
    (["--fold", "9"], "fold"),
    (["--weights", "nowhere.pth"], "nowhere.pth"),
    (["--weights", "audioset", "--size", "base"], "--weights audioset"),
    (["--resume", "--run-dir", "nowhere"], "nowhere"),
])
def test_wrong_flags(flags, says, tones, tmp_path, capsys, monkeypatch):
    base = [flag for flag in SMALL if flag not in ()] if "--weights" not in flags else ["--device", "cpu"]
    refused(["--data", str(tones), *base, *flags], says, capsys, monkeypatch, tmp_path)


def refused(flags, says, capsys, monkeypatch, cwd):
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HOME", str(cwd))
    monkeypatch.setenv("HF_HUB_CACHE", str(cwd / "hub"))
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = train.main(flags)
    except train.INPUT_ERRORS as error:
        code = train.fail(error)
    except SystemExit as stop:
        code = stop.code
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert says in error


def test_a_run_folder_that_exists(trained, tones, capsys, monkeypatch, tmp_path):
    refused(["--data", str(tones), *SMALL, "--run-dir", str(trained[1])], "--resume", capsys, monkeypatch, tmp_path)


def test_names_that_are_not_utf8_do_not_stop_a_run(tmp_path):
    """On a terminal that takes UTF-8 alone: the data's folder, a broken file, predictions in a folder so named; an export there is
    refused in one line."""
    root = os.fsencode(tmp_path) + b"/da\xfften"
    for c in (b"a", b"b"):
        os.makedirs(root + b"/" + c)
        for i in range(8):
            sf.write(tmp_path / "x.wav", tone(1.0, seed=i, hz=300 if c == b"a" else 3000), 16000)
            os.rename(tmp_path / "x.wav", root + b"/" + c + b"/%d\xfe.wav" % i)
    with open(root + b"/a/broken\xfe.wav", "wb") as file:
        file.write(b"nothing")
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONIOENCODING": "utf-8:strict"}
    for script, flags in [("train", [b"--data=" + root, *SMALL, "--epochs=1", "--run-dir=run", "--max-bad-share=0.5"]),
                          ("evaluate", ["--ckpt=run/best.pt", b"--data=" + root]),
                          ("predict", ["--ckpt=run/best.pt", root, b"--out=p\xff"]),
                          ("export", ["--ckpt=run/best.pt", "--to=hf", b"h\xff"])]:
        done = subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == (2 if script == "export" else 0), (script, done.stderr)
    assert done.stderr == b"error: h\\udcff: its path is not UTF-8, which these formats' writers need; give another place\n"


def test_a_checkpoint_name_that_no_run_has(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    with pytest.raises(evaluate.CheckpointError, match="--ckpt bst.pt: no such file here.*; the newest, runs/.*, has best.pt, last.pt"):
        evaluate.main(["--ckpt", "bst.pt"])


@pytest.mark.parametrize("how, says", [("other", "not a checkpoint"), ("cut", "truncated"), ("missing", "no such"),
                                       ("classes", "does not know")])
def test_wrong_checkpoints(how, says, trained, tmp_path):
    path, flags = tmp_path / "x.pt", []
    if how == "other":
        torch.save({"a": 1}, path)
    elif how == "cut":
        path.write_bytes((trained[1] / "best.pt").read_bytes()[:5000])
    elif how == "classes":
        path = trained[1] / "best.pt"
        for name in ("low", "purple"):
            (tmp_path / "d" / name).mkdir(parents=True)
            sf.write(tmp_path / "d" / name / "q.wav", tone(1), 16000)
        flags = ["--data", tmp_path / "d"]
    done = run("evaluate", "--ckpt", path, *flags, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_broken_file_is_listed_and_left_out(tones, tmp_path):
    data = tmp_path / "data"
    for name in ("low", "mid", "high"):
        (data / name).mkdir(parents=True)
        for path in (tones / name).iterdir():
            (data / name / path.name).symlink_to(path)
    (data / "low" / "broken.wav").write_text("no audio at all")
    run("train", "--data", data, *SMALL, "--epochs", 1, "--run-dir", "r", cwd=tmp_path)
    bad = rows(tmp_path / "r" / "bad_files.csv")
    assert [row["path"] for row in bad] == ["low/broken.wav"] and bad[0]["reason"]
    assert "broken" not in (tmp_path / "r" / "split.csv").read_text()


def test_smoke(tones, tmp_path):
    done = run("train", "--data", tones, *SMALL, "--smoke", cwd=tmp_path)
    assert "smoke: passed" in done.stdout and "clips/s" in done.stdout and "gradients all finite" in done.stdout
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/best.pt"))


def test_help_names_every_flag():
    for script in (train, evaluate):
        done = run(script.__name__, "--help", cwd=ROOT)
        assert "--" in done.stdout and not re.search(r"%\(", done.stdout)


# --- the step ---

class Through(torch.nn.Module):
    """A front end that lets float64 through: the waveform, folded."""
    def forward(self, wave):
        return wave.view(len(wave), 32, -1)

    def silence(self, spec):
        return spec.amin((1, 2), keepdim=True)


class DoubleFocal(torch.nn.Module):
    """Focal loss with class weights in float64, where losses/ computes in float32."""
    def forward(self, logits, target):
        p = logits.softmax(1)
        weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
        return -(target.double() * weights * (1 - p) ** 2 * p.log()).sum(1)


def cut(wave, target, sizes):
    """Clips -> a window of micro-batches of these sizes."""
    window, first = [], 0
    for size in sizes:
        at = slice(first, first + size)
        window.append(Batch(wave[at], target[at], np.arange(len(wave))[at], []))
        first += size
    return window


def gradients(sizes, patchout=0.0):
    """Gradients of one train_step in float64 over the same 8 clips cut into micro-batches of these sizes."""
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2, n_mels=32, time_patches=4, drop_path=0.3)).double().train()
    wave = torch.randn(8, 32 * 40, dtype=torch.float64)
    window = cut(wave, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), sizes)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.0, 0.0), lr=0.0)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    t = train.Training(model, Through(), Augment(freq_mask=4, time_mask=4, specaug_p=1.0), DoubleFocal(), optimizer,
                       RelativeSchedule(optimizer, 0, 10), Precision(torch.device("cpu"), None, ""), float("inf"), patchout=patchout)
    train.train_step(t, window, epoch=3)
    return seen


@pytest.mark.parametrize("patchout", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 2), (1,) * 8, (5, 2, 1)])
def test_accumulation_gives_the_gradients_of_one_big_batch(sizes, patchout):
    whole, parts = gradients((8,), patchout), gradients(sizes, patchout)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-10, rtol=1e-10)


def test_a_wrong_normalisation_would_be_seen():
    whole = gradients((8,))
    wrong = [gradients((size,)) for size in (3, 3, 2)]  # the mean of batch means, on other cuts
    assert any(not torch.allclose(w[name], whole[name], atol=1e-6) for w in wrong for name in whole)


def test_a_step_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=16, depth=1, heads=2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-2, 0.1), fused=True)
    schedule = RelativeSchedule(optimizer, 3, 10)
    t = train.Training(model, build_frontend(FrontendConfig()), Augment(), FocalLoss(), optimizer, schedule,
                       Precision(torch.device("cpu"), None, ""), 1.0)
    good = [Batch(torch.randn(2, 22050), torch.tensor([0, 1]), np.arange(2), [])]
    bad = [Batch(torch.full((2, 22050), float("nan")), torch.tensor([0, 1]), np.arange(2), [])]
    train.train_step(t, good, 0)
    weights = [p.clone() for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    stepped = train.train_step(t, good + bad, 0)[0][3]
    assert not stepped and schedule.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(torch.equal(a, optimizer.state[p]["exp_avg"]) for a, p in zip(moments, model.parameters(), strict=True))
    assert train.train_step(t, good, 0)[0][3] and schedule.steps == 2
    assert not torch.equal(weights[0], next(iter(model.parameters())))


def test_an_epoch_has_every_clip_once_in_full_windows():
    order = epoch_order(np.arange(100, 123), seed=0, epoch=4)
    assert sorted(order) == list(range(100, 123))
    assert order.tolist() != epoch_order(np.arange(100, 123), 0, 5).tolist()
    windows = epoch_steps(order, 4, 8)
    assert [[len(m) for m in w] for w in windows] == [[4, 4], [4, 4], [4, 3]]
    assert [row for w in windows for m in w for row in m] == order.tolist()
