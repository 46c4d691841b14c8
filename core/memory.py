"""When memory runs out: split the micro-batch and repeat the step; find the largest batch that fits."""
import gc
from pathlib import Path

import torch


class OutOfMemory(RuntimeError):
    """Not even a single clip fits: one line with what to change."""


def ran_out(error):
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in (
            "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")))


class Pieces:
    """Cuts a micro-batch into pieces of at most `limit` clips, which is None until memory ran out once.

    Augmentation is done before the cut and every random number belongs to a clip, so the pieces give the
    gradients of the whole.
    """

    def __init__(self, limit=None):
        self.limit = limit

    def __call__(self, clips):
        """-> slices that cover range(clips)"""
        size = min(clips, self.limit or clips)
        return [slice(i, min(i + size, clips)) for i in range(0, clips, size)]

    def halve(self, clips, say=print):
        """Memory ran out with micro-batches of `clips`: half of it from now on. Raises OutOfMemory at one clip."""
        size = min(clips, self.limit or clips)
        if size <= 1:
            raise OutOfMemory("out of memory with a single clip; use a smaller --size, shorter --seconds, "
                              "--checkpointing, or --amp bf16 or fp16")
        self.limit = (size + 1) // 2
        free()
        say(f"out of memory: micro-batches are cut into pieces of {self.limit} clips from now on, with the same result; "
            "the step is repeated")


def free():
    """Give back what the failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_batch(sizes, attempt, device):
    """The largest of the rising `sizes` for which `attempt(size)` (a forward and a backward pass) fits.

    On a GPU a size fits if it ran with a tenth of the memory to spare; on a CPU, where asking for too much
    gets the process killed, growth is watched and a size is not tried that would need more than half of
    what is free. Raises OutOfMemory where not even the first fits.
    """
    best, before, grown = None, _resident(), 0
    for size in sizes:
        if device.type == "cpu" and best and 2 * grown * size / best > _available():
            break
        try:
            attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            free()
            break
        if device.type == "cuda":
            tight = torch.cuda.max_memory_reserved(device) > 0.9 * torch.cuda.get_device_properties(device).total_memory
            torch.cuda.empty_cache()
            if tight and best:
                break
        best, grown = size, max(1, _resident() - before)
    if best is None:
        Pieces().halve(1)
    return best


def _resident():
    """Most memory that this process has held, in bytes."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available():
    """Memory that can still be had, in bytes; unlimited where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
