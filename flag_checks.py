"""What flags of train.py must fit together, what follows from them, and the model they describe."""
import argparse
import math

from core.device.distributed import launched_as
from data.manifest import DataError
from losses import SIGMOID_LOSSES
from model.ast import ASTConfig
from model.frontend import FrontendConfig

SIZES = {"tiny": ASTConfig.tiny, "small": ASTConfig.small, "base": ASTConfig.base}
DEFAULT_EFFECTIVE_BATCH = 32
MAX_PARAMETERS = 3e9  # of the model; AST-base has 86 million


def fit_together(args: argparse.Namespace, given: dict) -> str | None:
    """Complete flags that depend on others; return what is wrong with a combination, or None."""
    size = 1 if args.batch_size == "auto" else args.batch_size
    wanted = args.effective_batch or DEFAULT_EFFECTIVE_BATCH
    multiple = math.ceil(wanted / size) * size
    if "effective_batch" not in given:
        args.effective_batch = multiple
    if args.plain:
        if args.compile != "off" or given.get("cache", "off") != "off":
            return "--plain: excludes --compile and --cache; leave them out"
        args.cache = "off"
    if args.effective_batch != multiple:
        return (f"--effective-batch {args.effective_batch}: not a multiple of --batch-size {size}; "
                f"use {multiple}")
    return _fold_problem(args, launched_as()[1]) or _other_problem(args)


def _fold_problem(args, n_processes):
    if args.smoke and n_processes > 1:
        return "--smoke: excludes torchrun; try it with one process"
    if args.split_from and (args.fold is not None or args.folds):
        return "--split-from: excludes --fold and --folds; leave them out"
    if not args.folds:
        return None
    if args.fold is None:
        if args.smoke or n_processes > 1:
            return ("--folds: excludes --smoke and torchrun; leave them out, or give a number of "
                    "folds and one --fold of them")
    elif args.folds == "all":
        return "--folds all: excludes --fold; leave one of them out"
    elif not 1 <= args.fold <= args.folds:
        return f"--fold {args.fold}: must be from 1 to {args.folds} with --folds {args.folds}"
    return None


def _other_problem(args):
    if args.warmup_epochs > args.epochs:
        return (f"--warmup-epochs {args.warmup_epochs:g}: longer than the run of --epochs "
                f"{args.epochs}; lower it")
    if args.noise_dir and not args.noise_p:
        return "--noise-dir: has no effect without --noise-p; add it, for example 0.5"
    return _loss_problem(args) or _geometry_problem(args)


def choose_loss(args: argparse.Namespace, needs_sigmoids: bool) -> None:
    """Set the loss if none was given: one for clips with several labels or none, else focal.

    needs_sigmoids: whether there are such clips. Raises DataError if other flags do not fit.
    """
    if args.loss is not None:
        return
    args.loss = "focal-bce" if needs_sigmoids else "focal"
    problem = _loss_problem(args)
    if problem:
        raise DataError(f"{problem} (--loss is {args.loss}, since clips have several labels or "
                        "none)")


def _loss_problem(args):
    loss = args.loss or "focal"  # see choose_loss
    if args.logit_adjust and loss in SIGMOID_LOSSES:
        return "--logit-adjust: needs a softmax loss; use --loss focal or ce"
    if args.label_smoothing and loss != "ce":
        return "--label-smoothing: only for --loss ce; leave it out, or use --loss ce"
    if args.alpha == "none":
        return None
    if loss not in ("focal", "focal-bce"):
        return (f"--alpha {args.alpha}: only for focal losses; leave it out, or use --loss focal "
                "or focal-bce")
    if loss == "focal-bce" and (args.alpha == "balanced" or args.alpha > 1):
        return f"--alpha {args.alpha}: must be none or from 0 to 1 with --loss focal-bce"
    return None


def _geometry_problem(args):
    try:
        frontend = frontend_config(args)
        config = model_config(args, n_classes=2)
    except ValueError as error:
        return str(error)
    n_parameters = 12 * config.depth * config.dim**2  # of the blocks
    if n_parameters > MAX_PARAMETERS:
        return (f"--dim {config.dim} --depth {config.depth}: about {n_parameters / 1e9:.0f} "
                "billion parameters, more than this program can train; lower them")
    frames = frontend.frames(round(args.seconds * frontend.sample_rate))
    if frames < config.patch:
        enough = config.patch * frontend.hop_length / frontend.sample_rate + 0.05
        return (f"--seconds {args.seconds:g}: gives {frames} frames, the model needs "
                f"{config.patch}; use {enough:.1f} or more")
    return None


def model_config(args: argparse.Namespace, n_classes: int) -> ASTConfig:
    """The model that the flags describe; ValueError if they do not fit together."""
    changes = {"dim": args.dim, "depth": args.depth, "heads": args.heads,
               "n_mels": frontend_config(args).n_mels}
    changes = {name: value for name, value in changes.items() if value is not None}
    return SIZES[args.size](n_classes, drop_path=args.drop_path, **changes)


def frontend_config(args: argparse.Namespace) -> FrontendConfig:
    """The front end that the flags describe; ValueError if they do not fit together."""
    return FrontendConfig.of(args.frontend, args.fmin, args.fmax)
