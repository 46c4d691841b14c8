"""Data sets by name: fetched once, checked, unpacked to <cache folder>/datasets/<name>, then a folder like any other.

A fetch that breaks off goes on where it stopped, in the same run or in the next one. WARBLE_DATASETS_URL names a mirror:
a folder on the web that holds the archives under the names they have here. An archive that was fetched by other means is
taken from <cache folder>/datasets.
"""
import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import lzma
import os
import posixpath
import re
import shutil
import ssl
import stat
import struct
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .manifest import DataError
from .scan import write_atomic

TRIES = 4  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
TIMEOUT = 60  # seconds without a byte
NEW = 10 << 20  # bytes that a try must bring for the count of tries to start again
ROOM = 2.5  # an archive and what is in it take that many times its size: audio packs badly
SWELL = 4  # an archive whose content claims more than that many times its size is none of these
MOST = 1_000_000  # files in an archive; Speech Commands has 105,835
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, ArithmeticError, EOFError, LookupError,
           RuntimeError, ValueError, FileExistsError, NotADirectoryError, IsADirectoryError)  # what reading a bad archive raises


@dataclass(frozen=True)
class Source:
    """Where a data set comes from. What nobody publishes is None, and nothing is compared with it."""
    title: str
    url: str
    file: str  # name of the archive
    size: int | None  # bytes
    digest: str | None  # "sha256:..." or "md5:..."
    about: int  # bytes, for the room that it needs and as a bound
    marker: str  # a file that the data set has, to know it and to find its folder in the archive
    licence: str
    citation: str


SOURCES = {
    # URL, "~600 MB", licence and citation: README.md of the repository. GitHub packs the archive on demand, gives no
    # length and takes no ranges, and its bytes change: 645,695,005 and 647,224,334 have been seen. So neither size nor
    # digest can be compared; the checksums within the ZIP are.
    "esc50": Source(
        "ESC-50", "https://github.com/karolpiczak/ESC-50/archive/master.zip", "ESC-50-master.zip", None, None, 650_000_000,
        "meta/esc50.csv",
        "CC BY-NC 3.0; the clips of ESC-10 CC BY; authors of the clips in its file LICENSE",
        'K. J. Piczak, "ESC: Dataset for Environmental Sound Classification", ACM Multimedia 2015, '
        "doi:10.1145/2733373.2806390"),
    # URL, md5 and CC BY-NC 4.0: Zenodo record 1203745, as soundata's loader has them, which also has the data set's own
    # README with CC BY-NC 3.0 and the citation. Size: what several public scripts compare that file with.
    "urbansound8k": Source(
        "UrbanSound8K", "https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz", "UrbanSound8K.tar.gz", 6_023_741_708,
        "md5:9aa69802bbf37fb986f71ec1483a196e", 6_023_741_708, "metadata/UrbanSound8K.csv",
        "CC BY-NC 3.0 by its README, 4.0 by its record on Zenodo; authors of the clips in its file FREESOUNDCREDITS.txt",
        'J. Salamon, C. Jacoby, J. P. Bello, "A Dataset and Taxonomy for Urban Sound Research", ACM Multimedia 2014, '
        "doi:10.1145/2647868.2655045"),
    # sha256: torchaudio 2.11, datasets/speechcommands.py, for http://download.tensorflow.org/data/, which is this bucket.
    # Size: ESPnet's recipe egs2/speechcommands (data_tar_size). Licence and citation: the README.md in the archive.
    "speechcommands": Source(
        "Speech Commands v0.02", "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
        "speech_commands_v0.02.tar.gz", 2_428_923_189,
        "sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58", 2_428_923_189, "testing_list.txt",
        "CC BY 4.0",
        'P. Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", arXiv:1804.03209, 2018'),
}


class BadArchive(DataError):
    """An archive that is not what it should be, and is of no more use."""


def find_data(data, cache, say=print):
    """What `--data` means -> a path. One that is there is that path; the name of a data set, with or without capitals,
    hyphens and underscores, is its folder below the folder `cache`, fetched first where it is not there yet.

    `say` gets each line for the person. Raises DataError.
    """
    name = re.sub(r"[-_ ]", "", str(data).lower())
    if name not in SOURCES:
        return data
    if os.path.exists(data):
        say(f"data: {data} is there as a path, so it is not the data set {SOURCES[name].title} of that name; to have that, "
            "rename the path or start from another folder")
        return data
    return fetch(name, cache, say)


def credit(root):
    """Lines on licence and citation, if `root` is or lies in the folder of a named data set."""
    for path in (Path(root), *Path(root).parents):
        if path.name in SOURCES and path.parent.name == "datasets":
            source = SOURCES[path.name]
            return [f"{source.title}: {source.licence}", f"  cite: {source.citation}"]
    return []


def fetch(name, cache, say=print):
    """The folder of the data set, `<cache>/datasets/<name>`; whole or not there, whatever happens in between.

    Of two processes at once one fetches and the other waits. Raises DataError.
    """
    source, folder = SOURCES[name], Path(os.path.abspath(cache)) / "datasets"
    home, archive, part = folder / name, folder / source.file, folder / (source.file + ".part")
    if home.is_dir():
        return home
    with _on_disk(name, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{name}.lock", lambda: say(f"data: another run is fetching {source.title}; waiting for it")):
            if home.is_dir():
                return home
            for left in folder.glob(f".{name}-*"):  # by a run that was killed while it unpacked
                shutil.rmtree(left)
            own = not archive.exists()  # not put there by a person
            url = _url(source)
            by_hand = f"get {url} by other means and put it at {archive}"
            try:
                if own:
                    archive = part
                    _need_room(name, folder, ROOM * source.about - _size(part))
                    say(f"data: fetching {source.title}, {source.about / 1e9:.2f} GB, from {url}")
                    _download(name, source, url, part, by_hand, say)
                else:
                    _need_room(name, folder, (ROOM - 1) * source.about)
                say(f"data: unpacking {archive}")
                _compare(source, archive)
                _unpack(source, archive, home)
            except BadArchive as error:
                if own:
                    _discard(part)
                raise DataError(f"--data {name}: {archive}: {error}; " + (
                    f"it was removed; start again, or {by_hand}" if own else f"replace it by the one at {url}, or remove it "
                    "to have that fetched")) from None
            _discard(part)  # also one that a person's archive came before
    say(f"data: {source.title} is in {home}")
    return home


def _url(source):
    mirror = os.environ.get("WARBLE_DATASETS_URL")
    if not mirror:
        return source.url
    if not re.match(r"https?://", mirror):
        raise DataError(f"WARBLE_DATASETS_URL={mirror}: is no address that begins with http:// or https://; mend or unset it")
    return f"{mirror.rstrip('/')}/{source.file}"


# ---- on the disk

@contextlib.contextmanager
def _on_disk(name, folder):
    """An error of the disk as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DataError(f"--data {name}: {folder}: {error.strerror}, nothing fits any more; free some space or give "
                            "another --cache-dir, then start again: what was fetched is kept") from None
        raise DataError(f"--data {name}: {error.filename or folder}: {error.strerror or error}; permit writing in {folder}, or "
                        "give another --cache-dir") from None


def _need_room(name, folder, needed):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"--data {name}: needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; free some "
                        "space or give another --cache-dir")


@contextlib.contextmanager
def _locked(path, wait):
    """For one process at a time; the lock goes with the process, however it ends. `wait` is called before waiting."""
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _notes(part):
    """Where it is noted of what the bytes in `part` are the beginning."""
    return part.with_name(part.name + ".json")


def _discard(part):
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


# ---- from the network

def _download(name, source, url, part, by_hand, say):
    """All bytes of `url` in the file `part`, going on where an earlier try ended. Raises DataError."""
    tries, most = 0, _size(part)
    while True:
        try:
            if _receive(source, url, part):
                return
            reason = "the connection ended too early"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # there are not so many bytes: it is another file now
                _discard(part)
            elif error.code < 500 and error.code not in (408, 429):
                tries = TRIES
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
        tries = 1 if _size(part) >= most + NEW else tries + 1
        most = max(most, _size(part))
        if tries >= TRIES:
            kept = f"start again to go on after the {_size(part)} bytes that are kept, or " if _size(part) else ""
            raise DataError(f"--data {name}: {url} cannot be fetched ({reason}); {kept}{by_hand}")
        pause = PAUSE * 2 ** (tries - 1)
        say(f"  {reason}; again in {pause:g} s")
        time.sleep(pause)


def _receive(source, url, part):
    """One request, for what `part` lacks -> whether the file is whole now.

    `part` is only continued where the server says that the file still has the ETag, or else the date, under which it was
    begun (RFC 9110, If-Range); otherwise it is begun anew. Raises BadArchive for a file that cannot be the right one.
    """
    have, known = _size(part), {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(json.loads(_notes(part).read_bytes()))
    if known.get("url") != url or not known.get("mark"):
        have = 0
    if have and have == known.get("total"):  # a run that was killed before it had unpacked it
        return True
    request = urllib.request.Request(url, headers={"User-Agent": "warble", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known["mark"])
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        etag, length = response.headers.get("ETag") or "", response.headers.get("Content-Length")
        mark = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        if response.status == 206:
            total = known.get("total")
            last = "" if total is None else f"{total - 1}/{total}"
            if (response.headers.get("Content-Range"), mark) != (f"bytes {have}-{last}", known.get("mark")):
                _discard(part)
                return False
        else:
            _discard(part)  # before the new notes: old bytes are never taken for the beginning of the new file
            have, total = 0, int(length) if length and length.isdecimal() else None
            if None not in (source.size, total) and total != source.size:
                raise BadArchive(f"{url} offers {total} bytes, where {source.size} are published")
            write_atomic(_notes(part), json.dumps({"url": url, "mark": mark, "total": total}).encode())
        limit = source.size or SWELL * source.about
        with open(part, "ab" if have else "wb") as file, tqdm(
                total=total, initial=have, desc=source.file, unit="B", unit_scale=True, leave=False,
                disable=not sys.stderr.isatty()) as bar:
            while block := response.read1(1 << 20):
                file.write(block)
                have += len(block)
                bar.update(len(block))
                if have > limit:
                    raise BadArchive(f"{url} gives more than the {limit} bytes that there may be")
        if total is None:
            write_atomic(_notes(part), json.dumps({"url": url, "mark": mark, "total": have}).encode())
    return have == (source.size or total or have)


# ---- the archive

def _compare(source, path):
    """Raises BadArchive where the file has not the size or the digest that are published."""
    if source.size not in (None, _size(path)):
        raise BadArchive(f"has {_size(path)} bytes, where {source.size} are published")
    if source.digest:
        kind, wanted = source.digest.split(":")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
        if found != wanted:
            raise BadArchive(f"has {kind} {found}, where {wanted} is published")


def _unpack(source, path, home):
    """Unpack into a folder beside and give that, or the folder in it that holds the data set, the name `home`.

    Nothing is written outside, no link and no device is made, and not more than SWELL times the expected size. Raises
    BadArchive for an archive that asks for it, is damaged, or is of something else.
    """
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}-") as temporary:
        top = Path(temporary) / "top"  # a folder of its own: the temporary one is closed to other users
        top.mkdir()
        claimed = 0
        try:
            with (_zip_members if source.file.endswith(".zip") else _tar_members)(path) as members:
                for number, (name, kind, size, read) in enumerate(tqdm(
                        members, "unpacking", unit="file", leave=False, disable=not sys.stderr.isatty())):
                    claimed += size
                    if claimed > SWELL * source.about or number >= MOST:
                        raise BadArchive(f"unpacks to more than {SWELL * source.about / 1e9:.1f} GB or {MOST} files, far more "
                                         "than the data set has")
                    if name.startswith("/") or "\0" in name or ".." in name.split("/") or kind == "other":
                        raise BadArchive(f"has {name[:120]} in it, which lies outside of its folder, is a link out of it or a "
                                         "device")
                    if kind == "folder":
                        (top / name).mkdir(parents=True, exist_ok=True)
                    elif kind == "file":
                        (top / name).parent.mkdir(parents=True, exist_ok=True)
                        with read() as member, open(top / name, "wb") as file:
                            shutil.copyfileobj(member, file, 1 << 20)
        except BadArchive:
            raise
        except (*DAMAGED, OSError) as error:
            if not isinstance(error, DAMAGED) and error.errno not in (None, errno.ENAMETOOLONG, errno.EILSEQ):  # of the disk
                raise
            raise BadArchive(f"cannot be unpacked, it is damaged ({' '.join(str(error).split())[:120]})") from None
        inside = [folder for folder in (top, *sorted(top.iterdir())) if (folder / source.marker).is_file()]
        if not inside:
            raise BadArchive(f"has no {source.marker} in it, so it is not {source.title}")
        os.sync()  # the files are on the disk before the name says so
        os.rename(inside[0], home)


def _leaves(name, target):
    """Whether a link called `name` to `target` leads out of the archive's folder."""
    return target.startswith("/") or posixpath.normpath(posixpath.join(posixpath.dirname(name), target)).split("/")[0] == ".."


@contextlib.contextmanager
def _zip_members(path):
    """An iterator over (name, kind, bytes, function that opens it); kind: file, folder, link or other."""
    with zipfile.ZipFile(path) as archive:
        def members():
            for info in archive.infolist():
                form = stat.S_IFMT(info.external_attr >> 16)  # 0 where it was not packed on Unix
                kind = "folder" if info.is_dir() else {0: "file", stat.S_IFREG: "file", stat.S_IFLNK: "link"}.get(form, "other")
                if kind == "link":
                    with archive.open(info) as text:
                        kind = "other" if _leaves(info.filename, os.fsdecode(text.read(4096))) else kind
                yield info.filename, kind, info.file_size, lambda info=info: archive.open(info)
        yield members()


@contextlib.contextmanager
def _tar_members(path):
    """The same of a tar archive, packed or not."""
    with tarfile.open(path) as archive:
        def members():
            for info in archive:
                kind = "folder" if info.isdir() else "file" if info.isreg() else "other"
                if (info.issym() or info.islnk()) and not _leaves(info.name if info.issym() else "", info.linkname):
                    kind = "link"
                yield info.name, kind, info.size, lambda info=info: archive.extractfile(info)
            while archive.fileobj.read(1 << 20):  # tarfile takes a damaged header for the end, and gzip's checksum comes last
                pass
        yield members()
