"""From flags to what a training run needs: recordings, model, clips, batch size."""
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import flag_checks
import flags
from core.device.compiled import compile_for
from core.device.memory import fits, largest_batch, single_clip_does_not_fit
from core.device.shared_memory import workers_that_fit
from core.folds import cross_validate
from core.learner import Learner
from core.run import CheckpointError
from core.run.checkpoint import as_checkpoint_error, load_checkpoint
from core.run.folder import default_folder, reserve_folder
from core.scoring import restore
from core.scoring.given_data import count_seen
from data.annotations import AnnotationRules
from data.cache import WaveCache, choose_cache
from data.clips import Batch, Clips
from data.fingerprint import check_same_lengths, check_same_recordings, fingerprint
from data.load import load_manifest
from data.manifest import DataError, Manifest
from data.named import credit, find_data
from data.old_split import OldRun
from data.prepare import cache_folder, noise_recordings, prepare
from losses import SIGMOID_LOSSES
from model.ast import AST
from model.frontend import build_frontend
from model.pretrained import check_available, load_pretrained


def check_weights(args) -> None:
    """Find out now, before a long scan, if the weights cannot be had."""
    fallback = (f"python train.py --data {shlex.quote(args.data)} --weights none --size tiny "
                "--lr-backbone 5e-4 --recipe best")
    check_available(args.weights, fallback)


def load_data(args, checkpoint, distributed) -> tuple[Manifest, list[tuple[str, str]]]:
    """The clips with their splits, and (path, reason) of unreadable files."""
    if checkpoint is None:
        distributed.on_first_rank(lambda: check_weights(args))
        manifest, bad_files = distributed.on_first_rank(lambda: prepare(
            args.data, args.audio_dir, args.fold, args.min_clips, args.max_bad_share, args.scan,
            args.seed, args.cache_dir,
            multi_label=None if args.loss is None else args.loss in SIGMOID_LOSSES,
            truncated=args.truncated, n_folds=args.folds, old=old_run(args), seconds=args.seconds,
            negatives=args.negatives, real_classes=real_classes(args),
            annotations=AnnotationRules(args.annotated, args.label_column, args.min_overlap,
                                        args.min_event_share)))
        flag_checks.choose_loss(args, manifest.needs_sigmoids)
    else:
        with as_checkpoint_error(checkpoint.path):
            manifest = Manifest.from_dict(checkpoint["manifest"])
            bad_files = [(path, reason) for path, reason in checkpoint["bad_files"]]
            if manifest.multi_label and args.loss not in SIGMOID_LOSSES:
                raise ValueError("its clips have several labels, which its loss cannot learn")
            places = ("data", "audio_dir", "negatives")
            started = [checkpoint["flags"].get(name) for name in places]
        if [getattr(args, name) for name in places] != started or not manifest.root.is_dir():
            manifest.root = distributed.on_first_rank(
                lambda: moved_root(args, manifest, checkpoint))
    for line in credit(manifest.root):
        print(f"  {line}")
    counts = ", ".join(f"{len(manifest.rows(split))} {split}" for split in ("train", "val", "test"))
    print(f"  {len(manifest.classes)} classes; {counts}")
    return manifest, bad_files


def real_classes(args) -> list[str]:
    """The names in --real-class."""
    return [name.strip() for name in (args.real_class or "").split(",")]


def moved_root(args, manifest, checkpoint) -> Path:
    """Where the recordings of a resumed run are now. Raises DataError if --data has others."""
    data = args.data
    if data != "demo":
        data = find_data(data, cache_folder(args.cache_dir))
        there = load_manifest(data, args.audio_dir, manifest.classes, negatives=args.negatives,
                              annotated=args.annotated, label_column=args.label_column)
        moved = replace(manifest, root=there.root)
        known = checkpoint["fingerprint"]
        with as_checkpoint_error(checkpoint.path):
            if known is None:
                check_same_lengths(moved, data)
            else:
                check_same_recordings(moved, known, data)
        print(f"data: the same recordings, now in {moved.root}")
        return moved.root
    return manifest.root


def fingerprint_of(manifest: Manifest, checkpoint) -> dict | None:
    """What the recordings are, for a checkpoint; a resumed run keeps what it was started with."""
    return fingerprint(manifest) if checkpoint is None else checkpoint["fingerprint"]


def old_run(args) -> OldRun | None:
    """The run whose split is extended: of --split-from, else of --weights; None for neither."""
    if args.split_from:
        path = Path(args.split_from)
        path = path / "last.pt" if path.is_dir() else path
        flag = f"--split-from {args.split_from}"
    elif Path(args.weights).suffix == ".pt":
        path, flag = Path(args.weights), f"--weights {args.weights}"
    else:
        return None
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError:
        if args.split_from:
            raise
        return None  # weights of another program, or a problem that is reported later
    with as_checkpoint_error(path):
        return OldRun(flag, Manifest.from_dict(checkpoint["manifest"]), bool(args.split_from))


def build_model(args, manifest, checkpoint, device, distributed):
    """(model, front end, where the weights come from): new, pretrained or from the checkpoint."""
    torch.manual_seed(args.seed)
    if checkpoint is not None:
        model, frontend = restore(checkpoint, device, averaged=False)
        weights = checkpoint["weights"]
    else:
        model = AST(flag_checks.model_config(args, len(manifest.classes)))
        frontend = build_frontend(flag_checks.frontend_config(args)).to(device)
        weights = f"none (random, seed {args.seed})"
        if args.weights != "none":
            report, leaks = distributed.on_first_rank(
                lambda: _load_weights(args.weights, model, frontend, manifest))
            model.set_grid(report.columns)  # on ranks that have not loaded the weights
            manifest.notes += leaks
            weights = f"{report.source}, sha256 {report.sha256}"
            print("\n".join([*report.lines(), *(f"  {line}" for line in leaks)]))
    model.to(device).checkpointing = args.checkpointing
    distributed.broadcast_parameters(model)
    return model, frontend, weights


def _load_weights(source, model, frontend, manifest):
    """Load pretrained weights -> (report, lines on test clips that they have seen)."""
    checkpoints = []

    def read_own(path):
        checkpoints.append(load_checkpoint(path))
        return checkpoints[0]

    report = load_pretrained(model, source, own_reader=read_own, frontend=frontend.config,
                             classes=manifest.classes)
    leaks = []
    for checkpoint in checkpoints:
        with as_checkpoint_error(checkpoint.path):
            earlier = Manifest.from_dict(checkpoint["manifest"])
            test = manifest.rows("test")
            n_seen = count_seen(earlier, manifest, test)
        if n_seen:
            leaks.append(f"LEAK: {n_seen} of {len(test)} test clips were used to train or select "
                         f"the weights {source}: the test results are too good")
    return report, leaks


def open_clips(args, manifest, learner) -> Clips:
    """The waveforms of the manifest, with a cache and background noise if asked for."""
    rate, device, ranks = learner.frontend.config.sample_rate, learner.device, learner.distributed
    n_samples = round(args.seconds * rate)
    clips = Clips(manifest, rate, n_samples, args.short, args.seed, crop=args.crop)
    cache = WaveCache(cache_folder(args.cache_dir) / "audio", rate)
    args.cache, reason = ranks.on_first_rank(lambda: choose_cache(
        args.cache, clips.bytes, clips.longest, device, cache.folder))
    print(f"cache: {args.cache} ({reason})")
    if args.cache != "off":
        clips.cache = cache
    if args.noise_p and args.noise_dir:
        noise = ranks.on_first_rank(lambda: noise_recordings(args.noise_dir, args.cache_dir))
        print(f"noise: quiet segments of {len(noise)} recordings in {noise.root}")
        source = Clips(noise, rate, n_samples, args.short, cache=clips.cache)
        clips.set_noise(args.noise_p, range(len(noise)), source)
    elif args.noise_p:
        clips.set_noise(args.noise_p, manifest.rows("train"))
    if args.cache in ("ram", "device") and not args.smoke:
        place = device if args.cache == "device" else torch.device("cpu")
        if not fits(clips.load_into_memory, place, ranks.is_first):
            print(f"cache: no room for the audio in the memory of {place}; it is read from the "
                  "disk instead")
    return clips


def fit_to_device(args, learner: Learner, accumulate: Callable) -> int:
    """Find the batch size if it is "auto", and compile the model if asked for -> batch size.

    accumulate: train.py's forward and backward pass.
    """
    n_samples = round(args.seconds * learner.frontend.config.sample_rate)

    def attempt(size):
        """Forward and backward of a silent micro-batch, to see whether it can be done."""
        silence = Batch(torch.zeros(size, n_samples), torch.zeros(size, dtype=torch.long),
                        rows=torch.arange(size).numpy(), broken=[])
        try:
            accumulate(learner, [silence], 0, size)
        finally:
            learner.zero_grad()

    size, ranks = args.batch_size, learner.distributed
    learner.model.train()
    needs_moments = (learner.device.type == "cuda" and learner.optimizer.defaults.get("fused")
                     and args.freeze_epochs < args.epochs)
    # Now, because in the first step a smaller batch would be no help.
    if needs_moments and not fits(learner.allocate_moments):
        raise single_clip_does_not_fit()
    if size == "auto":
        sizes = divisors_up_to_share(args.effective_batch, ranks.size)
        size = min(ranks.all_gather(largest_batch(sizes, attempt, learner.device)))
        print(f"--batch-size auto: {size} clips fit at once")
    if args.compile != "off":
        compile_for(learner, size, args.compile == "graphs", attempt)
    return size


def divisors_up_to_share(effective_batch: int, n_ranks: int) -> list[int]:
    """Divisors of the effective batch that are at most a rank's share of it, rising."""
    share = math.ceil(effective_batch / n_ranks)
    return [size for size in range(1, share + 1) if effective_batch % size == 0]


def loading(args, device) -> dict:
    """How batches are loaded: worker processes, and page-locked memory for a GPU."""
    is_cuda = device.type == "cuda"
    default = min(8, torch.get_num_threads()) if is_cuda else 0
    workers = default if args.workers < 0 else args.workers
    if workers:
        n_samples = round(args.seconds * flag_checks.frontend_config(args).sample_rate)
        clip_bytes = 4 * n_samples * (2 if args.noise_p else 1)
        n_micro_batches = math.ceil(args.effective_batch / args.batch_size)
        training = workers_that_fit(workers, args.batch_size * clip_bytes, n_micro_batches)
        scoring = workers_that_fit(workers, args.eval_batch_size * clip_bytes, 1)
        workers = min(training, scoring)
    return {"workers": workers, "pin": is_cuda}


def reads_late(args, device) -> bool:
    """Whether results of a step are read one step later, so that the host never waits."""
    return device.type == "cuda" and not args.plain


def run_folds(args, given: dict, main: Callable) -> int:
    """--folds all or N: a run of train.py's `main` for each fold, in a folder of its own."""
    if args.folds == "all":
        data = find_data(args.data, cache_folder(args.cache_dir))
        manifest = load_manifest(data, args.audio_dir, real_classes=real_classes(args),
                                 negatives=args.negatives, annotated=args.annotated,
                                 label_column=args.label_column)
        if manifest.fold is None:
            raise DataError(f"--data {args.data}: has no folds; give a number, such as --folds 5")
        folds, n_folds = sorted(set(manifest.fold.tolist())), None
    else:  # each run makes the same ones
        n_folds = args.folds
        folds = range(1, n_folds + 1)
    name = default_folder(f"{Path(args.data).stem}-folds")
    folder = Path(args.run_dir) if args.run_dir else reserve_folder(Path(name))
    again = shlex.join(["python", "train.py",
                        *flags.as_command_line(given | {"run_dir": str(folder)})])

    def run_fold(fold, fold_folder):
        own = {"folds": n_folds, "fold": fold, "run_dir": fold_folder, "resume": "auto"}
        return main(flags.as_command_line(given | own), again)

    return cross_validate(folds, folder, run_fold)
