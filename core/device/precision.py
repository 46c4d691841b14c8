"""Where to compute and in which precision, decided once at the start and printed."""
import contextlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from util import InputError


class DeviceError(InputError):
    """A device or precision that is not available here."""


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:1"; raises DeviceError.

    Of several processes on one machine, each takes the GPU of its own local rank.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and Path("/proc/driver/nvidia").exists():
            print("device: there is an NVIDIA GPU, but torch cannot use it; its driver may be too "
                  "old for this build of torch (see docs/performance.md)")
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(
            f"--device {name}: unknown device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        _check_cuda(name, device)
        torch.cuda.set_device(device)  # for calls that take no device, such as is_bf16_supported
    elif device.type != "cpu":
        # Apple's mps was never tried: its fused AdamW would apply steps with NaNs.
        raise DeviceError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    return device


def _check_cuda(name, device):
    """Raise DeviceError if the GPU is not there, or cannot run this build of torch."""
    if not torch.cuda.is_available():
        raise DeviceError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, "
                          "counted from 0")
    try:
        # No matrix product: cuBLAS reads its settings at the first one (use_deterministic).
        torch.ones(8, device=device).add(1).sum().item()
    except RuntimeError as error:  # no kernel image for an old GPU, a driver that is too old
        raise DeviceError(
            f"--device {name}: {torch.cuda.get_device_name(device)} cannot run torch "
            f"{torch.__version__} ({str(error).splitlines()[0][:80]}); install a build of torch "
            f"for older GPUs (CUDA 12.6 wheels from pytorch.org), or use --device cpu") from None


@dataclass
class Precision:
    """The dtype that autocast computes in (None: float32), the reason, and the fp16 scaler."""
    device: torch.device
    dtype: torch.dtype | None
    reason: str
    cast_once: bool = True

    @cached_property
    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def on(self, device: torch.device, plain: bool = False) -> "Precision":
        """The same for another device of the type; plain: cast weights for each micro-batch."""
        return replace(self, device=device, cast_once=not plain)

    def autocast(self) -> AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextlib.contextmanager
    def cast_weights_once(self) -> Iterator[None]:
        """Put this around all micro-batches of a step.

        Autocast caches its copies of the weights until the outermost region ends, so they are cast
        once per step instead of once per micro-batch. Nothing else is cast in this outer region.

        Backward passes run in the calling thread. In a thread of its own, as usual on a GPU, each
        block that checkpointing recomputes would be an outermost region, and end the cache.
        """
        if self.dtype is None or not self.cast_once:
            yield
            return
        with (torch.autocast(self.device.type, self.dtype, enabled=False),
              torch.autograd.set_multithreading_enabled(False)):
            yield

    @property
    def name(self) -> str:
        return {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def mode(self) -> str:
        """The value of --amp that gives this precision."""
        return "off" if self.dtype is None else self.name


def choose_precision(device: torch.device, mode: str) -> Precision:
    """Precision for `--amp auto|bf16|fp16|off` on a device; raises DeviceError."""
    if mode == "off":
        torch.backends.cudnn.allow_tf32 = False  # the default would round inputs to 10 bits
        return Precision(device, None, "--amp off")
    if mode == "fp16" and device.type != "cuda":
        raise DeviceError(f"--amp fp16: needs a CUDA device, this is {device.type}; use --amp auto")
    if mode in ("bf16", "fp16"):
        dtype = torch.bfloat16 if mode == "bf16" else torch.float16
        return Precision(device, dtype, f"--amp {mode}")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(device, torch.bfloat16, "the GPU computes in bf16")
        if not fp16_convolution_works(device):  # GTX 16xx
            return Precision(device, None, "the GPU has no bf16, and its fp16 gives NaNs")
        return Precision(device, torch.float16, "the GPU has no bf16; losses are scaled")
    if device.type == "cpu":
        speedup = _bf16_speedup()
        if speedup >= 1.5:
            reason = f"matrix products are {speedup:.1f} times as fast in bf16 on this CPU"
            return Precision(device, torch.bfloat16, reason)
        reason = f"bf16 matrix products run at {speedup:.2g} of float32's speed on this CPU"
        return Precision(device, None, reason)
    return Precision(device, None, f"no mixed precision on {device.type}")


def fp16_convolution_works(device: torch.device) -> bool:
    """Whether a small convolution in fp16 gives the finite values that it should."""
    ones = torch.ones(2, 1, 64, 64, dtype=torch.float16, device=device)
    sums = torch.nn.functional.conv2d(ones, ones[:, :, :16, :16], stride=10)  # (2, 2, 5, 5)
    return bool((sums == 16 * 16).all())


def use_deterministic() -> None:
    """Let all operations be those that give the same bits each time (--deterministic).

    Call it before the first matrix product on a GPU, because cuBLAS reads its setting only then.
    An operation without such a version raises a RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _bf16_speedup() -> float:
    """How many times as fast as float32 a bf16 matrix product is here.

    It is measured, because what a CPU claims to support says little: without AMX or AVX512-BF16
    bf16 is emulated, a hundred times slower.
    """
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}  # seconds
    operands = {dtype: (torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
                for dtype in best}
    for _ in range(8):  # in turn, so that other work on the machine slows both
        for dtype, (a, b) in operands.items():
            start = time.perf_counter()
            a @ b
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
