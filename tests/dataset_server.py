"""A server on loopback for data sets, and small archives in the layouts of the real ones."""
import contextlib
import hashlib
import io
import re
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile as sf
from conftest import tone

from data import download, named
from data.manifest import DataError
from data.named import SOURCES, fetch

FILES = {name: source.file for name, source in SOURCES.items()}
TOPS = {"esc50": "ESC-50-master/", "urbansound8k": "UrbanSound8K/", "speechcommands": "./"}


class Handler(BaseHTTPRequestHandler):
    """Serves `server.data` under every path, and appends (Range or None, status) to `requests`."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        status = server.statuses.pop(0) if server.statuses else 200
        body, total, headers = server.data, len(server.data), {}
        is_current = self.headers.get("If-Range") == server.etag
        if status == 200 and wanted and server.ranges and (is_current or server.ignores_if_range):
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            status = 206 if first < total else 416
            body = body[first:]
            headers["Content-Range"] = f"bytes */{total}"
            if status == 206:
                headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}"
        if status not in (200, 206):
            body = b""
        if server.etag:
            headers["ETag"] = server.etag
        if server.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            excess = server.excess_length if status == 200 else 0
            headers["Content-Length"] = str(len(body) + excess)
        server.requests.append((wanted, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        self.send_body(body)

    def send_body(self, body):
        server = self.server
        stop = server.breaks.pop(0) if server.breaks else None  # bytes before the connection ends
        if stop is not None:
            body = body[:stop]
        elif server.excess_length < 0:
            body = body[:server.excess_length]
        with contextlib.suppress(ConnectionError):  # the client may have seen enough
            for start in range(0, len(body), 4096):
                block = body[start:start + 4096]
                if server.chunked:
                    block = b"%x\r\n%b\r\n" % (len(block), block)
                self.wfile.write(block)
                time.sleep(server.seconds_per_block)
            if server.chunked and stop is None:
                self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()
        if stop is not None:
            server.has_stopped.set()
            server.may_disconnect.wait(30)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running_server(monkeypatch):
    """Start a server and make it the mirror of all data sets."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.statuses = []  # of the next answers
    server.breaks = []  # the bytes after which the next answers break off
    server.ranges = True
    server.ignores_if_range = False
    server.chunked = False
    server.excess_length = 0  # of the Content-Length
    server.etag = '"one"'
    server.seconds_per_block = 0
    server.has_stopped, server.may_disconnect = threading.Event(), threading.Event()
    server.may_disconnect.set()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("WARBLE_DATASETS_URL", f"http://127.0.0.1:{server.server_port}/mirror/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    try:
        yield server
    finally:
        server.may_disconnect.set()
        server.shutdown()
        server.server_close()


def publish(server, monkeypatch, name, files=None, **changes):
    """Serve a small archive and make its size and digest the published ones. -> {path: bytes}.

    files: {path in the archive: bytes or a member}. changes: other fields of the Source.
    """
    files = MAKERS[name]() if files is None else files
    server.data = pack(files, "zip" if name == "esc50" else "tar.gz")
    if name != "esc50":
        kind = SOURCES[name].digest.split(":")[0]
        digest = f"{kind}:{hashlib.new(kind, server.data).hexdigest()}"
        changes = {"size": len(server.data), "digest": digest, **changes}
    monkeypatch.setitem(named.SOURCES, name, replace(SOURCES[name], **changes))
    return {path.removeprefix(TOPS[name]): content for path, content in files.items()}


# ---- archives

def wav_bytes(hz, seconds=1.0, seed=0):
    out = io.BytesIO()
    sf.write(out, tone(seconds, hz=hz, seed=seed), 16000, format="WAV", subtype="PCM_16")
    return out.getvalue()


def make_esc50():
    files = {"README.md": b"ESC-50", "LICENSE": b"authors"}
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for i in range(20):
        fold, target = 1 + i % 2, i // 2 % 2
        label, hz = [("dog", 300), ("rain", 3000)][target]
        name = f"{fold}-{100 + i}-A-{target}.wav"
        files[f"audio/{name}"] = wav_bytes(hz, seed=i)
        lines.append(f"{name},{fold},{target},{label},False,{100 + i},A")
    files["meta/esc50.csv"] = "\n".join(lines).encode()
    return {f"ESC-50-master/{path}": content for path, content in files.items()}


def make_urbansound8k():
    files = {"audio/.DS_Store": b"x", "FREESOUNDCREDITS.txt": b"authors"}
    lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for i in range(6):
        name, fold, label = f"{100 + i}-{i % 2}-0-0.wav", 1 + i // 2, i % 2
        files[f"audio/fold{fold}/{name}"] = wav_bytes(300 + i)
        class_name = ["air_conditioner", "car_horn"][label]
        lines.append(f"{name},{100 + i},3.0,4.0,1,{fold},{label},{class_name}")
    files["metadata/UrbanSound8K.csv"] = "\n".join(lines).encode()
    return {f"UrbanSound8K/{path}": content for path, content in files.items()}


def make_speechcommands():
    files = {"_background_noise_/pink_noise.wav": wav_bytes(50, 3.0),
             "_background_noise_/README.md": b"noise", "LICENSE": b"CC BY 4.0"}
    lists = {"testing": [], "validation": []}
    for word, hz in (("yes", 400), ("no", 2500)):
        for speaker in range(12):
            for take in range(2):
                path = f"{word}/{0xab0000 + speaker:08x}_nohash_{take}.wav"
                files[path] = wav_bytes(hz + 5 * speaker, seed=2 * speaker + take)
                if speaker % 4 == 0:
                    lists["testing"].append(path)
                elif speaker % 4 == 1:
                    lists["validation"].append(path)
    for split, paths in lists.items():
        files[f"{split}_list.txt"] = "".join(f"{path}\n" for path in paths).encode()
    return {f"./{path}": content for path, content in files.items()}


MAKERS = {"esc50": make_esc50, "urbansound8k": make_urbansound8k,
          "speechcommands": make_speechcommands}


def pack(files, kind):
    """Bytes of a ZIP or tar.gz of {name: bytes or a prepared member}."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                member = (name, content) if isinstance(content, bytes) else content
                archive.writestr(*member)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            if isinstance(content, bytes):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                archive.addfile(content)
    return out.getvalue()


# ---- views of the result

def fetch_quietly(name, cache):
    return fetch(name, cache, log=lambda line: None)


def read_tree(folder):
    """{relative path: bytes} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


def names_in_cache(cache):
    """What is in the folder of data sets, except for locks."""
    return sorted(path.name for path in (cache / "datasets").iterdir()
                  if not path.name.endswith(".lock"))


def assert_not_fetched(name, cache, *parts):
    """`fetch` raises a DataError of one printable line with these parts. -> the message."""
    with pytest.raises(DataError) as caught:
        fetch_quietly(name, cache)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(f"--data {name}: "), message
    assert all(part in message for part in parts), message
    assert not (cache / "datasets" / name).exists()
    return message
