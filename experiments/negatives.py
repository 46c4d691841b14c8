"""How should a model learn from recordings that hold none of its classes?

    python experiments/negatives.py --jobs 2
    python experiments/negatives.py --esc10 --seeds 0 --epochs 16 --arms ABC --jobs 2
    python experiments/negatives.py --final --jobs 2      the demo's recipe, with and without

Trains on the demo with 30 minutes of its soundscape as negatives. Each negative clip is a random
window of a stretch of 15 s; 120 of them are 29% of an epoch's clips. Then counts false alarms on
soundscape of other sites, at equal recall. With --esc10, two of its classes are left out of
training, and their clips are the sounds that should raise no alarm.
"""

import argparse
import contextlib
import csv
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import HERE, WORK, read_rows, run_all
from false_alarms import WINDOW, TestSet, Window, figures, write_results

from core.device.precision import choose_precision
from core.run.checkpoint import load_checkpoint
from core.scoring import restore, window_scores
from data.audio import fit, read
from data.clips import Clips
from data.demo import CLASSES, synthesise, write_demo
from data.load import load_manifest
from data.manifest import SPLITS
from data.soundscape import RECORDINGS, synthesise_soundscape
from data.splits import assign_splits
from data.synthesis import write_wav
from model.ast import AST

CLAIM = ("With negatives, false alarms per hour at equal recall are at least 5 times fewer, and "
         "accuracy stays.")
NOISE = "zz_noise"  # the label of negatives: in alphabetical order the last
MASKED = -30.0  # logit of an output that is switched off
STRETCH, RECORDING = 15, 150  # seconds
TRAIN_SITES, TEST_SITES = range(1, 13), range(17, 25)  # 13 to 16 are for validation
FRESH_SITES = range(RECORDINGS + 1, 2 * RECORDINGS + 1)  # an hour more that only this study has
FRESH_CLIPS, FIRST_FRESH = 40, 20_001  # of each class, beyond those of the demo and pretrain.py
UNSEEN = ("crying_baby", "sea_waves")  # classes of ESC-10 that are left out


# --- how negatives are learnt: patches of the program ---

class MaskedLinear(torch.nn.Linear):
    """A head whose last output is switched off."""

    def forward(self, x):
        logits = super().forward(x)
        return torch.cat([logits[:, :-1], torch.full_like(logits[:, -1:], MASKED)], dim=1)


@contextlib.contextmanager
def changed_targets(target_of_negatives: float, target_of_noise: float):
    """Give negatives this target for all classes; switch the output for noise off.

    target_of_noise: of the output that is switched off, for all clips; NaN is no target.
    """
    load, build = Clips.batch, AST.__init__

    def batch(self, keys):
        result = load(self, keys)
        result.target = soft_targets(result.target, len(self.manifest.classes),
                                     target_of_negatives, target_of_noise)
        return result

    def build_masked(self, config):
        build(self, config)
        self.head[-1].__class__ = MaskedLinear

    with (mock.patch.object(Clips, "batch", batch), mock.patch.object(Clips, "__getitems__", batch),
          mock.patch.object(AST, "__init__", build_masked)):
        yield


def soft_targets(labels, n_outputs, target_of_negatives, target_of_noise):
    """Labels (B,), of which the last is noise -> targets (B, n_outputs)."""
    target = torch.nn.functional.one_hot(labels, n_outputs).float()
    target[labels == n_outputs - 1] = target_of_negatives
    target[:, -1] = target_of_noise
    return target


def all_zero_targets():
    return changed_targets(0.0, torch.nan)


def uniform_targets():
    return changed_targets(1 / len(CLASSES), 0.0)


def uniform_targets_of_8():
    return changed_targets(1 / 8, 0.0)


ARMS = {
    "A softmax, no negatives": [],
    "B softmax, an output of their own": [],
    "C a sigmoid per class, all targets 0": (["--loss", "focal-bce"], all_zero_targets),
    "D softmax, the same target for all": ([], uniform_targets),
    "E a sigmoid per class, no negatives": ["--loss", "focal-bce"],
}
WITHOUT = {name for name in ARMS if "no negatives" in name}
SIGMOID = {name for name in ARMS if "sigmoid" in name}
OWN_OUTPUT = {name for name in ARMS if "output of their own" in name}
FINAL = [name for name in ARMS if name[0] in "ABC"]


# --- recordings ---

def windows_of(path: Path) -> list[Window]:
    """The windows of a soundscape recording."""
    return [Window(path, start, site=path.stem)
            for start in range(0, RECORDING - WINDOW + 1, WINDOW)]


def negative_rows(prefix: str) -> list:
    """Rows of a table: the stretches of the training sites."""
    return [[f"{prefix}noise_{site:04d}.wav", NOISE, "train", start, start + STRETCH]
            for site in TRAIN_SITES for start in range(0, RECORDING, STRETCH)]


def write_table(path: Path, rows: list) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label", "split", "start", "end"], *rows])


def write_fresh(folder: Path) -> None:
    """Write clips and soundscape that are not in the demo, for larger tests."""
    folder.mkdir(parents=True, exist_ok=True)
    sounds = {f"{name}_{i}.wav": (synthesise, name, FIRST_FRESH + i)
              for name in CLASSES for i in range(FRESH_CLIPS)}
    sounds |= {f"noise_{site:04d}.wav": (synthesise_soundscape, site) for site in FRESH_SITES}
    for name, (make, *arguments) in sounds.items():
        if not (folder / name).exists():
            write_wav(folder / name, make(*arguments))


def demo_data(folder: Path, seed: int):
    """Tables of the demo -> (flags without negatives, flags with them, classes, test sets)."""
    demo, fresh = write_demo(folder / "demo"), folder / "fresh"
    write_fresh(fresh)
    manifest = load_manifest(demo)
    manifest = manifest.select([not path.startswith("noise/") for path in manifest.paths])
    manifest = manifest.with_classes(CLASSES, [
        CLASSES.index(name) if name in CLASSES else -1 for name in manifest.classes])
    assign_splits(manifest, [], seed=seed)
    rows = [[path, CLASSES[label], SPLITS[split], "", ""] for path, label, split in zip(
        manifest.paths, manifest.labels, manifest.split, strict=True)]
    tests = [
        TestSet("demo", [Window(demo / row[0], 0, CLASSES.index(row[1]))
                         for row in rows if row[2] == "test"],
                [window for site in TEST_SITES
                 for window in windows_of(demo / "noise" / f"noise_{site:04d}.wav")]),
        TestSet("fresh", [Window(fresh / f"{name}_{i}.wav", 0, CLASSES.index(name))
                          for name in CLASSES for i in range(FRESH_CLIPS)],
                [window for site in FRESH_SITES
                 for window in windows_of(fresh / f"noise_{site:04d}.wav")]),
    ]
    return *tables(folder, f"demo-{seed}", rows, "noise/", demo), list(CLASSES), tests


def tables(folder, name, rows, prefix, audio_dir):
    """Write a table without and one with negatives -> the flags that read each."""
    paths = [folder / f"{name}.csv", folder / f"{name}-negatives.csv"]
    write_table(paths[0], rows)
    write_table(paths[1], rows + negative_rows(prefix))
    return [["--data", path, "--audio-dir", audio_dir] for path in paths]


def esc10_data(folder: Path, seed: int, esc10: Path):
    """As demo_data, for ESC-10 without two classes; fold seed + 1 is the test."""
    demo, audio = write_demo(folder / "demo"), folder / "esc10"
    audio.mkdir(exist_ok=True)
    for path in [*(esc10 / "audio").iterdir(), *(demo / "noise").iterdir()]:
        with contextlib.suppress(FileExistsError):
            (audio / path.name).symlink_to(path.resolve())
    table = read_rows(esc10 / "meta" / "esc50.csv")
    classes = sorted({row["category"] for row in table} - set(UNSEEN))
    split_of = {seed % 5 + 1: "test", (seed + 1) % 5 + 1: "val"}
    rows = [[row["filename"], row["category"], split_of.get(int(row["fold"]), "train"), "", ""]
            for row in table if row["category"] in classes]
    clips = [Window(audio / row[0], 0, classes.index(row[1])) for row in rows if row[2] == "test"]
    unseen = [Window(audio / row["filename"], 0, site=row["src_file"])
              for row in table if row["category"] in UNSEEN]
    soundscape = [window for site in TEST_SITES
                  for window in windows_of(audio / f"noise_{site:04d}.wav")]
    tests = [TestSet("unseen classes", clips, unseen), TestSet("soundscape", clips, soundscape)]
    return *tables(folder, f"esc10-{seed}", rows, "", audio), classes, tests


# --- scores ---

def scores_of(folder: Path, tests: list[TestSet], n_classes: int, arm: str) -> list[tuple]:
    """Scores of the clips and of the negatives of each test set, (n, n_classes) float64 each."""
    out = folder / "negatives.npz"
    if not out.exists():
        checkpoint, device = load_checkpoint(folder / "best.pt"), torch.device("cpu")
        model, frontend = restore(checkpoint, device)
        model.eval()
        precision, rate = choose_precision(device, "off"), frontend.config.sample_rate
        logits = {}
        for i, test in enumerate(tests):
            for name, windows in (("clips", test.clips), ("negatives", test.negatives)):
                batches = [load_windows(windows[j:j + 16], rate)
                           for j in range(0, len(windows), 16)]
                logits[f"{name}{i}"] = torch.cat([
                    window_scores(model, frontend, wave, precision, False)[0]
                    for wave in batches]).numpy()
        np.savez(out, **logits)
    with np.load(out) as logits:
        return [tuple(as_scores(logits[f"{name}{i}"], n_classes, arm)
                      for name in ("clips", "negatives")) for i in range(len(tests))]


def as_scores(logits: np.ndarray, n_classes: int, arm: str) -> np.ndarray:
    """Logits, perhaps with one for noise -> scores (n, n_classes)."""
    logits = torch.from_numpy(logits).double()
    if arm in SIGMOID:
        return logits[:, :n_classes].sigmoid().numpy()
    if arm not in OWN_OUTPUT:  # else the softmax includes the output for noise
        logits = logits[:, :n_classes]
    return logits.softmax(dim=1)[:, :n_classes].numpy()


def load_windows(windows: list[Window], rate: int) -> torch.Tensor:
    n = WINDOW * rate
    waves = [fit(read(window.path, rate, round(window.start * rate), n), n, "repeat")
             for window in windows]
    return torch.from_numpy(np.stack(waves))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=12)
    add("--jobs", type=int, default=1, help="runs at a time, which share the CPU threads")
    add("--arms", default="ABCDE", help="letters of the arms to run")
    add("--final", action="store_true", help="the best arms with the demo's 32 epochs")
    add("--esc10", metavar="FOLDER", nargs="?", const=HERE.parent.parent / "shared" / "esc10",
        type=Path, help="ESC-10 without two of its classes, in a folder laid out like ESC-50")
    args = parser.parse_args()
    if args.final:
        args.epochs = 32
    return args


def main():
    args = parse()
    name = "negatives" + ("-esc10" if args.esc10 else "") + ("-final" if args.final else "")
    folder = WORK / "negatives"
    folder.mkdir(parents=True, exist_ok=True)
    arms = {arm: flags for arm, flags in ARMS.items()
            if arm[0] in args.arms and (arm in FINAL or not args.final)}
    runs, data = {}, {}
    for seed in args.seeds:
        data[seed] = (esc10_data(folder, seed, args.esc10) if args.esc10
                      else demo_data(folder, seed))
        for arm, flags in arms.items():
            flags, patch = flags if isinstance(flags, tuple) else (flags, None)
            if args.esc10 and patch is uniform_targets:
                patch = uniform_targets_of_8
            source = data[seed][arm not in WITHOUT]
            common = ["--recipe", "demo", "--seed", seed, "--epochs", args.epochs, "--patience",
                      args.epochs, "--batch-size", 4, "--cache-dir", folder / "cache",
                      "--on-divergence", "warn"]
            run_folder = folder / f"{name}-{args.epochs}" / f"{arm[0]}-{seed}"
            runs[arm, seed] = run_folder, [*source, *common, *flags], patch
    rows = []
    for (arm, seed), _ in run_all(runs, args.jobs):
        *_, classes, tests = data[seed]
        scores = scores_of(runs[arm, seed][0], tests, len(classes), arm)
        for test, (clips, negatives) in zip(tests, scores, strict=True):
            rows.append(figures(arm, seed, test, clips, negatives))
        print(f"{name}: {arm}, seed {seed}: accuracy {rows[-1]['accuracy']:.3f}, AUC "
              f"{rows[-1]['auc']:.3f}", flush=True)
    write_results(name, CLAIM, rows, tests, args)


if __name__ == "__main__":
    main()
