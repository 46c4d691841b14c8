"""How every script ends: which error gives which line and exit code."""
import os
import sys
from collections.abc import Callable

from core.device.distributed import Distributed, DistributedError, LaunchError
from core.device.memory import ClipTooLargeError, is_out_of_memory
from core.divergence import TrainingError
from core.run.signals import Interrupted
from data.workers import WorkerError
from util import InputError, is_disk_error, printable

OK, LOST_PROCESS, INVALID_INPUT, TRAINING_FAILED, CTRL_C = 0, 1, 2, 3, 130



def run_script(main: Callable[[], int | None]) -> None:
    """Run `main()` and exit the process.

    0: done. 1: another process of the run is gone. 2: invalid input. 3: training diverged or
    produced NaNs, or memory ran out. 130, 143: interrupted by a signal; a run that had begun to
    train has a checkpoint. Errors print one line on stderr. Anything else is a bug and gives a
    traceback.
    """
    prepare_streams()
    try:
        code = main() or OK
    except Exception as error:
        ending = ending_of(error)
        if ending is None:
            raise
        code, message = ending
        # Invalid input is found on all ranks alike, so only one of them prints it.
        is_common = code == INVALID_INPUT and not isinstance(error, LaunchError)
        if message and (not is_common or Distributed.prints_errors()):
            print_error(message)
    except KeyboardInterrupt:
        code = CTRL_C
    Distributed.leave(code)
    sys.exit(code)


def ending_of(error: Exception) -> tuple[int, str] | None:
    """(exit code, line to print) for an expected error; None for a bug."""
    if isinstance(error, Interrupted):
        return error.exit_code, ""
    if isinstance(error, InputError):
        return INVALID_INPUT, str(error)
    if isinstance(error, (TrainingError, ClipTooLargeError)):
        return TRAINING_FAILED, str(error)
    if isinstance(error, (DistributedError, WorkerError)):
        return LOST_PROCESS, str(error)
    if isinstance(error, RuntimeError) and "not have a deterministic" in str(error):
        operation = str(error).split()[0]
        return INVALID_INPUT, (f"--deterministic: torch has no deterministic {operation} for this "
                               "device; start a run without the flag")
    if is_out_of_memory(error):
        return TRAINING_FAILED, ("out of memory outside of the training step; lower --batch-size "
                                 "or --eval-batch-size, then give the same command again")
    if is_disk_error(error):
        place = error.filename or "a result file"
        if isinstance(place, bytes):
            place = os.fsdecode(place)
        return INVALID_INPUT, (f"{place}: cannot be read or written ({error.strerror}); free some "
                               "space, permit writing or reconnect the disk, then give the same "
                               "command again (train.py: with --resume)")
    return None


def parse_args(parser, argv: list[str] | None = None, source: str = ""):
    """`parser.parse_args(argv)`; an invalid command line prints one line and exits with code 2.

    source: put before the message, for flags that do not come from the command line.
    """
    def error(message):
        print_error(f"{source}{message} (see --help)")
        sys.exit(INVALID_INPUT)

    parser.error = error
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == []:  # argparse makes this of "--flag=--", without asking the flag's type
            error(f"--{name.replace('_', '-')}: needs a value")
    return args


def print_error(message: object) -> None:
    print(f"error: {printable(message)}", file=sys.stderr)


# --- output that goes nowhere ---

class LastingStream:
    """A stream that drops its text once nobody can read it any more: a pipe into `head` that has
    ended, a terminal that was closed, a full disk. Work goes on, and the exit code stays right.

    Names that are not UTF-8, or that the terminal cannot show, are printed as escapes.
    """

    def __init__(self, stream):
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # not if another kind of stream has been put there
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self):
        """Lead the stream into nowhere, with the text that it still holds."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._stream.flush()


def prepare_streams() -> None:
    """From here on print never fails, also if stdout or stderr are closed or go away."""
    for number in (0, 1, 2):  # else the next file that is opened would be stdin, stdout or stderr
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)
        if not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))
