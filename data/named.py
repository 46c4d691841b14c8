"""Data sets by name: downloaded once, checked and unpacked to <cache folder>/datasets/<name>.

WARBLE_DATASETS_URL names a mirror: a web folder that contains the archives under their names. An
archive that was downloaded by other means can be put into <cache folder>/datasets.
"""
import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from util import foreign_owner

from .archive import ArchiveError, check_archive, unpack
from .download import DownloadError, discard, download, size_of
from .manifest import DataError

SPACE_FACTOR = 2.5  # an archive and its content take this many times its size: audio packs badly
MAX_FACTOR = 4  # an archive that claims to unpack to this many times its size is not the data set
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Source:
    """Where a data set comes from. A size or digest that nobody publishes is None."""
    title: str
    url: str
    file: str  # name of the archive
    size: int | None  # bytes
    digest: str | None  # "sha256:..." or "md5:..."
    about: int  # bytes, roughly: for the space that is needed, and as a bound
    marker: str  # a file of the data set, by which its folder in the archive is found
    licence: str
    citation: str


SOURCES = {
    # URL, "~600 MB", licence and citation: README.md of the repository. GitHub packs the archive on
    # demand, sends no length and takes no ranges, and its bytes change: 645,695,005 and 647,224,334
    # have been seen. So neither size nor digest can be compared; the checksums within the ZIP are.
    "esc50": Source(
        title="ESC-50",
        url="https://github.com/karolpiczak/ESC-50/archive/master.zip",
        file="ESC-50-master.zip",
        size=None,
        digest=None,
        about=650_000_000,
        marker="meta/esc50.csv",
        licence="CC BY-NC 3.0; the clips of ESC-10 CC BY; authors of the clips in its file LICENSE",
        citation='K. J. Piczak, "ESC: Dataset for Environmental Sound Classification", '
                 "ACM Multimedia 2015, doi:10.1145/2733373.2806390"),
    # URL, md5 and CC BY-NC 4.0: Zenodo record 1203745, as in soundata's loader, which also has the
    # data set's own README with CC BY-NC 3.0 and the citation. Size: what several public scripts
    # compare that file with.
    "urbansound8k": Source(
        title="UrbanSound8K",
        url="https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz",
        file="UrbanSound8K.tar.gz",
        size=6_023_741_708,
        digest="md5:9aa69802bbf37fb986f71ec1483a196e",
        about=6_023_741_708,
        marker="metadata/UrbanSound8K.csv",
        licence="CC BY-NC 3.0 by its README, 4.0 by its record on Zenodo; authors of the clips in "
                "its file FREESOUNDCREDITS.txt",
        citation='J. Salamon, C. Jacoby, J. P. Bello, "A Dataset and Taxonomy for Urban Sound '
                 'Research", ACM Multimedia 2014, doi:10.1145/2647868.2655045'),
    # sha256: torchaudio 2.11, datasets/speechcommands.py, for http://download.tensorflow.org/data/,
    # which is this bucket. Size: ESPnet's recipe egs2/speechcommands (data_tar_size). Licence and
    # citation: the README.md in the archive.
    "speechcommands": Source(
        title="Speech Commands v0.02",
        url="https://storage.googleapis.com/download.tensorflow.org/data/"
            "speech_commands_v0.02.tar.gz",
        file="speech_commands_v0.02.tar.gz",
        size=2_428_923_189,
        digest="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
        about=2_428_923_189,
        marker="testing_list.txt",
        licence="CC BY 4.0",
        citation='P. Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech '
                 'Recognition", arXiv:1804.03209, 2018'),
}


def find_data(data: str | os.PathLike, cache: str | os.PathLike,
              log: Callable[[str], None] = print) -> str | os.PathLike:
    """The path that `--data` means.

    The name of a data set, in any spelling with capitals, hyphens and underscores, is its folder
    below the folder `cache`, downloaded if necessary. An existing path has priority. Anything else
    is returned as it is. Raises DataError.
    """
    name = re.sub(r"[-_ ]", "", str(data).lower())
    if name not in SOURCES:
        return data
    if os.path.exists(data):
        log(f"data: {data} exists as a path, so the data set {SOURCES[name].title} of that name is "
            "not used; to use it, rename the path or start from another folder")
        return data
    return fetch(name, cache, log)


def credit(root: str | os.PathLike) -> list[str]:
    """Lines on licence and citation, if `root` is inside the folder of a named data set."""
    for path in (Path(root), *Path(root).parents):
        if path.name in SOURCES and path.parent.name == "datasets":
            source = SOURCES[path.name]
            return [f"{source.title}: {source.licence}", f"  cite: {source.citation}"]
    return []


def fetch(name: str, cache: str | os.PathLike, log: Callable[[str], None] = print) -> Path:
    """The folder of a data set, `<cache>/datasets/<name>`, downloaded if necessary.

    The folder is complete or does not exist, even after a crash. Of two processes at once, one
    downloads and the other waits. Raises DataError.
    """
    source = SOURCES[name]
    folder = Path(os.path.abspath(cache)) / "datasets"
    home = folder / name
    owner = foreign_owner(folder.parent, folder, home)
    if owner:
        raise DataError(f"--data {name}: {owner}, who could exchange the recordings; give another "
                        f"--cache-dir, or --data {home} to use them as they are")
    if home.is_dir():
        return home
    with _explain_disk_errors(name, folder):
        folder.mkdir(parents=True, exist_ok=True)
        waiting = f"data: another run is fetching {source.title}; waiting for it"
        with _locked(folder / f".{name}.lock", lambda: log(waiting)):
            if home.is_dir():  # the other run has finished
                return home
            for leftover in folder.glob(f".{name}-*"):  # of a run that was killed in unpacking
                shutil.rmtree(leftover)
            _fetch_archive(name, source, folder, log)
    log(f"data: {source.title} is in {home}")
    return home


def _fetch_archive(name, source, folder, log):
    """Download the archive unless a person has put it into the folder, check and unpack it."""
    archive = folder / source.file
    part = folder / (source.file + ".part")
    url = _url(source)
    by_hand = f"get {url} by other means and put it at {archive}"
    is_by_hand = archive.exists()
    max_bytes = MAX_FACTOR * source.about
    try:
        if is_by_hand:
            path = archive
            _need_space(name, folder, (SPACE_FACTOR - 1) * source.about)
        else:
            path = part
            _need_space(name, folder, SPACE_FACTOR * source.about - size_of(part))
            log(f"data: fetching {source.title}, {source.about / 1e9:.2f} GB, from {url}")
            download(url, part, source.size, source.size or max_bytes, source.file, log)
        log(f"data: unpacking {path}")
        check_archive(path, source.size, source.digest)
        unpack(path, folder / name, source.marker, source.title, max_bytes)
    except DownloadError as error:
        resume = ""
        if size_of(part):
            resume = f"start again to continue after the first {size_of(part)} bytes, or "
        raise DataError(
            f"--data {name}: {url} cannot be fetched ({error}); {resume}{by_hand}") from None
    except ArchiveError as error:
        if is_by_hand:
            fix = f"replace it by the one at {url}, or remove it to have that fetched"
        else:
            fix = f"it was removed; start again, or {by_hand}"
            discard(part)
        raise DataError(f"--data {name}: {path}: {error}; {fix}") from None
    discard(part)  # also one that is left over if a person put the archive there


def _url(source):
    mirror = os.environ.get("WARBLE_DATASETS_URL")
    if not mirror:
        return source.url
    if not re.match(r"https?://", mirror):
        raise DataError(f"WARBLE_DATASETS_URL={mirror}: is not an address that begins with http:// "
                        "or https://; fix or unset it")
    return f"{mirror.rstrip('/')}/{source.file}"


@contextlib.contextmanager
def _explain_disk_errors(name, folder):
    """Turn an OSError into a DataError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DataError(f"--data {name}: {folder}: {error.strerror}; free some space or give "
                            "another --cache-dir, then start again to continue") from None
        raise DataError(f"--data {name}: {error.filename or folder}: {error.strerror or error}; "
                        f"permit writing in {folder}, or give another --cache-dir") from None


def _need_space(name, folder, needed):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"--data {name}: needs {needed / 1e9:.1f} GB in {folder}, but "
                        f"{free / 1e9:.1f} GB are free; free some space or give another "
                        "--cache-dir")


@contextlib.contextmanager
def _locked(path, on_wait):
    """Let one process in at a time, and call `on_wait` before waiting for another one.

    The lock ends with the process, however it ends.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
