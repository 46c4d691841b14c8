"""Memory, precision and determinism of a device, tested without a GPU (see also test_gpu.py)."""
import os
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import program
from test_fast import make_learner, numbers_of_steps
from torch.utils._python_dispatch import TorchDispatchMode

import train
from core.device import memory, precision
from core.device.compiled import Compiled
from core.device.memory import is_out_of_memory, largest_batch
from core.scoring import Scorer, evaluate
from core.scoring.evaluation import AST
from core.smoke import overfit
from data.cache import InMemoryClips
from data.clips import Batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class OutOfMemory(torch.OutOfMemoryError):
    def __init__(self):
        super().__init__("CUDA out of memory. Tried to allocate 20.00 MiB")


# --- out of memory ---

@pytest.mark.parametrize("message", [
    "cuFFT error: CUFFT_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "GET was unable to find an engine to execute this computation", "std::bad_alloc",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried ..."])
def test_messages_of_cuda_libraries_count_as_out_of_memory(message):
    assert is_out_of_memory(RuntimeError(message))


class FakeGPU:
    """Memory of a GPU of 100 bytes, of which another program has `others`."""

    def __init__(self, monkeypatch, others=0):
        self.free, self.reserved, self.peak = 100 - others, 0, 0
        self.events = []
        for name in ("mem_get_info", "memory_reserved", "max_memory_reserved", "empty_cache",
                     "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def mem_get_info(self, device=None):
        return self.free - self.reserved, 100

    def memory_reserved(self, device=None):
        return self.reserved

    def max_memory_reserved(self, device=None):
        return self.peak

    def empty_cache(self):
        self.reserved = 0
        self.events.append("empty_cache")

    def reset_peak_memory_stats(self, device=None):
        self.peak = self.reserved
        self.events.append("reset")

    def attempt(self, size):
        """A pass that needs 10 bytes per clip."""
        if 10 * size > self.free:
            raise OutOfMemory
        self.reserved = max(self.reserved, 10 * size)
        self.peak = max(self.peak, self.reserved)


@pytest.mark.parametrize("others, expected", [(0, 9), (50, 4), (80, 1), (89, 1)])
def test_largest_batch_leaves_a_tenth_of_what_other_programs_leave(others, expected, monkeypatch):
    gpu = FakeGPU(monkeypatch, others)
    gpu.peak = 95  # before the search
    assert largest_batch(range(1, 20), gpu.attempt, CUDA) == expected
    assert gpu.peak == 0  # history.csv does not show the search


def test_memory_of_a_failed_attempt_is_released_after_its_error(monkeypatch):
    """The frames of an error hold the tensors of the attempt."""
    held, alive = [], []

    def attempt(size):
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        if size == 2:
            raise OutOfMemory
    monkeypatch.setattr(memory, "free_memory", lambda: alive.append(held[-1]() is not None))
    assert largest_batch([1, 2], attempt, CPU) == 1
    assert alive == [False]


class FailingFrontend(torch.nn.Module):
    """A front end for which more than `fits` clips need too much memory."""

    def __init__(self, frontend, fits):
        super().__init__()
        self.frontend, self.fits, self.config = frontend, fits, frontend.config
        self.silence = frontend.silence

    def forward(self, wave):
        if len(wave) > self.fits:
            raise OutOfMemory
        return self.frontend(wave)


def test_front_end_is_split_if_memory_runs_out():
    learner, micro_batches = make_learner()
    expected = train.train_step(learner, micro_batches, 0).numbers
    learner, micro_batches = make_learner()
    learner.frontend = FailingFrontend(learner.frontend, 1)
    numbers = train.train_step(learner, micro_batches, 0).numbers
    assert learner.splitter.limit == 1
    torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-5)


def scores_of(learner):
    """evaluate() over seven clips in batches of 4 and 3 -> (scores, losses)."""
    generator = torch.Generator().manual_seed(1)
    waves = 0.1 * torch.randn(7, 22050, generator=generator)
    labels = np.arange(7, dtype=np.int32) % 3
    batches = [Batch(waves[part], torch.from_numpy(labels[part]).long(), np.arange(7)[part], [])
               for part in (slice(0, 4), slice(4, 7))]
    manifest = SimpleNamespace(multi_label=False, labels=labels)
    scorer = Scorer(learner.model, learner.frontend, learner.loss_fn, learner.precision)
    result = evaluate(scorer, batches, manifest, np.arange(7))
    return result.scores, result.losses


def test_evaluation_is_split_if_memory_runs_out(monkeypatch, capsys):
    learner, _ = make_learner()
    expected = scores_of(learner)
    real, sizes = AST.features, []

    def features(model, spec):
        sizes.append(len(spec))
        if len(spec) > 1:
            raise OutOfMemory
        return real(model, spec)
    monkeypatch.setattr(AST, "features", features)
    for split, whole in zip(scores_of(learner), expected, strict=True):
        np.testing.assert_allclose(split, whole, rtol=1e-5)
    assert sizes == [4, 2, *[1] * 7]
    assert capsys.readouterr().out.count("out of memory: batches of evaluation") == 2


def test_moments_that_are_allocated_early_change_no_step():
    expected = numbers_of_steps(*make_learner(), 3)
    learner, micro_batches = make_learner()
    before = [p.detach().clone() for p in learner.model.parameters()]
    learner.allocate_moments()
    for parameter, old in zip(learner.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
        moments = learner.optimizer.state[parameter]
        assert moments["step"] == 0
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == old.shape
    assert torch.equal(numbers_of_steps(learner, micro_batches, 3), expected)


# --- clips in memory ---

class PeakOfInt16(TorchDispatchMode):
    """Notes the largest size of all int16 tensors at one time, in samples."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def forget(self, pointer, n):
        self.known.discard(pointer)
        self.now -= n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.int16:
            storage = result.untyped_storage()
            pointer, n = storage.data_ptr(), storage.nbytes() // 2
            if pointer not in self.known:
                self.known.add(pointer)
                self.now += n
                self.peak = max(self.peak, self.now)
                weakref.finalize(result, self.forget, pointer, n)
        return result


def test_clips_in_memory_take_their_size_once():
    lengths = np.full(20, 1000)
    with PeakOfInt16() as sizes:
        clips = InMemoryClips(lengths, lambda row: (np.full(1000, row, np.int16), 1.0), CPU)
    assert 20_000 <= sizes.peak <= 22_000
    waves = clips.cut(np.array([3, 19]), np.zeros(2, int), np.full(2, 1000), 1000, "pad")
    assert torch.equal(waves, torch.tensor([3.0, 19.0])[:, None].expand(2, 1000))


def test_clips_that_decode_to_fewer_or_more_samples_stay_apart():
    def fetch(row):
        return np.full((8, 12, 10)[row], row + 1, np.int16), 1.0
    clips = InMemoryClips(np.array([10, 10, 10]), fetch, CPU)
    waves = clips.cut(np.arange(3), np.zeros(3, int), np.full(3, 10), 10, "pad")
    assert waves.sum(dim=1).tolist() == [8, 20, 30]


def test_cache_without_room_in_memory_is_on_the_disk(tones, tmp_path, monkeypatch, capsys):
    def prepare(patch):
        def fail(*_):
            raise OutOfMemory
        patch.setattr(InMemoryClips, "__init__", fail)
    flags = ("--cache", "ram", "--epochs", 1)
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=prepare) == 0
    assert "no room" in capsys.readouterr().out


# --- precision ---

@pytest.mark.parametrize("works, expected", [(True, torch.float16), (False, None)])
def test_gpu_whose_fp16_gives_nans_computes_in_float32(works, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    real = torch.nn.functional.conv2d

    def conv2d(x, weight, stride):
        result = real(x.cpu(), weight.cpu(), stride=stride)
        return result if works else result * torch.nan
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device, real=torch.ones: real(
        *shape, dtype=dtype))
    assert precision.choose_precision(CUDA, "auto").dtype is expected


def test_deterministic_is_set_before_the_model_is_built_also_on_resume(tones, tmp_path,
                                                                      monkeypatch):
    settings = []

    def prepare(patch):
        patch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        real = train.build_learner

        def build_learner(*args):
            settings.append((torch.are_deterministic_algorithms_enabled(),
                             torch.backends.cudnn.deterministic,
                             os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = False
            return real(*args)
        patch.setattr(train, "build_learner", build_learner)
    flags = ("--deterministic", "--epochs", 1)
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=prepare) == 0
    assert program(monkeypatch, tmp_path, "--resume", prepare=prepare) == 0
    assert settings == 2 * [(True, True, ":4096:8")]
    assert program(monkeypatch, tmp_path / "other", "--epochs", 1, data=tones,
                   prepare=prepare) == 0
    assert settings[2] == (False, False, None)


# --- the dry run ---

def test_dry_run_finds_gradients_that_are_missing_or_not_finite():
    learner, micro_batches = make_learner()
    spec, target = learner.model_input(micro_batches[0], 0)
    *_, bad_names = overfit(learner, spec, target, steps=2)
    assert bad_names == []
    learner.model.unused = torch.nn.Parameter(torch.zeros(2))
    learner.model.cls_token.register_hook(lambda gradient: gradient * torch.inf)
    *_, bad_names = overfit(learner, spec, target, steps=2)
    assert "unused" in bad_names and "cls_token" in bad_names


def test_dry_run_leaves_gradients_of_graphs_in_their_places(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    learner, micro_batches = make_learner()
    learner.compiled = Compiled(learner.model, 2, graphs=True)
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    places = [p.grad.data_ptr() for p in learner.model.parameters()]
    overfit(learner, *learner.model_input(micro_batches[0], 0), steps=2)
    assert [p.grad.data_ptr() for p in learner.model.parameters()] == places
    assert all((p.grad == 0).all() for p in learner.model.parameters())
