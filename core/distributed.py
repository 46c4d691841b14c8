"""Several processes under torchrun, each with a part of every window; one process is the same code with nothing
to exchange.

Gradients are exchanged once a window, after its last backward pass, by `sum_gradients` rather than by
DistributedDataParallel's hooks: a rank may then have more or fewer micro-batches than the others (the ragged
last window, a micro-batch split for want of memory), and it may repeat its part of a step alone. What is
given up is the overlap of the exchange with the last backward pass.
"""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

BUCKET = 2**25  # bytes of gradients exchanged at once


class RanksError(RuntimeError):
    """Another process of the run is gone, and so this one cannot go on: one line, exit code 1."""


@contextlib.contextmanager
def exchange():
    try:
        yield
    except RuntimeError as error:  # what the backends raise, gloo without a type of its own
        raise RanksError(f"another process of this run has ended or cannot be reached ({str(error).splitlines()[0][-120:]}); "
                         "continue from the last checkpoint with --resume") from None


class Ranks:
    """The processes of this run. `rank`, `size` and `local_rank` are torchrun's; without torchrun 0, 1, 0.

    Collectives over numbers and objects run on the host (gloo), so they never wait for the device. The
    first rank is the only one that writes and prints.
    """

    def __init__(self):
        self.rank, self.size, self.local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self._host = None

    @property
    def first(self):
        return self.rank == 0

    def start(self, device, timeout=timedelta(minutes=30)):
        """Meet the other processes. Call before any other method, on every rank."""
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
            self._host = dist.new_group(backend="gloo", timeout=timeout)
            if not self.first:
                sys.stdout = open(os.devnull, "w")

    def stop(self):
        if self.size > 1:
            dist.destroy_process_group()

    def total(self, *numbers):
        """The sums of these numbers over all ranks: the way to a verdict that all share."""
        if self.size == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64)
        with exchange():
            dist.all_reduce(values, group=self._host)
        return tuple(type(number)(value) for number, value in zip(numbers, values.tolist(), strict=True))

    def gather(self, item):
        """One object from each rank -> the list of them, on every rank."""
        if self.size == 1:
            return [item]
        items = [None] * self.size
        with exchange():
            dist.all_gather_object(items, item, group=self._host)
        return items

    def once(self, work):
        """Do `work()` on the first rank and give its result to all; an exception is raised on all."""
        if self.size == 1:
            return work()
        box = [None]
        if self.first:
            try:
                box = [(work(), None)]
            except Exception as error:
                box = [(None, error)]
        with exchange():
            dist.broadcast_object_list(box, src=0, group=self._host)
        result, error = box[0]
        if error is not None:
            raise error
        return result

    def share(self, module):
        """Give the first rank's parameters to all."""
        if self.size > 1:
            for value in module.state_dict().values():
                with exchange():
                    dist.broadcast(value, src=0)

    @torch.no_grad()
    def sum_gradients(self, parameters):
        """Sum each parameter's gradient over all ranks; a rank that had no micro-batch counts as zero."""
        if self.size == 1:
            return
        bucket, size = [], 0
        for p in parameters:
            if not p.requires_grad:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if bucket and (size + p.grad.nbytes > BUCKET or p.grad.dtype != bucket[0].dtype):
                self._sum(bucket)
                bucket, size = [], 0
            bucket.append(p.grad)
            size += p.grad.nbytes
        self._sum(bucket)

    def _sum(self, bucket):
        if bucket:
            flat = torch.cat([grad.flatten() for grad in bucket])
            self.sum(flat)
            torch._foreach_copy_(bucket, [part.view_as(grad) for grad, part in
                                          zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True)])

    def sum(self, value):
        """Sum a tensor over all ranks, in place, on its device."""
        if self.size > 1:
            with exchange():
                dist.all_reduce(value)
        return value
