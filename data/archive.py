"""Check and unpack archives from the network, which may be damaged or hostile."""
import contextlib
import errno
import hashlib
import lzma
import os
import posixpath
import shutil
import stat
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from .manifest import DataError

MAX_FILES = 1_000_000  # in an archive; Speech Commands has 105,835
# What reading a damaged archive raises, except for an OSError of the disk.
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    ArithmeticError, EOFError, LookupError, RuntimeError, ValueError, FileExistsError,
    NotADirectoryError, IsADirectoryError)
BAD_NAMES = (None, errno.ENAMETOOLONG, errno.EILSEQ)  # errno of an OSError caused by an archive


class ArchiveError(DataError):
    """An archive that is not the expected one, so that it is of no more use."""


class _Member(NamedTuple):
    name: str
    kind: str  # file, folder, link (which stays inside) or other
    size: int  # bytes, as the archive claims
    open: Callable[[], IO[bytes]]


def check_archive(path: Path, size: int | None, digest: str | None) -> None:
    """Raise ArchiveError if a file does not have the published size (bytes) and digest.

    digest: "sha256:..." or "md5:...". What is None is not compared.
    """
    actual_size = path.stat().st_size
    if size not in (None, actual_size):
        raise ArchiveError(f"has {actual_size} bytes, but {size} are published")
    if digest:
        kind, expected = digest.split(":")
        with open(path, "rb") as file:
            hasher = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False))
        if hasher.hexdigest() != expected:
            raise ArchiveError(f"has {kind} {hasher.hexdigest()}, but {expected} is published")


def unpack(path: Path, home: Path, marker: str, title: str, max_bytes: float) -> None:
    """Unpack an archive and rename the folder in it that contains the file `marker` to `home`.

    Nothing is written outside a temporary folder beside `home`. Links are skipped.

    Raises ArchiveError if the archive is damaged, has no `marker`, would unpack to more than
    `max_bytes`, or contains a path or link that leads outside, or a device.
    """
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}-") as temporary:
        top = Path(temporary) / "top"  # the temporary folder itself is closed to other users
        top.mkdir()
        try:
            _extract(path, top, max_bytes)
        except ArchiveError:
            raise
        except (*DAMAGED, OSError) as error:
            if not isinstance(error, DAMAGED) and error.errno not in BAD_NAMES:
                raise  # the disk has failed, not the archive
            reason = " ".join(str(error).split())[:120]
            raise ArchiveError(f"cannot be unpacked, it is damaged ({reason})") from None
        candidates = [top, *sorted(top.iterdir())]
        found = next((folder for folder in candidates if (folder / marker).is_file()), None)
        if found is None:
            raise ArchiveError(f"has no {marker} in it, so it is not {title}")
        os.sync()  # the files must be on the disk before the folder has its name
        os.rename(found, home)


def _extract(path, top, max_bytes):
    """Write the files and folders of an archive below `top`."""
    is_zip = path.name.removesuffix(".part").endswith(".zip")
    open_members = _zip_members if is_zip else _tar_members
    total = 0
    with open_members(path) as members:
        bar = tqdm(members, "unpacking", unit="file", leave=False, disable=not sys.stderr.isatty())
        for number, member in enumerate(bar):
            total += member.size
            if total > max_bytes or number >= MAX_FILES:
                raise ArchiveError(f"unpacks to more than {max_bytes / 1e9:.1f} GB or {MAX_FILES} "
                                 "files, far more than the data set has")
            if _leads_outside(member.name) or member.kind == "other":
                raise ArchiveError(f"contains {member.name[:120]}, which is outside its folder, a "
                                 "link that leads outside, or a device")
            target = top / member.name
            if member.kind == "folder":
                target.mkdir(parents=True, exist_ok=True)
            elif member.kind == "file":
                target.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)


def _leads_outside(name):
    return name.startswith("/") or "\0" in name or ".." in name.split("/")


def _link_leads_outside(name, target):
    """Whether a link called `name` points outside the archive's folder."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    return target.startswith("/") or path.split("/")[0] == ".."


@contextlib.contextmanager
def _zip_members(path):
    """Open a ZIP as an iterator over its members."""
    with zipfile.ZipFile(path) as archive:
        yield (_zip_member(archive, info) for info in archive.infolist())


def _zip_member(archive, info):
    kinds = {0: "file", stat.S_IFREG: "file", stat.S_IFLNK: "link"}  # 0: not packed on Unix
    file_type = stat.S_IFMT(info.external_attr >> 16)
    kind = "folder" if info.is_dir() else kinds.get(file_type, "other")
    if kind == "link":
        with archive.open(info) as file:
            target = os.fsdecode(file.read(4096))
        if _link_leads_outside(info.filename, target):
            kind = "other"
    return _Member(info.filename, kind, info.file_size, lambda: archive.open(info))


@contextlib.contextmanager
def _tar_members(path):
    """Open a tar archive, compressed or not, as an iterator over its members."""
    with tarfile.open(path) as archive:
        def members():
            for info in archive:
                yield _tar_member(archive, info)
            # Read to the end: tarfile takes a damaged header for the end, and gzip's checksum
            # comes last.
            while archive.fileobj.read(1 << 20):
                pass

        yield members()


def _tar_member(archive, info):
    kind = "other"
    if info.isdir():
        kind = "folder"
    elif info.isreg():
        kind = "file"
    elif info.issym() or info.islnk():
        base = info.name if info.issym() else ""  # hard links are relative to the archive
        kind = "other" if _link_leads_outside(base, info.linkname) else "link"
    return _Member(info.name, kind, info.size, lambda: archive.extractfile(info))
