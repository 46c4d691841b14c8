"""The whole program through its command line: a run, its results, and invalid input."""
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, tone
from float64 import DoubleFocal, Through, cut  # noqa: F401  (other tests import them from here)
from PIL import Image

import evaluate
import train
from core.exits import run_script
from core.run.checkpoint import CheckpointError, load_checkpoint
from metrics import fit_temperature
from metrics.calibration import temperature_helps

SMALL = [
    "--weights", "none", "--dim", "32", "--depth", "2", "--heads", "2", "--seconds", "0.9",
    "--device", "cpu", "--amp", "off", "--lr-backbone", "1e-3", "--lr-head", "2e-3",
]
SIX_EPOCHS = [
    "--epochs", "6", "--warmup-epochs", "2", "--batch-size", "2", "--effective-batch", "6",
    "--freq-mask", "8", "--time-mask", "8", "--mixup-alpha", "0.4", "--drop-path", "0.1",
]
RUN_FILES = (
    "run.json", "history.csv", "steps.csv", "events.csv", "best.pt", "last.pt", "curves.png",
    "schedule.png", "batch.png", "bad_files.csv", "split.csv", "coverage.csv", "report.html",
    "test/metrics.json", "test/predictions.csv", "test/per_class.csv", "test/confusion.png",
    "tensorboard",
)
HISTORY_COLUMNS = [
    "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_macro_f1", "val_map",
    "lr_backbone", "lr_head", "seconds", "clips_per_second", "peak_memory_mb", "skipped_steps",
]
TIMED_COLUMNS = ("seconds", "clips_per_second", "peak_memory_mb")
METRICS = {
    "accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "map", "n", "accuracy_ci95",
}


def environment(cwd):
    return {**os.environ, "HOME": str(cwd), "OMP_NUM_THREADS": "2"}


def run(script, *flags, cwd, check=True):
    """Run a script of the project in `cwd` as a person would -> CompletedProcess with text."""
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, flags)], cwd=cwd,
                          capture_output=True, text=True, timeout=200, env=environment(cwd))
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(path, name):
    """A column of numbers of a CSV."""
    return [float(row[name]) for row in rows(path)]


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(tones, tmp_path_factory):
    """(working folder, run folder, output) of a run with warm-up, accumulation, augmentation."""
    cwd = tmp_path_factory.mktemp("work")
    done = run("train", "--data", tones, *SMALL, *SIX_EPOCHS, "--run-dir", "runs/a",
               "--tensorboard", cwd=cwd)
    return cwd, cwd / "runs" / "a", done.stdout


# --- a run and its results ---

def test_run_folder_is_complete(trained):
    _, folder, out = trained
    for name in RUN_FILES:
        assert (folder / name).exists(), name
    history = rows(folder / "history.csv")
    assert len(history) == 6
    assert list(history[0]) == HISTORY_COLUMNS
    n_train = json.loads((folder / "run.json").read_text())["clips"]["train"]
    steps = rows(folder / "steps.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, len(steps) + 1))
    assert sum(int(row["clips"]) for row in steps) == 6 * n_train
    assert read_metrics(folder / "test").keys() >= METRICS
    assert "best.pt" in out


def test_tensorboard_shows_what_the_tables_and_pictures_hold(trained):
    """Read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = trained[1]
    board = EventAccumulator(str(folder / "tensorboard"),
                             size_guidance={"scalars": 0, "images": 0}).Reload()

    def scalars(name):
        return [event.value for event in board.Scalars(name)]
    for name in ("loss", "lr_backbone", "lr_head"):
        assert scalars(f"step/{name}") == pytest.approx(column(folder / "steps.csv", name))
    assert scalars("epoch/val_acc") == pytest.approx(column(folder / "history.csv", "val_acc"))
    assert scalars("test/accuracy") == pytest.approx([read_metrics(folder / "test")["accuracy"]])
    assert set(board.Tags()["images"]) == {"schedule", "batch", "curves", "test/confusion"}
    encoded = io.BytesIO(board.Images("curves")[0].encoded_image_string)
    with Image.open(folder / "curves.png") as expected, Image.open(encoded) as shown:
        assert np.array_equal(np.asarray(expected.convert("RGB")), np.asarray(shown))
    flags = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"warmup_epochs" in flags
    assert b"lr_backbone" in flags


def test_unequal_learning_rates_keep_their_ratio_at_every_step(trained):
    backbone = column(trained[1] / "steps.csv", "lr_backbone")
    head = column(trained[1] / "steps.csv", "lr_head")
    ratios = [b / a for a, b in zip(backbone, head)]
    assert len(ratios) > 20
    assert ratios == pytest.approx([2.0] * len(ratios), rel=1e-9)
    assert backbone[0] < backbone[5] < max(backbone)
    assert max(backbone) == pytest.approx(1e-3)
    assert backbone[-1] < 1e-4


def test_evaluate_finds_the_newest_run_and_repeats_its_test(trained):
    cwd, folder, _ = trained
    before = read_metrics(folder / "test")
    done = run("evaluate", "--ckpt", "best.pt", "--device", "cpu", "--amp", "off", cwd=cwd)
    assert "runs/a/best.pt" in done.stdout
    after = read_metrics(folder / "test")
    assert after["accuracy"] == before["accuracy"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_best_pt_is_calibrated_on_the_validation_clips(trained, tmp_path):
    out = tmp_path / "val"
    run("evaluate", "--ckpt", trained[1] / "best.pt", "--split", "val", "--device", "cpu",
        "--amp", "off", "--out", out, cwd=trained[0])
    with np.load(out / "scores.npz") as file:
        scores, labels = file["scores"].astype(np.float64), file["labels"]
    calibration = load_checkpoint(trained[1] / "best.pt")["calibration"]
    temperature = calibration["temperature"]
    assert temperature == read_metrics(out)["temperature"]
    fitted = fit_temperature(scores, labels) if temperature_helps(scores, labels) else 1.0
    assert np.log(temperature) == pytest.approx(np.log(fitted), abs=0.01)
    assert len(calibration["thresholds"]) == scores.shape[1]
    assert set(calibration["thresholds"]) != {0.5}


def test_predictions_are_of_the_test_split_and_give_the_accuracy(trained):
    predictions = rows(trained[1] / "test" / "predictions.csv")
    split = {row["path"] for row in rows(trained[1] / "split.csv") if row["split"] == "test"}
    assert {row["path"] for row in predictions} == split
    accuracy = np.mean([row["label"] == row["prediction"] for row in predictions])
    assert read_metrics(trained[1] / "test")["accuracy"] == pytest.approx(accuracy)


def test_training_data_in_another_place_keeps_its_split(trained, tones, tmp_path):
    (tmp_path / "moved").symlink_to(tones)
    run("evaluate", "--ckpt", trained[1] / "best.pt", "--data", tmp_path / "moved",
        "--out", tmp_path / "out", cwd=trained[0])
    paths, expected = ([row["path"] for row in rows(folder / "predictions.csv")]
                       for folder in (tmp_path / "out", trained[1] / "test"))
    assert paths == expected
    assert read_metrics(tmp_path / "out")["n"] == len(expected)


def test_other_data_is_evaluated_completely(trained, tmp_path):
    for name, hz in (("low", 310), ("high", 4100)):
        (tmp_path / name).mkdir()
        for i in range(3):
            sf.write(tmp_path / name / f"x{i}.wav", tone(2.3, 44100, hz, seed=i), 44100)
    run("evaluate", "--ckpt", trained[1] / "best.pt", "--data", tmp_path,
        "--out", tmp_path / "out", cwd=trained[0])
    assert read_metrics(tmp_path / "out")["n"] == 6


def test_unreadable_file_is_listed_and_left_out(tones, tmp_path):
    data = tmp_path / "data"
    for name in ("low", "mid", "high"):
        (data / name).mkdir(parents=True)
        for path in (tones / name).iterdir():
            (data / name / path.name).symlink_to(path)
    (data / "low" / "broken.wav").write_text("no audio at all")
    run("train", "--data", data, *SMALL, "--epochs", 1, "--run-dir", "r", cwd=tmp_path)
    [bad_file] = rows(tmp_path / "r" / "bad_files.csv")
    assert bad_file["path"] == "low/broken.wav"
    assert bad_file["reason"]
    assert "broken" not in (tmp_path / "r" / "split.csv").read_text()


def test_smoke_passes_and_leaves_no_checkpoint(tones, tmp_path):
    done = run("train", "--data", tones, *SMALL, "--smoke", cwd=tmp_path)
    assert "passed" in done.stdout
    assert "clips/s" in done.stdout
    assert not list(tmp_path.glob("**/*.pt"))


# --- interruption ---

def test_interrupted_and_resumed_equals_uninterrupted(trained, tones, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--data", tones, *SMALL, *SIX_EPOCHS,
               "--run-dir", "runs/b"]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE,
                               text=True, env=environment(tmp_path))
    for line in process.stdout:
        if line.startswith("epoch  2"):
            time.sleep(0.15)  # to somewhere in the third epoch
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    resumed = tmp_path / "runs" / "b"
    progress = load_checkpoint(resumed / "last.pt")["progress"]
    assert progress["epoch"] < 6
    done = run("train", "--resume", cwd=tmp_path)
    assert f"step {progress['step']}" in done.stdout

    uninterrupted = trained[1]
    expected, found = (load_checkpoint(folder / "last.pt")["model"]
                       for folder in (uninterrupted, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert rows(uninterrupted / "steps.csv") == rows(resumed / "steps.csv")
    expected, found = (
        [{name: value for name, value in row.items() if name not in TIMED_COLUMNS}
         for row in rows(folder / "history.csv")] for folder in (uninterrupted, resumed))
    assert expected == found


def test_changed_flag_on_resume_is_refused_by_name(trained):
    done = run("train", "--resume", "--lr-head", "5e-3", cwd=trained[0], check=False)
    assert done.returncode == 2
    assert "--lr-head" in done.stderr


# --- invalid input: exit code 2 and one line that names the file or flag ---

@pytest.fixture
def check_refused(tmp_path, monkeypatch, capsys, restored_signals):
    """-> function: check that train.py refuses a command line, with one line that holds names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def check(command_line, *names):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: train.main(list(map(str, command_line))))
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        for name in names:
            assert str(name) in error
    return check


def no_audio(data, tones):
    return data, data


def one_class(data, tones):
    (data / "only").symlink_to(tones / "low")
    return data, data


def no_label_column(data, tones):
    (data / "a.csv").write_text("path,colour\na.wav,red\n")
    return data / "a.csv", data / "a.csv"


def missing_file(data, tones):
    (data / "a.csv").write_text("path,label\nnone.wav,red\n")
    return data / "a.csv", "none.wav"


def path_outside_the_folder(data, tones):
    (data / "a.csv").write_text("path,label\n../../x.wav,red\n")
    return data / "a.csv", "../../x.wav"


def nothing_readable(data, tones):
    for name in ("a", "b"):
        (data / name).mkdir()
        for i in range(4):
            (data / name / f"{i}.wav").write_text("no audio")
    return data, data


def class_of_one_clip(data, tones):
    for name in ("low", "mid"):
        (data / name).symlink_to(tones / name)
    (data / "rare").mkdir()
    (data / "rare" / "a.wav").symlink_to(tones / "high" / "high0.wav")
    return data, "--min-clips"


@pytest.mark.parametrize("write", [no_audio, one_class, no_label_column, missing_file,
                                   path_outside_the_folder, nothing_readable, class_of_one_clip])
def test_unusable_data_is_refused(write, tmp_path, tones, check_refused):
    """write(folder, tones) -> (value of --data, what the message must name)"""
    (tmp_path / "data").mkdir()
    data, name = write(tmp_path / "data", tones)
    check_refused(["--data", data, *SMALL], name)


@pytest.mark.parametrize("flags, name", [  # test_flags.py has those that need no data
    (["--data", "nowhere"], "nowhere"),
    (["--device", "tpu"], "--device"),
    (["--device", "cuda:99"], "--device"),
    (["--fold", "9"], "fold"),
    (["--weights", "nowhere.pth"], "nowhere.pth"),
    (["--weights", "audioset", "--size", "base"], "--weights audioset"),
    (["--resume", "--run-dir", "nowhere"], "nowhere"),
    (["--warmup-epochs", "100"], "--warmup-epochs"),
])
def test_unusable_flag_is_refused(flags, name, tones, check_refused):
    model = ["--device", "cpu"] if "--weights" in flags else SMALL
    check_refused(["--data", tones, *model, *flags], name)


def test_existing_run_folder_is_refused(trained, tones, check_refused):
    check_refused(["--data", tones, *SMALL, "--run-dir", trained[1]], trained[1], "--resume")


def test_names_that_are_not_utf8_do_not_stop_a_run(tmp_path):
    """On a terminal that takes only UTF-8: the data's folder, an unreadable file, a folder of
    predictions. An export to such a folder is refused in one line."""
    root = os.fsencode(tmp_path) + b"/da\xfften"
    for name, hz in ((b"a", 300), (b"b", 3000)):
        os.makedirs(root + b"/" + name)
        for i in range(8):
            sf.write(tmp_path / "x.wav", tone(1.0, seed=i, hz=hz), 16000)
            os.rename(tmp_path / "x.wav", root + b"/" + name + b"/%d\xfe.wav" % i)
    with open(root + b"/a/broken\xfe.wav", "wb") as file:
        file.write(b"nothing")
    commands = [
        ("train", [b"--data=" + root, *SMALL, "--epochs=1", "--run-dir=run",
                   "--max-bad-share=0.5"]),
        ("evaluate", ["--ckpt=run/best.pt", b"--data=" + root]),
        ("predict", ["--ckpt=run/best.pt", root, b"--out=p\xff"]),
        ("export", ["--ckpt=run/best.pt", "--to=hf", b"h\xff"]),
    ]
    for script, flags in commands:
        done = subprocess.run(
            [sys.executable, ROOT / f"{script}.py", *flags], cwd=tmp_path, capture_output=True,
            env={**os.environ, "HOME": str(tmp_path), "PYTHONIOENCODING": "utf-8:strict"})
        expected = 2 if script == "export" else 0
        assert done.returncode == expected, (script, done.stderr)
    assert done.stderr.startswith(b"error: h\\udcff: ")
    assert done.stderr.count(b"\n") == 1


def test_checkpoint_name_that_no_run_has_is_refused_with_those_that_exist(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    with pytest.raises(CheckpointError, match=r"bst\.pt.*runs/.*best\.pt.*last\.pt"):
        evaluate.main(["--ckpt", "bst.pt"])


@pytest.mark.parametrize("kind", ["of another program", "truncated", "missing", "other classes"])
def test_evaluate_refuses_unusable_checkpoint_or_data(kind, trained, tmp_path):
    path, flags, name = tmp_path / "x.pt", [], str(tmp_path / "x.pt")
    if kind == "of another program":
        torch.save({"a": 1}, path)
    elif kind == "truncated":
        path.write_bytes((trained[1] / "best.pt").read_bytes()[:5000])
    elif kind == "other classes":
        path, flags, name = trained[1] / "best.pt", ["--data", tmp_path / "data"], "purple"
        for label in ("low", "purple"):
            (tmp_path / "data" / label).mkdir(parents=True)
            sf.write(tmp_path / "data" / label / "q.wav", tone(1), 16000)
    done = run("evaluate", "--ckpt", path, *flags, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
