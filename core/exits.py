"""How every script ends: which error gives which line and exit code."""
import errno
import sys
from collections.abc import Callable

from core.device.distributed import Distributed, DistributedError
from core.device.memory import ClipTooLargeError, is_out_of_memory
from core.divergence import TrainingError
from core.run.signals import Interrupted
from util import InputError, printable

OK, LOST_PROCESS, INVALID_INPUT, TRAINING_FAILED, CTRL_C = 0, 1, 2, 3, 130

# errno of an OSError that the disk or its permissions cause; others are bugs
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main()` and exit the process.

    0: done. 1: another process of the run is gone. 2: invalid input. 3: training diverged or
    produced NaNs, or memory ran out. 130, 143: interrupted by a signal; a run that had begun to
    train has a checkpoint. Errors print one line on stderr. Anything else is a bug and gives a
    traceback.
    """
    escape_names()
    try:
        code = main() or OK
        Distributed().stop()
    except Exception as error:
        ending = ending_of(error)
        if ending is None:
            raise
        code, message = ending
        if isinstance(error, Interrupted):  # on all ranks alike
            Distributed().stop()
        # Invalid input is found on all ranks alike, so only one of them prints it.
        if message and (code != INVALID_INPUT or Distributed().is_first):
            print_error(message)
    except KeyboardInterrupt:
        code = CTRL_C
    sys.exit(code)


def ending_of(error: Exception) -> tuple[int, str] | None:
    """(exit code, line to print) for an expected error; None for a bug."""
    if isinstance(error, Interrupted):
        return error.exit_code, ""
    if isinstance(error, InputError):
        return INVALID_INPUT, str(error)
    if isinstance(error, (TrainingError, ClipTooLargeError)):
        return TRAINING_FAILED, str(error)
    if isinstance(error, DistributedError):
        return LOST_PROCESS, str(error)
    if is_out_of_memory(error):
        return TRAINING_FAILED, ("out of memory outside of the training step; lower --batch-size "
                                 "or --eval-batch-size, then give the same command again")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return INVALID_INPUT, (f"{error.filename or 'a result file'}: cannot be written "
                               f"({error.strerror}); free some space or permit writing, then "
                               "give the same command again (train.py: with --resume)")
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


def escape_names() -> None:
    """From here on print names that are not UTF-8, or that the terminal cannot show, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not if another kind of stream has been put there
            stream.reconfigure(errors="backslashreplace")
