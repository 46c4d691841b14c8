"""Download a file over HTTP; a broken download continues where it stopped, also in a new run."""
import contextlib
import http.client
import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from util import SpeedLimit, write_json

from .archive import ArchiveError

TRIES = 4  # in a row without progress
PAUSE = 1.0  # seconds before the second try; doubled before each further one
TIMEOUT = 60  # seconds without a byte
LEAST_SPEED, SPEED_SECONDS = 10_000, 60.0  # bytes/s over this time, or a try is given up
PROGRESS = 10 << 20  # bytes that a try must bring to start the count of tries again


class DownloadError(Exception):
    """A download that failed; the message is the last reason."""


def download(url: str, part: Path, size: int | None, max_bytes: int, title: str,
             log: Callable[[str], None]) -> None:
    """Download all bytes of `url` to the file `part`, which may have the first ones already.

    size: the published size in bytes, if there is one. Raises DownloadError, or ArchiveError if it
    is not the expected file.
    """
    n_tries = 0
    most = size_of(part)
    while True:
        is_final = False
        try:
            if _request(url, part, size, max_bytes, title):
                return
            reason = "the connection ended too early"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # range not satisfiable: the file has changed
                discard(part)
            else:
                is_final = error.code < 500 and error.code not in (408, 429)
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
        n_tries = 1 if size_of(part) >= most + PROGRESS else n_tries + 1
        most = max(most, size_of(part))
        if is_final or n_tries >= TRIES:
            raise DownloadError(reason)
        pause = PAUSE * 2 ** (n_tries - 1)
        log(f"  {reason}; trying again in {pause:g} s")
        time.sleep(pause)


def size_of(path: Path) -> int:
    """Size in bytes, 0 if the file does not exist."""
    return path.stat().st_size if path.exists() else 0


def discard(part: Path) -> None:
    """Delete a partial download."""
    part.unlink(missing_ok=True)
    _origin_path(part).unlink(missing_ok=True)


def _origin_path(part):
    """The JSON file that says which file the bytes in `part` belong to.

    "mark" is its HTTP validator, "total" its size in bytes if known.
    """
    return part.with_name(part.name + ".json")


def _read_origin(part, url):
    """The origin of the bytes in `part`; {} if they cannot be continued from `url`."""
    with contextlib.suppress(OSError, ValueError):
        origin = dict(json.loads(_origin_path(part).read_bytes()))
        if origin.get("url") == url and origin.get("mark"):
            return origin
    return {}


def _request(url, part, size, max_bytes, title):
    """Send one request for what `part` lacks. -> whether the file is now complete.

    `part` is only continued if the server confirms that the file still has the ETag or date under
    which it was begun (RFC 9110, If-Range). Otherwise it starts again.
    """
    origin = _read_origin(part, url)
    n_bytes = size_of(part) if origin else 0
    if n_bytes and n_bytes == origin.get("total"):  # a run was killed before it unpacked the file
        return True
    headers = {"User-Agent": "warble", "Accept-Encoding": "identity"}
    if n_bytes:
        headers |= {"Range": f"bytes={n_bytes}-", "If-Range": origin["mark"]}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        mark = _validator(response.headers)
        if response.status == 206:  # partial content
            total = origin.get("total")
            last = "" if total is None else f"{total - 1}/{total}"
            expected = f"bytes {n_bytes}-{last}"
            is_expected = response.headers.get("Content-Range") == expected
            if not is_expected or mark != origin.get("mark"):
                discard(part)
                return False
        else:
            # Deleted before the new origin is written: old bytes are never taken for the beginning
            # of the new file.
            discard(part)
            n_bytes = 0
            length = response.headers.get("Content-Length")
            total = int(length) if length and length.isdecimal() else None
            if size is not None and total is not None and total != size:
                raise ArchiveError(f"{url} offers {total} bytes, but {size} are published")
            write_json(_origin_path(part), {"url": url, "mark": mark, "total": total})
        n_bytes = _append(response, url, part, n_bytes, total, max_bytes, title)
        if total is None:
            write_json(_origin_path(part), {"url": url, "mark": mark, "total": n_bytes})
    return n_bytes == (size or total or n_bytes)


def _validator(headers):
    """What a changed file would change: the strong ETag, or else the date; None if not known."""
    etag = headers.get("ETag") or ""
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


def _append(response, url, part, n_bytes, total, max_bytes, title):
    """Write the rest of the response behind the first `n_bytes`. -> bytes in `part`."""
    bar = tqdm(total=total, initial=n_bytes, desc=title, unit="B", unit_scale=True, leave=False,
               disable=not sys.stderr.isatty())
    limit = SpeedLimit(LEAST_SPEED, SPEED_SECONDS)
    with open(part, "ab" if n_bytes else "wb") as file, bar:
        while block := response.read1(1 << 20):
            file.write(block)
            limit.add(len(block))
            n_bytes += len(block)
            bar.update(len(block))
            if n_bytes > max_bytes:
                raise ArchiveError(f"{url} sends more than the {max_bytes} bytes it should have")
    return n_bytes
