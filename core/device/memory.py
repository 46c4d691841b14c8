"""Out of memory: split the micro-batch and repeat the step; find the largest batch that fits."""
import gc
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory", "not enough memory", "bad_alloc",  # the host's allocators
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED",
    # cuDNN tries only algorithms whose working memory it can have.
    "unable to find an engine", "valid cuDNN algorithm",
)
SPARE = 0.1  # share of the GPU's memory that the search for the largest batch leaves free


class ClipTooLargeError(RuntimeError):
    """Not even a single clip fits: one line with what to change, exit code 3."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the GPU's or the host's memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        message in str(error) for message in OUT_OF_MEMORY_MESSAGES)


class BatchSplitter:
    """Split a micro-batch into parts of at most `limit` clips; None until memory ran out once.

    Augmentation happens before the split and every random number belongs to a clip, so the parts
    give the gradients of the whole.
    """

    def __init__(self, limit: int | None = None, what: str = "micro-batches"):
        self.limit, self.what = limit, what

    def slices(self, n_clips: int) -> list[slice]:
        """Slices that cover range(n_clips)."""
        size = min(n_clips, self.limit or n_clips)
        return [slice(i, min(i + size, n_clips)) for i in range(0, n_clips, size)]

    def halve(self, n_clips: int, log: Callable[[str], None] = print) -> None:
        """Memory ran out with `n_clips` at once: use half the size from now on.

        Raises ClipTooLargeError if single clips did not fit.
        """
        size = min(n_clips, self.limit or n_clips)
        if size <= 1:
            raise single_clip_does_not_fit()
        self.limit = (size + 1) // 2
        free_memory()
        log(f"out of memory: {self.what} are split into parts of {self.limit} clips from now "
            "on, with the same result; this one is repeated")


def single_clip_does_not_fit() -> ClipTooLargeError:
    return ClipTooLargeError("out of memory with a single clip; use a smaller --batch-size or "
                             "--size, shorter --seconds, --checkpointing, or --amp bf16 or fp16")


def free_memory() -> None:
    """Release what a failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` of a GPU start again from what is in use now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def largest_batch(sizes: Iterable[int], attempt: Callable[[int], None],
                  device: torch.device) -> int:
    """The largest of the rising `sizes` for which `attempt(size)`, a training pass, fits.

    On a GPU a size fits if a tenth of the memory that other programs leave stays free. On a CPU the
    process would be killed for asking too much, so growth is measured: a size that would need more
    than half of the free memory is not tried. Raises ClipTooLargeError if not even the first size
    fits.
    """
    best, used_before, growth = None, _peak_resident(), 0
    reset_peak_memory(device)
    room = _room_on_gpu(device)
    for size in sizes:
        if device.type == "cpu" and best and 2 * growth * size / best > _available():
            break
        if not fits(attempt, size):
            break
        too_tight = device.type == "cuda" and torch.cuda.max_memory_reserved(device) > room
        if too_tight and best:
            break
        best, growth = size, max(1, _peak_resident() - used_before)
    free_memory()  # here the error of a failed attempt no longer holds its tensors
    reset_peak_memory(device)
    if best is None:
        raise single_clip_does_not_fit()
    return best


def fits(attempt: Callable, *arguments) -> bool:
    """Call `attempt(*arguments)`, and return whether memory was enough for it."""
    try:
        attempt(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _room_on_gpu(device):
    """Bytes that this process may take on a GPU: what it has and what is free, less SPARE."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return (1 - SPARE) * (free + torch.cuda.memory_reserved(device))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the GPU, or of the process on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _peak_resident() / 2**20


def _peak_resident() -> int:
    """Peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available() -> float:
    """Free memory in bytes; infinite if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return float("inf")
