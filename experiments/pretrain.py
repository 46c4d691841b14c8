"""The pretrained start of the studies: a small AST taught on sounds that the program synthesises itself.

    python experiments/pretrain.py

Writes 1,500 clips of the demo's ten kinds of sound (others than the demo's) and trains on them; about ten minutes on two
cores. The checkpoint is work/pretrained/best.pt. It stands in for AudioSet weights where there are none: whoever has them
gives --weights audioset --size base to a study instead.
"""
from common import SMALL, WORK, one_run

from data.demo import CLASSES, synthesise, write_wav

PER_CLASS, EPOCHS = 150, 12


def main():
    folder = WORK / "pretrain_data"
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(10_000, 10_000 + PER_CLASS):
            path = folder / name / f"{name}_{i}.wav"
            if not path.exists():
                write_wav(path, synthesise(name, i))
    _, metrics = one_run(WORK / "pretrained", ["--data", folder, "--weights", "none", *SMALL, "--epochs", EPOCHS, "--patience", EPOCHS,
                                               "--batch-size", 8, "--effective-batch", 8, "--lr-backbone", "8e-4", "--lr-head", "8e-4",
                                               "--weight-decay", "0.05", "--shift-p", 1, "--freq-mask", 15, "--time-mask", 35])
    print(f"pretrained: {metrics['accuracy']:.3f} on {metrics['n']} test clips of its own task; {WORK / 'pretrained' / 'best.pt'}")


if __name__ == "__main__":
    main()
