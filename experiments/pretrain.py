"""Train the pretrained start of the studies: a small AST, on synthesized sounds.

    python experiments/pretrain.py
    python experiments/pretrain.py --frontend fbank      # the second start, for frontend.py

Writes 1,500 clips of the demo's ten kinds of sound (other clips than the demo's) and trains on
them: four minutes on two cores, a quarter of an hour on one with Fbank. The checkpoint is
work/pretrained/best.pt (work/pretrained-fbank/best.pt). It replaces AudioSet weights for those who
have none; others give a study --weights audioset --size base.
"""

import argparse
from pathlib import Path

from common import SMALL, START, WORK, run_once

from data.demo import CLASSES, synthesise, write_wav

CLIPS_PER_CLASS, FIRST_INDEX, EPOCHS = 150, 10_000, 12  # the demo has the clips from index 1
FLAGS = [
    "--weights", "none", *SMALL, "--epochs", EPOCHS, "--patience", EPOCHS, "--batch-size", 8,
    "--effective-batch", 8, "--lr-backbone", "8e-4", "--lr-head", "8e-4", "--weight-decay", "0.05",
    "--shift-p", 1, "--freq-mask", 15, "--time-mask", 35,
]


def pretrained(frontend: str) -> Path:
    """Return the checkpoint that was trained with this front end."""
    return START if frontend == "logmel" else WORK / f"pretrained-{frontend}" / "best.pt"


def write_clips(folder: Path) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(FIRST_INDEX, FIRST_INDEX + CLIPS_PER_CLASS):
            path = folder / name / f"{name}_{i}.wav"
            if not path.exists():
                write_wav(path, synthesise(name, i))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frontend", default="logmel", choices=("logmel", "fbank"))
    frontend = parser.parse_args().frontend
    folder = WORK / "pretrain_data"
    write_clips(folder)
    checkpoint = pretrained(frontend)
    flags = ["--data", folder, "--frontend", frontend, *FLAGS]
    metrics = run_once(checkpoint.parent, flags).metrics
    print(f"pretrained: accuracy {metrics['accuracy']:.3f} on {metrics['n']} synthesized test "
          f"clips; {checkpoint}")


if __name__ == "__main__":
    main()
