"""Several processes under torchrun; one process runs the same code with nothing to exchange.

Gradients are exchanged once per step, after the last backward pass, by `sum_gradients`.
DistributedDataParallel's hooks are not used: a rank may have fewer micro-batches than the others
(last step of an epoch), may split them (out of memory), and may repeat its part of a step alone.
The cost: the exchange does not overlap with the last backward pass.
"""
import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from util import InputError, summarize

BUCKET_BYTES = 2**25  # gradients exchanged at once
MEET_SECONDS = 300  # all ranks must have started by then
BEAT_SECONDS = 2  # each rank tells the others so often that it lives
SILENT_SECONDS = 60  # a rank that was silent for so long is given up
SILENT_SECONDS_WHEN_STOPPING = 10  # the same after a signal
ENDED_SECONDS = 5  # a rank that was silent for so long when an exchange failed has ended
# The first rank may fetch or scan for hours while the others wait. They notice its end in another
# way, by its heartbeat.
HOST_TIMEOUT = timedelta(days=7)


class DistributedError(RuntimeError):
    """Another process of the run is gone: one line, exit code 1."""


class LaunchError(InputError):
    """Variables of the environment that torchrun sets, with values that make no sense."""


def launched_as() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine) as torchrun says. Raises LaunchError."""
    values = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(default))
        if not text.isascii() or not text.isdigit() or len(text) > 6:
            raise LaunchError(f"{name}={text[:50]}: is not a whole number; unset it, or start "
                              "with torchrun")
        values[name] = int(text)
    rank, size, local_rank = values.values()
    if size < 1 or rank >= size or local_rank >= size:
        raise LaunchError(f"RANK={rank} LOCAL_RANK={local_rank} WORLD_SIZE={size}: ranks go from "
                          "0 to WORLD_SIZE - 1; unset all three, or start with torchrun")
    return rank, size, local_rank


def in_thread(work: Callable[[], Any]) -> Any:
    """The result of `work()`, during which this thread obeys signals.

    Handlers of signals run between Python's instructions, and thus never within one long call.
    """
    box = {}

    def run():
        try:
            box["result"] = work()
        except Exception as error:
            box["error"] = error
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if "error" in box:
        raise box["error"]
    return box["result"]


class Heartbeats:
    """Tell the other ranks every few seconds that this one lives, and find those that are silent.

    A process that is stopped, or whose machine hangs, keeps its connections: the others would wait
    for it until the backend's limit.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._others = [other for other in range(size) if other != rank]
        self._store = store
        self._last = {}  # rank -> (its counter, when it was first seen)
        store.set(f"alive/{rank}", "0")
        threading.Thread(target=self._beat, args=(rank,), daemon=True).start()

    def _beat(self, rank):
        count = 0
        with contextlib.suppress(RuntimeError):  # the store has ended
            while True:
                time.sleep(BEAT_SECONDS)
                count += 1
                self._store.set(f"alive/{rank}", str(count))

    def silent_for(self) -> tuple[int, float]:
        """(rank, seconds) of the rank that has been silent longest."""
        now, ages = time.monotonic(), []
        for rank in self._others:
            try:
                count = self._store.get(f"alive/{rank}")
            except RuntimeError:
                count = None  # the store has ended
            if rank not in self._last or self._last[rank][0] != count:
                self._last[rank] = (count, now)
            ages.append((now - self._last[rank][1], rank))
        age, rank = max(ages)
        return rank, age

    def ended_rank(self) -> int | None:
        """The rank that has been silent for ENDED_SECONDS; None if none was or it is not known."""
        rank, seconds = self.silent_for()
        is_known = self._last[rank][0] is not None  # else the store itself has ended
        return rank if is_known and seconds > ENDED_SECONDS else None


class Distributed:
    """The processes ("ranks") of this run.

    `rank`, `size` and `local_rank` come from torchrun; without it they are 0, 1 and 0. Numbers and
    Python objects are exchanged on the host (gloo), so they never wait for the GPU. Only the first
    rank writes files and prints.
    """

    started = False  # of this process: whether there are threads of the backend

    def __init__(self):
        self.rank, self.size, self.local_rank = launched_as()
        self.is_stopping = lambda: False  # whether a signal asks this rank to end
        self._host_group = None
        self._heartbeats = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def start(self, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Meet the other processes. Call it first, on every rank.

        timeout: of the exchange of gradients.
        """
        if self.size == 1:
            return
        port = os.environ.get("MASTER_PORT", "")
        if not os.environ.get("MASTER_ADDR") or not port.isdigit() or int(port) > 65535:
            raise LaunchError(f"WORLD_SIZE={self.size}: MASTER_ADDR or MASTER_PORT is not set; "
                              "start with torchrun, or unset WORLD_SIZE")
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        Distributed.started = True
        store = self._meet_others()
        with self._exchange():
            in_thread(lambda: dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout))
            self._host_group = in_thread(
                lambda: dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)

    def _meet_others(self):
        """The store that all ranks share, once all of them are there."""
        limit = timedelta(seconds=MEET_SECONDS)
        with self._exchange():
            store = in_thread(lambda: next(rendezvous("env://", timeout=limit)))[0]
            self._heartbeats = Heartbeats(dist.PrefixStore("warble", store.clone()), self.rank,
                                          self.size)
            started = time.monotonic()
            while True:
                missing = [rank for rank in range(self.size)
                           if not store.check([f"warble/alive/{rank}"])]
                if not missing:
                    return store
                if time.monotonic() - started > MEET_SECONDS:
                    raise DistributedError(
                        f"rank {summarize(missing)} of {self.size} has not started within "
                        f"{MEET_SECONDS} s; look at its output, then start all again")
                time.sleep(0.1)

    def stop(self) -> None:
        """Leave the group of processes; needed for a clean exit."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @classmethod
    def prints_errors(cls) -> bool:
        """Whether this process prints an error that all ranks find."""
        try:
            return cls().is_first
        except LaunchError:
            return True

    @classmethod
    def leave(cls, code: int) -> None:
        """End the process if it is one of several; call it last.

        Threads of the backends may abort a process that ends in the usual way.
        """
        if not cls.started:
            return
        if code == 0 and dist.is_initialized():
            dist.destroy_process_group()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    @contextlib.contextmanager
    def _exchange(self):
        """Turn the backends' errors (gloo has no type of its own) into a DistributedError."""
        try:
            yield
        except DistributedError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0][-120:]
            raise DistributedError(
                f"{self._ended_rank()} of this run has ended or cannot be reached ({reason}); "
                "continue from the last checkpoint with --resume"
            ) from None

    def _ended_rank(self) -> str:
        """"rank 1", if its heartbeat has ended; else words that name none."""
        until = time.monotonic() + ENDED_SECONDS + BEAT_SECONDS
        while self._heartbeats is not None and time.monotonic() < until:
            rank = self._heartbeats.ended_rank()
            if rank is not None:
                return f"rank {rank}"
            time.sleep(0.2)
        return "another process"

    def _wait(self, work) -> None:
        """Wait for an exchange on the host; obey signals, and give up if a rank is silent."""
        pause, next_look = 2e-5, time.monotonic() + BEAT_SECONDS
        while not work.is_completed():
            time.sleep(pause)
            pause = min(1.5 * pause, 2e-3)
            if self._heartbeats is not None and time.monotonic() > next_look:
                next_look += BEAT_SECONDS
                self._give_up_if_silent()
        work.wait()

    def _give_up_if_silent(self):
        rank, seconds = self._heartbeats.silent_for()
        limit = SILENT_SECONDS_WHEN_STOPPING if self.is_stopping() else SILENT_SECONDS
        if seconds > limit:
            raise DistributedError(
                f"rank {rank} of {self.size} has not answered for {seconds:.0f} s: it was stopped "
                "or its machine hangs; end it, then continue from the last checkpoint with "
                "--resume")

    def all_reduce_sum(self, *numbers: float) -> tuple:
        """Sum each number over all ranks, so that all ranks decide alike. Types are preserved."""
        if self.size == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        with self._exchange():
            self._wait(dist.all_reduce(sums, group=self._host_group, async_op=True))
        return tuple(type(number)(total) for number, total in zip(numbers, sums.tolist()))

    def all_gather(self, item: Any) -> list:
        """Collect one object from each rank; every rank gets the list of all."""
        if self.size == 1:
            return [item]
        return [self._broadcast(item, rank) for rank in range(self.size)]

    def _broadcast(self, item, source):
        """The object `item` of the rank `source`, on all ranks."""
        content = pickle.dumps(item) if self.rank == source else b""
        n_bytes = torch.tensor([len(content)])
        with self._exchange():
            self._wait(dist.broadcast(n_bytes, source, group=self._host_group, async_op=True))
            data = torch.zeros(int(n_bytes), dtype=torch.uint8)
            if self.rank == source:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self._wait(dist.broadcast(data, source, group=self._host_group, async_op=True))
        return item if self.rank == source else pickle.loads(data.numpy().tobytes())

    def on_first_rank(self, work: Callable[[], Any]) -> Any:
        """Run `work()` on the first rank and return its result, or raise its exception, on all."""
        if self.size == 1:
            return work()
        outcome = None
        if self.is_first:
            try:
                outcome = (work(), None)
            except Exception as error:
                outcome = (None, error)
        result, error = self._broadcast(outcome, 0)
        if error is not None:
            raise error
        return result

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Copy the first rank's parameters and buffers to all ranks."""
        if self.size == 1:
            return
        for value in module.state_dict().values():
            with self._exchange():
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
            with self._exchange():
                if tensor.device.type == "cpu":
                    self._wait(dist.all_reduce(tensor, async_op=True))
                else:  # waiting here would make the host wait for the GPU
                    dist.all_reduce(tensor)
        return tensor
