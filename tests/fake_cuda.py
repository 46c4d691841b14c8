"""Run parts of the program on fake CUDA tensors and note where the host would wait for a GPU.

Fake tensors have a device and a shape but no values, so no GPU is needed. `test_fake_cuda.py` runs
this file in a process of its own, because the mode replaces CUDA's device guard for good. Printed
are the notes of every case, as JSON.

What it cannot see: values, waits within CUDA libraries, compiled code, NCCL, memory that runs out.
"""
import contextlib
import json
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from core.device.precision import Precision
from core.ema import EMA
from core.learner import Learner
from core.scoring import evaluate, window_scores
from data.audio import AudioError
from data.augment import Augment
from data.cache import InMemoryClips
from data.clips import Batch, Clips, CropKey, TileKey
from data.manifest import LabelSet, Manifest
from losses import build_loss
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.groups import parameter_groups
from sched import RelativeSchedule

DEVICE = torch.device("cuda")
WATCHING = ("__torch_dispatch__", "_check_copy", "_check_mix", "note", "read")  # functions here
PAGEABLE_LIMIT = 1 << 16  # bytes; a larger copy from memory that is not pinned makes the host wait


class Watch(TorchDispatchMode):
    """Notes each operation that makes the host wait, or that mixes host and device tensors.

    notes: (kind, "file:line" of the program). The kinds: "read" of a value; "copy to host", "copy
    to device", "pageable copy", which block; "mixed devices". "event" is an expected wait, with the
    number of device operations that it waits for instead of a line.
    """

    def __init__(self):
        super().__init__()
        self.notes = []
        self.n_operations = 0  # on device tensors
        self.n_casts = 0  # of weights on the device to 16 bits
        self.pinned = set()  # ids of host tensors that count as pinned

    def pin(self, *tensors):
        self.pinned.update(id(tensor) for tensor in tensors if tensor is not None)

    def note(self, kind):
        self.notes.append((kind, innermost_line(traceback.extract_stack())))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        self.n_operations += bool(on_device)
        if name in ("item", "_local_scalar_dense") and on_device:
            self.note("read")
            return 1 if args[0].dtype in (torch.bool, torch.int64) else 1.0  # any value will do
        if name in ("nonzero", "masked_select", "unique", "_unique2") and on_device:
            self.note("read")
        elif name in ("to", "_to_copy", "copy_"):
            if on_device and isinstance(args[0], torch.nn.Parameter):
                self.n_casts += kwargs.get("dtype") in (BF16, FP16)
            self._check_copy(name, args, kwargs)
        elif on_device:
            self._check_mix(name, args, tensors)
        if name == "_fused_adamw_":  # the overload with a tensor as LR has no fake implementation
            return None
        return function(*args, **kwargs)

    def _check_copy(self, name, args, kwargs):
        if name == "copy_":
            target, source = args[0].device, args[1]
            is_async = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source = args[0]
            devices = [value for value in (*args[1:], *kwargs.values())
                       if isinstance(value, torch.device)]
            target = devices[0] if devices else source.device
            flags = [value for value in args[1:] if isinstance(value, bool)]
            is_async = flags[0] if flags else kwargs.get("non_blocking", False)
        kinds = source.device.type, torch.device(target).type
        if kinds == ("cuda", "cpu") and not is_async:
            self.note("copy to host")
        elif kinds == ("cpu", "cuda") and not is_async:
            self.note("copy to device")
        elif (kinds == ("cpu", "cuda") and source.nbytes > PAGEABLE_LIMIT
              and id(source) not in self.pinned):
            self.note("pageable copy")

    def _check_mix(self, name, args, tensors):
        host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if name in ("index", "index_put_", "index_put", "_index_put_impl_", "take", "gather"):
            is_mask = any(tensor.dtype in (torch.bool, torch.uint8)
                          for tensor in tree_leaves(args[1]) if isinstance(tensor, torch.Tensor))
            if is_mask:
                self.note("read")  # a mask becomes indices, whose number the host must know
            if host:
                self.note("mixed devices")
        elif name == "_fused_adamw_":  # it takes no numbers from the host, such as a rate
            if host:
                self.note("mixed devices")
        elif any(tensor.dim() > 0 for tensor in host):
            self.note("mixed devices")


def innermost_line(stack):
    """The innermost "file:line" of a stack that belongs to the program, or to a mistake here."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        is_installed = "site-packages" in path.parts  # a virtual environment may lie in ROOT
        if path.is_relative_to(ROOT) and not is_installed and frame.name not in WATCHING:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "backward"  # which runs in a thread of its own


class Event:
    """A stand-in for torch.cuda.Event that notes how many operations the host waits for."""
    watch: Watch  # the current one

    def __init__(self, *args, **kwargs):
        self.n_operations = None

    def record(self, stream=None):
        self.n_operations = self.watch.n_operations

    def synchronize(self):
        self.watch.notes.append(("event", self.n_operations))


@contextlib.contextmanager
def fake_cuda():
    """The Watch of a block in which CUDA tensors are fake."""
    watch = Watch()
    Event.watch = watch
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield watch


def replace_functions_that_need_a_device():
    """Let torch take CUDA for available in autocast and GradScaler, and read fakes as ones."""
    def yes(*args, **kwargs):
        return True

    def reading(original, of_shape):
        def read(tensor, *args, **kwargs):
            if not isinstance(tensor, FakeTensor):
                return original(tensor, *args, **kwargs)
            if tensor.device.type == "cuda":
                Event.watch.note("read")
            return of_shape(np.ones(tuple(tensor.shape)))
        return read

    FakeTensorMode.avoid_device_init = property(yes)
    torch.cuda.is_bf16_supported = yes
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.amp.grad_scaler.amp_definitely_not_available = lambda: False
    torch.cuda.Event = Event
    torch.cuda.current_stream = lambda device=None: None
    torch.Tensor.numpy = reading(torch.Tensor.numpy, lambda values: values)
    torch.Tensor.tolist = reading(torch.Tensor.tolist, lambda values: values.tolist())
    FakeTensor.tolist = torch.Tensor.tolist


# --- what is run ---

RATE, SAMPLES, N_CLASSES = 22050, 44100, 3
AUGMENT = {"freq_mask": 15, "time_mask": 30, "mixup_alpha": 0.4, "shift_p": 0.5, "gain": 6.0,
           "filter_p": 0.5}
BF16, FP16 = torch.bfloat16, torch.float16


def make_learner(dtype=None, loss="focal", augment=None, ema=False, checkpointing=False,
                 layer_decay=1.0, patchout=0.0, drop_path=0.0, frontend="logmel", frozen=False):
    """A small learner whose tensors are all on the fake device."""
    config = ASTConfig(N_CLASSES, dim=16, depth=2, heads=2, drop_path=drop_path)
    with DEVICE:
        model = AST(config).train()
    model.checkpointing = checkpointing
    groups = parameter_groups(model, 1e-3, 2e-3, 0.01, layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=True, foreach=False)
    schedule = RelativeSchedule(optimizer, 2, 20, device=DEVICE)
    learner = Learner(model, make_frontend(frontend), Augment(**augment or {}), build_loss(loss),
                      optimizer, schedule, Precision(DEVICE, dtype, ""), clip_grad=1.0,
                      patchout=patchout, ema=EMA(model, 0.99) if ema else None)
    learner.freeze_backbone(frozen)
    return learner


def make_frontend(kind="logmel"):
    frontend = build_frontend(FrontendConfig.of(kind))
    for name, value in list(frontend.named_buffers()):  # .to() cannot replace fake tensors
        setattr(frontend, name, value.to(DEVICE))
    return frontend


def make_clips(multi_label=False, in_memory=False):
    """Eight clips of 3 s that are no files; the last one cannot be read."""
    n = 8
    manifest = Manifest(
        "none", Path("none"), ["a", "b", "c"], [f"{i}.wav" for i in range(n)],
        labels=np.arange(n, dtype=np.int32) % N_CLASSES, start=np.zeros(n, np.float32),
        end=np.full(n, np.nan, np.float32), group=np.arange(n, dtype=np.int32), group_source="",
        split=np.zeros(n, np.int8), fold=None, notes=[], duration=np.full(n, 3, np.float32))
    if multi_label:
        manifest.label_sets = [LabelSet((c,), ((c + 1) % N_CLASSES,)) for c in range(N_CLASSES)]
        manifest.label_set = manifest.labels
    clips = Clips(manifest, RATE, SAMPLES)

    def fetch(row):
        if row == n - 1:
            raise AudioError("cannot be read")
        return np.ones(3 * RATE, np.int16), 1.0

    if in_memory:
        clips.in_memory = InMemoryClips(clips.total, fetch, DEVICE)
    return clips


def loaded_batch(watch, clip_ids, multi_label=False, noise=False):
    """A batch as a DataLoader gives it: on the host, in memory that counts as pinned."""
    n = len(clip_ids)
    target = torch.from_numpy(np.arange(n) % N_CLASSES)
    if multi_label:
        target = torch.from_numpy(np.eye(N_CLASSES, dtype=np.float32)[np.arange(n) % N_CLASSES])
    wave = torch.from_numpy(np.zeros((n, SAMPLES), np.float32))
    noise = torch.from_numpy(np.zeros((n, SAMPLES), np.float32)) if noise else None
    watch.pin(wave, target, noise)
    return Batch(wave, target, np.array(clip_ids), [], noise=noise)


def training(watch, in_memory=False, noise=False, **settings):
    """Three steps of two micro-batches, read one step late as Run does."""
    learner = make_learner(**settings)
    multi_label = settings.get("loss") == "bce"
    clips = make_clips(multi_label, in_memory)
    if noise:
        clips.set_noise(0.5, np.arange(8))
    watch.notes.clear()  # of the preparation
    pending, ends, casts = [], [], []
    for epoch in range(3):
        parts = np.arange(4), np.arange(4, 8)
        if in_memory:
            micro_batches = [clips.batch([CropKey(int(i), epoch) for i in part]) for part in parts]
        else:
            micro_batches = [loaded_batch(watch, part, multi_label, noise) for part in parts]
        pending.append(train.train_step(learner, micro_batches, epoch))
        ends.append(watch.n_operations)
        casts.append(watch.n_casts)
        if len(pending) > 1:
            pending.pop(0).read()
    return {"ends_of_steps": ends, "casts": casts}


def evaluation(watch, in_memory=False, dtype=None, loss="focal"):
    """evaluate() over two batches of tiles."""
    learner = make_learner(dtype, loss)
    multi_label = loss == "bce"
    clips = make_clips(multi_label, in_memory)
    parts = np.arange(4), np.arange(4, 7)
    if in_memory:
        batches = [clips.batch([TileKey(int(row), 0) for row in part]) for part in parts]
    else:
        batches = [loaded_batch(watch, part, multi_label) for part in parts]
    watch.notes.clear()
    evaluate(learner, batches, clips.manifest, np.arange(7))
    return {"n_batches": len(batches)}


def prediction(watch, dtype=None, multi_label=False):
    """window_scores, as predict.py calls it."""
    learner = make_learner(dtype)
    wave = torch.from_numpy(np.zeros((4, SAMPLES), np.float32))
    watch.pin(wave)  # it is not, but its copy has no work to overlap with: the scores are next
    learner.model.eval()
    watch.notes.clear()
    window_scores(learner.model, learner.frontend, wave, learner.precision, multi_label)


# --- controls: mistakes that the watch must find ---

class BrokenLoss(torch.nn.Module):
    """A loss with a mistake."""

    def __init__(self, mistake):
        super().__init__()
        self.mistake = mistake

    def forward(self, logits, target):
        loss = logits.float().square().sum(dim=1)
        if self.mistake == "float":
            float(loss.detach().sum())
        elif self.mistake == "branch":
            if loss.sum() > 0:
                loss = 2 * loss
        elif self.mistake == "host index":
            loss = loss[torch.arange(len(loss))]
        elif self.mistake == "mask":
            loss = loss[target[:, 0] > 0]
        elif self.mistake == "blocking copy":
            loss = loss + torch.zeros(len(loss)).to(loss.device)
        elif self.mistake == "large copy":
            large = torch.from_numpy(np.zeros((len(loss), SAMPLES), np.float32))
            loss = loss + large.to(loss.device, non_blocking=True)[:, 0]
        elif self.mistake == "to host":
            loss.detach().cpu()
        return loss


def mistake(watch, name):
    """A step with a mistake in the loss, or with "late copy": one that is copied when read."""
    learner = make_learner()
    learner.loss_fn = BrokenLoss(name)
    batch = loaded_batch(watch, np.arange(4))
    watch.notes.clear()
    result = train.train_step(learner, [batch], 0)
    if name == "late copy":
        result.numbers.tolist()


def buffer_on_the_host(watch):
    learner = make_learner()
    learner.frontend = build_frontend(FrontendConfig.of("logmel"))
    train.train_step(learner, [loaded_batch(watch, np.arange(4))], 0)


CASES = {
    "train: float32": (training, {}),
    "train: bf16": (training, {"dtype": BF16, "augment": AUGMENT}),
    "train: fp16, ema, layer decay": (
        training, {"dtype": FP16, "ema": True, "layer_decay": 0.8, "augment": AUGMENT}),
    "train: loaded, noise, patchout, drop-path": (
        training, {"noise": True, "patchout": 0.3, "drop_path": 0.2, "augment": AUGMENT}),
    "train: in memory": (training, {"in_memory": True}),
    "train: in memory, noise, bf16": (
        training, {"in_memory": True, "noise": True, "dtype": BF16, "augment": AUGMENT}),
    "train: multi-label, fbank, frozen": (
        training, {"loss": "bce", "frontend": "fbank", "frozen": True, "in_memory": True,
                   "augment": {"mixup_alpha": 0.4}}),
    "train: bf16, checkpointing": (training, {"dtype": BF16, "checkpointing": True}),
    "evaluate: loaded": (evaluation, {}),
    "evaluate: in memory, bf16": (evaluation, {"in_memory": True, "dtype": BF16}),
    "evaluate: multi-label": (evaluation, {"loss": "bce", "in_memory": True}),
    "predict: float32": (prediction, {}),
    "predict: fp16, multi-label": (prediction, {"dtype": FP16, "multi_label": True}),
    **{f"mistake: {name}": (mistake, {"name": name})
       for name in ("none", "float", "branch", "host index", "mask", "blocking copy",
                    "large copy", "to host", "late copy")},
    "mistake: buffer on the host": (buffer_on_the_host, {}),
}


def probe():
    """A tiny step. If it fails, torch's internals are not those that this file is written for."""
    with fake_cuda():
        layer = torch.nn.Linear(4, 2, device=DEVICE)
        layer(torch.randn(3, 4, device=DEVICE)).sum().backward()
        if layer.weight.grad.device.type != "cuda":
            raise RuntimeError("the gradient of a fake CUDA tensor is not on the device")


def run_case(work, settings):
    """-> {"notes": [[kind, place]], "error": None or its text, and what `work` returns}."""
    found, error = {}, None
    with fake_cuda() as watch:
        try:
            found = work(watch, **settings) or {}
        except Exception as exception:
            place = innermost_line(traceback.extract_tb(exception.__traceback__))
            error = f"{type(exception).__name__}: {exception} ({place})"
    return {"notes": watch.notes, "error": error, **found}


def main():
    try:
        replace_functions_that_need_a_device()
        probe()
    except Exception as exception:
        return {"skip": f"torch {torch.__version__}: {type(exception).__name__}: {exception}"}
    return {name: run_case(*case) for name, case in CASES.items()}


if __name__ == "__main__":
    print(json.dumps(main()))
