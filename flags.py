"""The flags of train.py: one line each, with default, range and help; the recipes; resuming.

What must fit together is in flag_checks.py.
"""
import argparse
import math
import re
from collections.abc import Callable

from core.exits import parse_args
from core.run import CheckpointError, RunError
from core.run.checkpoint import Checkpoint, SaveTimer
from data.annotations import MODES
from data.audio import SHORT
from data.cache import CACHES
from data.named import SOURCES
from data.sampling import SAMPLERS
from flag_checks import DEFAULT_EFFECTIVE_BATCH, SIZES, fit_together
from losses import LOSSES
from metrics import MONITORS
from model.frontend import FRONTENDS
from sched import SHAPES
from util import summarize

# A recipe is a set of flag values; a flag on the command line wins over it.
RECIPES = {
    "baseline": {},
    "augmented": dict(freq_mask=15, time_mask=35, specaug_p=0.8, mixup_alpha=0.4, mixup_p=0.6),
    "best": dict(effective_batch=4, shift_p=1.0, patchout=0.3),  # chosen in experiments/
    "demo": dict(weights="none", dim=128, depth=4, heads=4, epochs=32, patience=32,
                 effective_batch=4, lr_backbone=8e-4, lr_head=8e-4, weight_decay=5e-2,
                 freq_mask=15, time_mask=35, mixup_alpha=0.4, mixup_p=0.3, shift_p=1.0),
}
# Flags that may change when a run is resumed: where it runs, and what it does in case of trouble.
FREE_ON_RESUME = {
    "resume", "run_dir", "workers", "device", "tensorboard", "eval_batch_size", "save_every",
    "max_skips", "on_divergence", "max_bad_share", "cache_dir",
    "data", "audio_dir", "negatives",  # they may have moved; their content is compared
}


# --- types: what a flag's text must be ---

def number(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """A finite number from `low` to `high`."""
    def parse_number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            wanted = "a whole number" if kind is int else "a number"
            limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}, {limits}")
        return value
    return parse_number


def count(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""
    return number(low, high, int)


SHARE = number(0, 1)


def fold_count(text: str) -> int | str:
    return text if text == "all" else count(2, 20)(text)


def batch_size(text: str) -> int | str:
    return text if text == "auto" else count(1)(text)


def alpha(text: str) -> float | str:
    return text if text in ("none", "balanced") else number(0)(text)


def snr_range(text: str) -> str:
    if not re.fullmatch(r"-?\d+(\.\d+)?,-?\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers in dB, such as 5,30")
    return text


def save_interval(text: str) -> str:
    try:
        SaveTimer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return text


# --- the flags ---

def build_parser() -> tuple[argparse.ArgumentParser, dict]:
    """The parser, which returns only the flags that were given, and the defaults of all flags."""
    parser = argparse.ArgumentParser(
        prog="train.py", usage="python train.py [flags]",
        description="Fine-tune an audio spectrogram transformer on labelled recordings.")
    defaults = {}

    def group(title):
        arguments = parser.add_argument_group(title)

        def add(flag, default, kind, text, **options):
            defaults[flag[2:].replace("-", "_")] = default
            if isinstance(kind, (list, tuple)):
                options["choices"] = kind
            elif kind is not None:
                options["type"] = kind
            if "action" not in options and default is not None:
                text += f" (default: {default})"
            arguments.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
        return add

    _add_main_flags(group("what most runs need"))
    _add_data_flags(group("recordings and splits"))
    _add_training_flags(group("training"))
    _add_loss_flags(group("loss and uneven classes"))
    _add_augmentation_flags(group("augmentation of training clips"))
    _add_model_flags(group("model and front end"))
    _add_run_flags(group("saving, resuming, failures"))
    _add_speed_flags(group("speed and memory"))
    return parser, defaults


def _add_main_flags(add):
    add("--data", "demo", str, "folder with one folder per class; a CSV with columns path,label; a "
        "folder laid out like ESC-50, UrbanSound8K, Speech Commands or BirdCLEF; demo; or a data "
        "set to fetch: " + ", ".join(SOURCES))
    add("--weights", "audioset", str, "pretrained weights: audioset, imagenet, none, a .pth, "
        ".safetensors or .pt file, or a folder from export.py --to hf")
    add("--size", "base", list(SIZES), "model size")
    add("--recipe", None, list(RECIPES), "set of flag values; other flags win over it (default: "
        "demo for the demo, else baseline)")
    add("--epochs", 50, count(1, 100_000), "maximum number of epochs")
    add("--warmup-epochs", 0.0, number(0), "epochs in which each group's learning rate rises to "
        "its own base")
    add("--batch-size", 4, batch_size, "clips on the device at once, or auto: as many as fit")
    add("--run-dir", None, str, "folder of this run (default: runs/<time>-<data>)")
    add("--smoke", False, None, "dry run of two minutes: check data and model, estimate the "
        "training time", action="store_true")
    add("--seed", 0, count(0, 2**63 - 1), "seed of everything random")


def _add_data_flags(add):
    add("--audio-dir", None, str, "folder that the paths in a CSV are relative to (default: the "
        "CSV's own)")
    add("--fold", None, count(-2**15, 2**15 - 1), "test on this fold, validate on the next, train "
        "on the rest")
    add("--folds", None, fold_count, "one run per fold, then their mean: all (folds of the data) "
        "or 2 to 20 new ones, by group; continue with the same command and --run-dir",
        metavar="all|N")
    add("--split-from", None, str, "grown data: clips of this run keep their split, new ones are "
        "added (default: the run of --weights, if it has such clips)", metavar="RUN")
    add("--negatives", None, str, "more recordings that contain none of the classes: a folder or a "
        "CSV; others are folders called noise or silence, and rows without a label",
        metavar="FOLDER_OR_CSV")
    add("--negative-share", 0.3, number(0, 1), "largest share of clips without a label in an "
        "epoch; each epoch draws others")
    add("--annotated", None, list(MODES), "annotations of events (Raven, Audacity, tables with "
        "start and end): all = what is not annotated contains none of the classes; parts = it is "
        "unknown")
    add("--label-column", None, str, "column of the annotations that has the classes, if it is not "
        "clear", metavar="NAME")
    add("--min-overlap", 0.25, number(0, 3600), "seconds of an annotated event in a window, for "
        "its class to count there")
    add("--min-event-share", 0.5, number(0.01, 1), "or this share of the event")
    add("--real-class", None, str, "folders or labels that are classes although they are called "
        "noise, background or silence; several with commas", metavar="NAME")
    add("--min-clips", 1, count(1), "leave out classes with fewer clips")
    add("--max-bad-share", 0.05, SHARE, "stop if more than this share of the clips "
        "cannot be read, before or during training")
    add("--truncated", "use", ["use", "refuse"], "recordings that were cut off: use the part that "
        "can be read, or leave them out")
    add("--scan", "auto", ["auto", "full", "headers"], "check of the recordings before training: "
        "full reads each to its end; headers reads only its beginning, which is faster but finds "
        "damage further in only during training (auto: full for up to 5,000 clips)")
    add("--seconds", 4.0, number(0.1, 3600), "length of the window that the model gets: "
        "training takes one per epoch of a longer clip, evaluation as many as cover it")
    add("--short", "repeat", SHORT, "clips shorter than --seconds: repeat them until they fill the "
        "window, pad them with silence, or place them in silence at random. In a study, place did "
        "better on quiet recordings, repeat on clips and in rain or waves: docs/training.md")
    add("--crop", "random", ["random", "active", "start"], "part of a longer clip that is used "
        "in an epoch: random; active: random, but loud parts more often; start: always its first")


def _add_training_flags(add):
    add("--effective-batch", None, count(1), "clips per optimizer step, by gradient accumulation "
        f"(default: {DEFAULT_EFFECTIVE_BATCH}, or the next multiple of the batch size)")
    add("--lr-backbone", 5e-5, number(0, 100), "base learning rate of the transformer")
    add("--lr-head", 1e-3, number(0, 100), "base learning rate of the classifier")
    add("--schedule", "cosine", list(SHAPES), "shape of the learning rates after the warm-up")
    add("--min-lr-ratio", 0.0, SHARE, "end of the schedule, as a share of the base")
    add("--weight-decay", 1e-2, number(0, 100), "AdamW's; not on biases, norms, tokens, positions")
    add("--clip-grad", 1.0, number(0), "largest gradient norm (0: no clipping)")
    add("--patience", 7, count(1), "stop after this many epochs without a better one")
    add("--monitor", "val_acc", list(MONITORS), "metric that selects best.pt; val_map "
        "suits clips with several labels")
    add("--freeze-epochs", 0, count(0), "epochs in which only the head is trained; all of them: a "
        "linear probe")
    add("--layer-decay", 1.0, SHARE, "learning rate of each block as a share of the next block's")
    add("--ema", 0.0, SHARE, "decay of averaged weights, which are then evaluated and used "
        "(0: none)")


def _add_loss_flags(add):
    add("--loss", None, list(LOSSES), "loss; bce and focal-bce treat each class separately, for "
        "clips with several labels (a;b in a CSV) or with none (default: focal, or focal-bce for "
        "such clips)")
    add("--gamma", 2.0, number(0, 100), "focal losses: focus on hard clips")
    add("--alpha", "none", alpha, "focal loss: class weight: none, a number, or balanced by class "
        "frequency; focal-bce: none, or the weight of present classes, 0 to 1")
    add("--label-smoothing", 0.0, SHARE, "ce: share of the target spread over all classes")
    add("--logit-adjust", 0.0, number(0, 100), "focal, ce: shift logits by this many times the log "
        "of the class frequency in training; helps rare classes")
    add("--sampler", "shuffle", list(SAMPLERS), "class sampling: by frequency (shuffle), by its "
        "square root, or uniform (balanced)")


def _add_augmentation_flags(add):
    add("--freq-mask", 0, count(0, 10_000), "SpecAugment: hide a band of up to this many mel bands "
        "of a spectrogram; 0 is off")
    add("--time-mask", 0, count(0, 10**6), "SpecAugment: hide a stretch of up to this many frames "
        "(columns) of a spectrogram; 0 is off")
    add("--specaug-p", 0.8, SHARE, "SpecAugment: share of the clips that are masked; no effect "
        "unless --freq-mask or --time-mask is above 0")
    add("--mixup-alpha", 0.0, number(0, 1000), "MixUp: blend a clip and its labels with "
        "another clip of the batch; 0 is off, higher values blend more evenly (the share is "
        "drawn from Beta(alpha, alpha))")
    add("--mixup-p", 0.6, SHARE, "MixUp: share of the clips that are blended; no effect unless "
        "--mixup-alpha is above 0 and --batch-size above 1")
    add("--gain", 0.0, number(0, 200), "random gain: up to this many dB louder or softer")
    add("--noise-p", 0.0, SHARE, "share of the clips that get background noise, taken from quiet "
        "parts of other training clips")
    add("--noise-dir", None, str, "take that noise from the recordings in this folder instead")
    add("--noise-snr", "5,30", snr_range, "how far the clip is above the added noise, in dB: "
        "lowest and highest",
        metavar="LOW,HIGH")
    add("--filter-p", 0.0, SHARE, "share of the clips that lose their high or their low "
        "frequencies, by a random low-pass or high-pass filter")
    add("--shift-p", 0.0, SHARE, "share of the clips that are shifted in time; what leaves at "
        "the end comes back at the start")
    add("--patchout", 0.0, SHARE, "share of each clip's patches to leave out: faster, and "
        "regularises")


def _add_model_flags(add):
    add("--dim", None, count(1, 2**14), "embedding dimension, instead of --size's")
    add("--depth", None, count(1, 1000), "number of blocks, instead of --size's")
    add("--heads", None, count(1, 2**14), "attention heads, instead of --size's")
    add("--drop-path", 0.0, number(0, 0.99), "stochastic depth rate of the last block")
    add("--frontend", "logmel", list(FRONTENDS), "logmel: 22,050 Hz, standardised per clip; fbank: "
        "AudioSet's, 16 kHz")
    add("--fmin", None, number(0), "lowest mel frequency in Hz (default: the front end's)")
    add("--fmax", None, number(0), "highest mel frequency in Hz (default: the front end's)")


def _add_run_flags(add):
    add("--resume", None, None, "continue the run in --run-dir (default: the newest); auto: or "
        "start a new one; or continue from a FILE; --data may name where its recordings are now",
        nargs="?", const="newest")
    add("--save-every", "10m", save_interval, "save within an epoch, too: 500 (steps), 10m "
        "(minutes), 0 (never)")
    add("--max-skips", 10, count(1), "abort after this many consecutive non-finite steps")
    add("--on-divergence", "stop", ["stop", "rollback", "warn"], "when validation accuracy "
        "collapses: stop, go back to the best weights and halve the learning rates, or warn")
    add("--tensorboard", False, None, "write TensorBoard events", action="store_true")


def _add_speed_flags(add):
    add("--device", "auto", str, "auto, cpu, cuda, cuda:N")
    add("--amp", "auto", ["auto", "bf16", "fp16", "off"], "mixed precision")
    add("--eval-batch-size", 16, count(1), "tiles at once in evaluation")
    add("--workers", -1, count(-1, 256), "processes that decode audio (-1: one per core, at most "
        "8, with a GPU; 0 without)")
    add("--cache", "auto", CACHES, "where decoded audio is kept, rounded to 16 bits: disk, ram, "
        "device (GPU), off; auto: the GPU or the disk if there is room")
    add("--cache-dir", None, str, "folder of the cache, the scan index and fetched data sets "
        "(default: ~/.cache/warble)")
    add("--checkpointing", False, None, "recompute activations: less memory, a third slower",
        action="store_true")
    add("--compile", "off", ["off", "default", "graphs"], "torch.compile the model for full "
        "micro-batches; graphs: with CUDA graphs")
    add("--deterministic", False, None, "use only operations that give the same bits each time, "
        "which a GPU's fastest do not", action="store_true")
    add("--plain", False, None, "no fast paths, for debugging: no cache, no compiled model, no "
        "fused optimizer, wait for the GPU at each step", action="store_true")


def active_augmentations(flags: dict) -> list[str]:
    """The names of the augmentations that are on in `flags` (name -> value).

    An augmentation has one flag with default 0, which is off; its other flags only refine it.
    """
    defaults = {}
    _add_augmentation_flags(lambda flag, default, *_, **__: defaults.update(
        {flag[2:].replace("-", "_"): default}))
    return [name for name, default in defaults.items() if default == 0 and flags[name] != 0]


# --- parsing ---

def parse(argv: list[str] | None = None, source: str = "") -> tuple[argparse.Namespace, dict]:
    """(all flags, only those given). Invalid flags print one line and exit with code 2.

    source: put before the message, for flags that do not come from the command line.
    """
    parser, defaults = build_parser()
    given = vars(parse_args(parser, argv, source))
    is_demo = given.get("data", "demo") == "demo"
    recipe = given.get("recipe") or ("demo" if is_demo else "baseline")
    args = argparse.Namespace(**(defaults | RECIPES[recipe] | given | {"recipe": recipe}))
    problem = fit_together(args, given)
    if problem:
        parser.error(problem)
    return args, given


# --- resuming ---

def as_command_line(values: dict) -> list[str]:
    """The words of a command line that gives these flag values."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return words


def resumed(args: argparse.Namespace, given: dict, checkpoint: Checkpoint) -> argparse.Namespace:
    """The flags that the run was started with; given ones may not contradict them (RunError).

    What the file says is parsed and checked like a command line.
    """
    unknown = checkpoint["flags"].keys() - vars(args).keys()
    if unknown:
        raise CheckpointError(f"{checkpoint.path}: has flags that this program does not know, "
                              f"{summarize(sorted(unknown))}; use the version that wrote it")
    started = vars(parse(as_command_line(checkpoint["flags"]), f"{checkpoint.path}: ")[0])
    for name, value in given.items():
        if name in FREE_ON_RESUME:
            started[name] = value
        elif started[name] != getattr(args, name) and value != "auto":  # auto: whatever it was
            raise RunError(f"--{name.replace('_', '-')} {value}: the run was started with "
                           f"{started[name]}; leave the flag out, or start a new run with "
                           f"--weights {checkpoint.path}")
    return argparse.Namespace(**started)
