"""Small helpers that every layer may import. Standard library only."""
import contextlib
import csv
import errno
import hashlib
import io
import json
import numbers
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

# errno of an OSError that disks, connections to them, permissions or paths cause. Others are bugs,
# unless the path is to blame, see `is_disk_error`.
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNABORTED, errno.ECONNRESET,
    errno.ESHUTDOWN, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY,
    errno.ETXTBSY, errno.ENOLCK,
}
# errno of an operation that a file system does not have, such as chmod on FAT
UNSUPPORTED = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP,
               errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.ENOTTY}
# Text that a spreadsheet takes for a formula: it begins with one of these characters, also in their
# full width. The apostrophes of an earlier escape count, so that each escape can be undone.
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|nan)", re.IGNORECASE)
_told = set()  # what was said to be unsupported


class InputError(ValueError):
    """Invalid input from a person: one line that names the file or flag and how to fix it.

    Scripts end with exit code 2 and print the line without a traceback. Subclasses say which layer
    raised it. Names of files and classes in the message are escaped, so it always fits on one line.
    """

    def __init__(self, message: object):
        super().__init__(printable(message))


def require_working_directory() -> None:
    """End with exit code 2 if the working directory is gone. Call it before importing torch, whose
    libraries would end the process with a line of their own."""
    try:
        os.getcwd()
    except OSError:
        print("error: the working directory is gone; change to another with cd, then give the same "
              "command again", file=sys.stderr)
        sys.exit(2)


def printable(text: object) -> str:
    """`text` on one line: line breaks, control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def summarize(names: Iterable[object], most: int = 5) -> str:
    """"a, b and 3 more": at most `most` names, then how many are left."""
    names = [str(name) for name in names]
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def plural(number: int, noun: str) -> str:
    """"1 clip", "2,000 clips"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def is_disk_error(error: BaseException) -> bool:
    """Whether an error is the fault of a disk, its connection, permissions or a path.

    A missing file is one if its folder is gone: a disk was taken away. A missing file in a folder
    that exists is a bug of this program, as is an invalid argument of a call without a path.
    """
    if not isinstance(error, OSError):
        return False
    return error.errno in DISK_ERRORS or _is_path_to_blame(error)


def _is_path_to_blame(error):
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return False
    if error.errno == errno.ENOENT:
        return not os.path.isdir(os.path.dirname(error.filename) or os.fsencode("."))
    if error.errno == errno.EEXIST:  # a file where a folder is wanted
        return os.path.exists(error.filename) and not os.path.isdir(error.filename)
    return error.errno == errno.EINVAL  # a name that the file system does not permit


@contextlib.contextmanager
def if_supported(operation: str) -> Iterator[None]:
    """Do without an operation that the file system does not have; say so once."""
    try:
        yield
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in UNSUPPORTED:
            raise
        if operation not in _told:
            _told.add(operation)
            print(f"note: this file system has no {operation}; going on without it", flush=True)


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Open a file for reading. Raises OSError at once for a FIFO or a device, or a link to one:
    reading these may never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.ENODEV, "not a regular file", os.fspath(path))
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def open_text(path: str | os.PathLike) -> IO[str]:
    """The same for a CSV in UTF-8; bytes of a name that are not UTF-8 are surrogate escapes."""
    return io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="surrogateescape",
                            newline="")


def read_regular(path: str | os.PathLike) -> bytes:
    """The content of a file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder and its parents if it is missing.

    Raises OSError. Its errno is one of DISK_ERRORS also in /proc, which takes no folders.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise OSError(errno.EROFS, "no folder can be made there", os.fspath(path)) from None


def is_own(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to the user of this process. True on systems without."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def foreign_owner(cache: str | os.PathLike, *inside: str | os.PathLike) -> str | None:
    """"FOLDER belongs to another user" for the first folder that does; None if none does.

    cache: may belong to root, such as /tmp. inside: folders in it. Whoever owns a folder can
    exchange what is in it.
    """
    for level, folder in enumerate((cache, *inside)):
        with contextlib.suppress(OSError):  # there is none yet
            status = os.stat(folder)
            is_roots = level == 0 and status.st_uid == 0
            if not is_own(status) and not is_roots:
                return f"{folder} belongs to another user"
    return None


class SpeedLimit:
    """Give up a download that trickles: `add` raises TimeoutError if fewer than `least` bytes/s
    have come over a period of `seconds`."""

    def __init__(self, least: float, seconds: float):
        self.least, self.seconds = least, seconds
        self._began, self._n_bytes = time.monotonic(), 0

    def add(self, n_bytes: int) -> None:
        self._n_bytes += n_bytes
        passed = time.monotonic() - self._began
        if passed < self.seconds:
            return
        if self._n_bytes < self.least * passed:
            raise TimeoutError(f"slower than {self.least / 1000:g} kB/s for {self.seconds:g} s")
        self._began, self._n_bytes = time.monotonic(), 0


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w", durable: bool = True
                 ) -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    A reader, also one after a crash, sees the old content or the new, never a part. Text is UTF-8
    with "\\n" line ends; bytes of a file name that are not UTF-8 are written as they are. Missing
    parent folders are made. durable: wait until the content is on disk, for files that cannot be
    made again. Raises OSError; the old file is then intact and nothing is left over.
    """
    path = Path(path)
    make_folder(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    try:
        with open(handle, mode, **text) as file:
            yield file
            if durable:
                file.flush()
                with if_supported("syncing of files"):
                    os.fsync(file.fileno())
        with if_supported("permissions of files"):
            os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path, "wb") as file:
        file.write(text.encode("utf-8", errors="replace"))


def escape_cell(value: Any) -> Any:
    """A cell for a CSV: text that a spreadsheet would run as a formula gets an apostrophe in front.

    Numbers stay, also as text. `unescape_cell` undoes it for any text.
    """
    if value is None or isinstance(value, numbers.Number):
        return value
    text = str(value)
    if FORMULA.match(text) and not NUMBER.fullmatch(text):
        return "'" + text
    return text


def unescape_cell(text: str) -> str:
    """The text that `escape_cell` escaped. Other text, such as 'Apapane, stays as it is."""
    return text[1:] if text[:1] == "'" and FORMULA.match(text) else text


class CsvWriter:
    """A writer of CSV files as of the csv module, which escapes formulas (see `escape_cell`).

    All CSV files of the program are written with it.
    """

    def __init__(self, file: IO[str], quoting: int = csv.QUOTE_MINIMAL):
        self._writer = csv.writer(file, quoting=quoting)

    def writerow(self, row: Iterable[Any]) -> None:
        self._writer.writerow([escape_cell(value) for value in row])

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        for row in rows:
            self.writerow(row)


def csv_rows(file: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file that `CsvWriter` wrote, by column; a cut row lacks some values."""
    for row in csv.DictReader(file):
        yield {name: unescape_cell(value) if isinstance(value, str) else value
               for name, value in row.items()}


def fsync_path(path: str | os.PathLike) -> None:
    """Make the bytes of a file, or the names in a folder, survive a power cut."""
    with if_supported("syncing of files and folders"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
