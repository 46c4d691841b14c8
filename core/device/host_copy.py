"""Copy a few numbers from a GPU without waiting for the work that is queued behind them."""
import torch


class HostCopy:
    """A tensor's copy on the host: queued at once, waited for when it is read.

    A copy that is made at the time of reading would wait for all work queued until then. On a CPU
    it is the tensor itself.
    """

    def __init__(self, tensor: torch.Tensor):
        self._ready = None
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = tensor.to("cpu", non_blocking=True)  # torch puts it in pinned memory
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> torch.Tensor:
        """Wait until the copy is complete; later work may still be running."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._tensor
