"""Find audio files on the disk, and tell a file that is gone from a disk that is away."""
import errno
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from util import plural, summarize

from .audio import AUDIO_SUFFIXES
from .manifest import DataError

# Sound that libsndfile does not decode.
UNDECODABLE_SUFFIXES = frozenset({
    ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".aac", ".webm", ".weba", ".mkv", ".mka", ".wma",
    ".asf", ".amr", ".3gp", ".3gpp", ".ac3", ".dts", ".ape", ".wv", ".tta", ".mpc", ".dsf", ".dff",
    ".ra", ".rm", ".avi", ".wac", ".spx", ".awb", ".qoa", ".shn", ".mp2", ".mpga",
})
# Folders that devices and systems add, which hold no recordings of the user's.
SYSTEM_FOLDERS = frozenset({
    "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
    "__macosx",
})
MAX_FOLDERS = 200_000
# A disk or a server that is away; one damaged file can also give EIO.
OUTAGES = frozenset({
    errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ESHUTDOWN, errno.EIO,
})
ACCESS_REASONS = ("cannot be opened:", "cannot be read:")  # see audio.AccessError
SAMPLE = 20  # other files that are looked at


def suffix(name: str) -> str:
    """Lower-case suffix with its dot, or ""."""
    return os.path.splitext(name)[1].lower()


class IgnoredFiles(Counter):
    """Counts the suffixes of files without an audio suffix; remembers those with sound."""

    def __init__(self):
        super().__init__()
        self.undecodable: list[str] = []  # paths

    def describe(self, paths: Iterable[str] = ()) -> list[str]:
        """Lines on these files. paths: of the audio files, to find folders that have none."""
        lines = []
        if self.undecodable:
            counts = Counter(suffix(path) for path in self.undecodable)
            lines.append(f"left out: {plural(len(self.undecodable), 'recording')} that cannot be "
                         f"decoded here: convert to wav or flac ({count_suffixes(counts)}), e.g. "
                         f"{min(self.undecodable)}")
            with_audio = {os.path.dirname(path) for path in paths}
            without = {os.path.dirname(path) for path in self.undecodable} - with_audio
            if without and with_audio:
                lines.append("folders that have only such recordings, so a class may be missing: "
                             f"{summarize(sorted(without))}")
        others = Counter({kind: n for kind, n in self.items() if kind not in UNDECODABLE_SUFFIXES})
        if others:
            lines.append(f"left out: {plural(sum(others.values()), 'file')} without an audio "
                         f"suffix ({count_suffixes(others)})")
        return lines


def count_suffixes(counts: Counter) -> str:
    """"1 without suffix, 2 .jpg"."""
    return ", ".join(f"{n} {kind or 'without suffix'}" for kind, n in sorted(counts.items()))


def recordings_below(folder: Path, flag: str) -> list[str]:
    """Every path with an audio suffix below a folder, relative to it, in no order; see find_audio.

    flag: that named the folder, for the DataError if a folder cannot be read.
    """
    try:
        paths = find_audio(folder.parent, folder.name, Counter())
    except OSError as error:
        raise DataError(f"{flag} {error.filename}: {error.strerror}; make it readable or remove "
                        "it") from None
    return [path.removeprefix(folder.name + "/") for path in paths]


def find_audio(root: str | os.PathLike, folder: str, ignored: Counter) -> list[str]:
    """List every path with an audio suffix below root/folder, relative to root, in no order.

    Hidden files, and folders that are hidden or a system's, are skipped. Links to folders are
    followed, but each real folder is read once, and no link to a folder that contains root.
    Anything with an audio suffix but a folder is listed, also a pipe or a broken link: the scan
    says why it cannot be used.

    ignored: counts the suffixes of the other files. Raises OSError if a folder cannot be read, or
    if there are more than MAX_FOLDERS.
    """
    paths = []
    seen = _with_parents(os.path.realpath(root))  # identities of folders not to be read (again)
    waiting, linked = [folder], []  # folders to read; links come last, so that real paths win
    while waiting or linked:
        folder = waiting.pop() if waiting else linked.pop()
        full_path = os.path.join(root, folder)
        status = os.stat(full_path)
        identity = status.st_dev, status.st_ino
        if identity in seen:
            continue
        seen.add(identity)
        if len(seen) > MAX_FOLDERS:
            raise OSError(errno.ELOOP, f"has more than {MAX_FOLDERS:,} folders, perhaps behind a "
                          "link", os.path.join(root, folder.split("/", 1)[0]))
        with os.scandir(full_path) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    if entry.name.lower() not in SYSTEM_FOLDERS:
                        (linked if entry.is_symlink() else waiting).append(path)
                elif suffix(entry.name) in AUDIO_SUFFIXES:
                    paths.append(path)
                else:
                    ignored[suffix(entry.name)] += 1
                    if isinstance(ignored, IgnoredFiles) and suffix(path) in UNDECODABLE_SUFFIXES:
                        ignored.undecodable.append(path)
    return paths


def _with_parents(folder):
    """Identities of a folder and of all that contain it."""
    identities = set()
    while True:
        status = os.stat(folder)
        identities.add((status.st_dev, status.st_ino))
        parent = os.path.dirname(folder)
        if parent == folder:
            return identities
        folder = parent


def _is_folder(entry):
    if entry.is_symlink():
        return os.path.isdir(entry.path)  # entry.is_dir() would raise for a link to itself
    return entry.is_dir(follow_symlinks=False)


# --- a disk that is away ---

def find_outage(root: str | os.PathLike, failed: Mapping[str, str], paths: Sequence[str],
                were_there: bool = True) -> str | None:
    """Why files of a data set cannot be read, if the data are away and not the files broken.

    failed: path -> reason of files that could not be read; paths: of the whole data set; both
    relative to root.
    were_there: whether they could be read before; a missing file is then a sign, too.

    None if the data are there, so that the failed files are to blame.
    """
    problem = _access_problem(root, is_folder=True)
    if problem in OUTAGES or (problem and were_there):
        return f"{root}: {os.strerror(problem)}"
    for path, reason in failed.items():
        full_path = os.path.join(root, path)
        problem = _access_problem(full_path)
        folder = os.path.dirname(full_path)
        if problem == 0 and were_there and reason.startswith(ACCESS_REASONS):
            return f"{full_path}: {reason}, but now it is there again"
        if problem in OUTAGES and not (problem == errno.EIO and _any_readable(root, paths, path)):
            return f"{full_path}: {os.strerror(problem)}"
        if problem == errno.ENOENT and were_there:
            if _access_problem(folder, is_folder=True):
                return f"{folder}: {os.strerror(_access_problem(folder, is_folder=True))}"
            if len(paths) > 1 and not _any_readable(root, paths, path):
                return f"{root}: none of its recordings are there"
    return None


def _access_problem(path, is_folder=False):
    """The errno with which the system refuses a folder, or a file's first and last byte; 0."""
    try:
        if is_folder:
            with os.scandir(path) as entries:
                next(entries, None)
            return 0
        size = os.stat(path).st_size
        if not os.path.isfile(path):
            return 0
        handle = os.open(path, os.O_RDONLY)
        try:
            os.pread(handle, 1, 0)
            os.pread(handle, 1, max(0, size - 1))
        finally:
            os.close(handle)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _any_readable(root, paths, failed):
    """Whether any of a few other files can be read."""
    others = [path for path in paths[::max(1, len(paths) // SAMPLE)] if path != failed]
    return any(_access_problem(os.path.join(root, path)) == 0 for path in others)
