"""What names of folders say: a split, a fold, a person or machine, a processed copy, nothing."""
import re
from collections.abc import Collection, Iterable

# Names of splits -> index into SPLITS (train, val, test).
SPLIT_WORDS = {
    "train": 0, "training": 0, "trn": 0, "val": 1, "valid": 1, "validation": 1, "validate": 1,
    "test": 2, "testing": 2, "tst": 2, "eval": 2, "evaluation": 2, "evaluate": 2,
}
# Development sets are for validation beside a training set, and for training without one.
DEV_WORDS = {"dev", "devel", "development"}
UNLABELLED = {"unlabeled", "unlabelled", "unlabel", "unsupervised", "unsup", "unknown_labels",
              "no_label", "nolabel"}
# What people add to the name of a split: train_data, audio_test, train-set, training_2.
_DECORATION = {"data", "dataset", "set", "audio", "audios", "wav", "wavs", "clips", "split",
               "files", "sounds", "recordings", "folder", "part", "samples", "curated"}
# Words before a number that name persons, machines, places or days, not classes.
GROUP_WORDS = {
    "actor", "id", "speaker", "spk", "spkr", "subject", "subj", "sub", "patient", "pat", "person",
    "participant", "individual", "user", "site", "station", "recorder", "device", "session", "sess",
    "recording", "rec", "day", "date", "week", "night", "plot", "mic", "channel", "machine",
    "section", "batch", "disc", "cd", "tape", "location", "loc", "animal", "bird", "singer",
    "client", "aru", "hydrophone", "deployment", "chunk", "folder", "dir",
}
COPY_WORDS = {"raw", "denoised", "clean", "cleaned", "noisy", "augmented", "aug", "original",
              "originals", "orig", "enhanced", "processed", "filtered", "normalized", "normalised",
              "resampled", "mono", "unprocessed", "preprocessed"}
# Folders and labels that stand for "none of the classes".
NEGATIVE_WORDS = {"noise", "background", "background_noise", "silence", "negative", "negatives",
                  "no_call", "no_calls", "nocall"}
BIRDNET_NAME = re.compile(r"[A-Z][a-z]+ [a-z-]+_.+")  # Genus species_Common Name


def plain_name(name: str) -> str:
    """"Train-Data" and "trainData" are train_data."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def splits_of(names: Iterable[str]) -> dict[str, int]:
    """{name: index into SPLITS} of the names that are splits."""
    split_of = {}
    dev = []
    for name in names:
        words = [word for word in plain_name(name).split("_")
                 if word not in _DECORATION and not word.isdigit()]
        if len(words) != 1:
            continue
        if words[0] in SPLIT_WORDS:
            split_of[name] = SPLIT_WORDS[words[0]]
        elif words[0] in DEV_WORDS:
            dev.append(name)
    code = 1 if 0 in split_of.values() else 0
    return split_of | dict.fromkeys(dev, code)


def fold_of(name: str) -> int | None:
    """The number of a fold: fold1, Fold_02, cv-3; None for other names."""
    match = re.fullmatch(r"(?:fold|cv|kfold)_?(\d{1,3})", plain_name(name))
    return int(match[1]) if match else None


def is_group(name: str) -> bool:
    """Whether a name is that of a person, machine, place or day: Actor_01, id_00, 2021-05-12."""
    text = plain_name(name)
    if re.fullmatch(r"(19|20)\d\d(_?[01]\d(_?[0-3]\d)?)?(_\d+)?", text):
        return True
    match = re.fullmatch(r"([a-z]+)_?\d+[a-z]?", text)
    return match is not None and match[1] in GROUP_WORDS


def is_unlabelled(name: str) -> bool:
    """Whether a folder says that its recordings have no labels."""
    return plain_name(name) in UNLABELLED


def is_copy(name: str) -> bool:
    """Whether a name says that recordings were processed, or that they were not."""
    words = plain_name(name).split("_")
    return any(word in COPY_WORDS for word in words)


def negative_names(names: Collection[str], real_classes: Collection[str] = ()) -> set[str]:
    """Those of the names of folders or labels that stand for "none of the classes".

    real_classes: names that are classes all the same. Among names as BirdNET-Analyzer has them,
    "Other" is one of them, too.
    """
    words = set(NEGATIVE_WORDS)
    if any(BIRDNET_NAME.fullmatch(name) for name in names):
        words.add("other")
    return {name for name in names if plain_name(name) in words and name not in real_classes}
