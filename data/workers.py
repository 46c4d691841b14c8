"""Worker processes that decode audio: what they do with signals, and what is said if one dies."""
import signal
import threading

from torch.utils.data import DataLoader

HANGS_SECONDS = 900  # a worker that gives no batch for so long is given up


def ignore_signals(worker_id):
    """In a worker process: leave signals to the main process, which saves and ends the workers.

    A terminal sends Ctrl-C to all processes of the program. Workers that died of it would end the
    main process with an error before it could save.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


class WorkerError(RuntimeError):
    """A worker process has died or hangs."""


class Loader(DataLoader):
    """A DataLoader that says so with a WorkerError if a worker dies, between two batches."""

    def __iter__(self):
        batches = super().__iter__()
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise in the middle of a step. Without it the loader finds
            # out within seconds, when it is asked for the next batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                reason = " ".join(str(error).split())[:120] or type(error).__name__
                is_own = not isinstance(error, RuntimeError) or "DataLoader" in reason
                if not self.num_workers or not is_own or reason.startswith("Caught "):
                    raise  # "Caught": raised by the code in the worker
                raise WorkerError(
                    f"a process that decodes audio has ended ({reason}), perhaps because memory "
                    "or shared memory ran out; use fewer --workers") from None
            yield batch
