"""Several processes under torchrun; one process runs the same code with nothing to exchange.

Gradients are exchanged once per step, after the last backward pass, by `sum_gradients`.
DistributedDataParallel's hooks are not used: a rank may have fewer micro-batches than the others
(last step of an epoch), may split them (out of memory), and may repeat its part of a step alone.
The cost: the exchange does not overlap with the last backward pass.
"""
import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

BUCKET_BYTES = 2**25  # gradients exchanged at once


class DistributedError(RuntimeError):
    """Another process of the run is gone: one line, exit code 1."""


@contextlib.contextmanager
def _exchange():
    """Turn the backends' errors (gloo has no type of its own) into a DistributedError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][-120:]
        raise DistributedError(
            f"another process of this run has ended or cannot be reached ({reason}); "
            "continue from the last checkpoint with --resume"
        ) from None


class Distributed:
    """The processes ("ranks") of this run.

    `rank`, `size` and `local_rank` come from torchrun; without it they are 0, 1 and 0. Numbers and
    Python objects are exchanged on the host (gloo), so they never wait for the GPU. Only the first
    rank writes files and prints.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self._host_group = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def start(self, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Meet the other processes. Call it first, on every rank."""
        if self.size == 1:
            return
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timeout)
        self._host_group = dist.new_group(backend="gloo", timeout=timeout)
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)

    def stop(self) -> None:
        """Leave the group of processes; needed for a clean exit."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce_sum(self, *numbers: float) -> tuple:
        """Sum each number over all ranks, so that all ranks decide alike. Types are preserved."""
        if self.size == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        with _exchange():
            dist.all_reduce(sums, group=self._host_group)
        return tuple(type(number)(total) for number, total in zip(numbers, sums.tolist()))

    def all_gather(self, item: Any) -> list:
        """Collect one object from each rank; every rank gets the list of all."""
        if self.size == 1:
            return [item]
        items = [None] * self.size
        with _exchange():
            dist.all_gather_object(items, item, group=self._host_group)
        return items

    def on_first_rank(self, work: Callable[[], Any]) -> Any:
        """Run `work()` on the first rank and return its result, or raise its exception, on all."""
        if self.size == 1:
            return work()
        box = [None]
        if self.is_first:
            try:
                box = [(work(), None)]
            except Exception as error:
                box = [(None, error)]
        with _exchange():
            dist.broadcast_object_list(box, src=0, group=self._host_group)
        result, error = box[0]
        if error is not None:
            raise error
        return result

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Copy the first rank's parameters and buffers to all ranks."""
        if self.size == 1:
            return
        for value in module.state_dict().values():
            with _exchange():
                dist.broadcast(value, src=0)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum each gradient over all ranks; a rank without micro-batches counts as zero."""
        if self.size == 1:
            return
        bucket, n_bytes = [], 0
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = parameter.grad
            if bucket and (n_bytes + grad.nbytes > BUCKET_BYTES or grad.dtype != bucket[0].dtype):
                self._sum_bucket(bucket)
                bucket, n_bytes = [], 0
            bucket.append(grad)
            n_bytes += grad.nbytes
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, grads: list[torch.Tensor]) -> None:
        flat = torch.cat([grad.flatten() for grad in grads])
        self.sum_tensor(flat)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, on its device."""
        if self.size > 1:
            with _exchange():
                dist.all_reduce(tensor)
        return tensor
