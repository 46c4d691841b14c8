"""Where to compute and in which precision, decided once and said."""
import contextlib
import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch


class DeviceError(ValueError):
    """A device or precision that is not to be had: one line with the mend."""


def pick_device(name, local_rank=0):
    """torch.device for "auto", "cpu", "cuda", "cuda:1", "mps"; raises DeviceError. Of several processes on a
    machine each takes the GPU of its own number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"--device {name}: unknown device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"--device {name}: not available here; use --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise DeviceError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    return device


@dataclass
class Precision:
    """What autocast computes in (None: plain float32), why, and the scaler that fp16 needs."""
    device: torch.device
    dtype: torch.dtype | None
    reason: str
    cast_once: bool = True

    @cached_property
    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def on(self, device, plain=False):
        """The same on another device of the kind; plain: weights are cast for each micro-batch."""
        return replace(self, device=device, cast_once=not plain)

    def autocast(self):
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def window(self):
        """Around all the micro-batches of a step: autocast keeps its copies of the weights until the outermost region
        ends, so they are cast once and not for each micro-batch. Nothing is cast in here outside of `autocast()`."""
        if self.dtype is None or not self.cast_once:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, enabled=False)

    @property
    def name(self):
        return {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def mode(self):
        """The --amp that gives it."""
        return "off" if self.dtype is None else self.name


def choose_precision(device, mode):
    """Precision for `--amp auto|bf16|fp16|off` on a device; raises DeviceError."""
    if mode == "off":
        return Precision(device, None, "--amp off")
    if mode == "fp16" and device.type != "cuda":
        raise DeviceError(f"--amp fp16: needs a CUDA device, this is {device.type}; use --amp auto")
    if mode in ("bf16", "fp16"):
        return Precision(device, {"bf16": torch.bfloat16, "fp16": torch.float16}[mode], f"--amp {mode}")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(device, torch.bfloat16, "the GPU computes in bf16")
        return Precision(device, torch.float16, "the GPU has no bf16; losses are scaled")
    if device.type == "cpu":
        gain = _bf16_gain()
        if gain >= 1.5:
            return Precision(device, torch.bfloat16, f"matrix products are {gain:.1f} times as fast in bf16 on this CPU")
        return Precision(device, None, f"bf16 matrix products run at {gain:.2g} of float32's speed on this CPU")
    return Precision(device, None, f"no mixed precision on {device.type}")


def _bf16_gain():
    """How many times as fast as in float32 a bf16 matrix product is here. Measured, since what a CPU
    claims to support says little: without AMX or AVX512-BF16 it is emulated, a hundred times slower."""
    def seconds(dtype):
        a, b = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
        return best
    return seconds(torch.float32) / seconds(torch.bfloat16)
