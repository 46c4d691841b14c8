"""Weights by name, from a local server: the real client and file formats, random values."""
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import save_file
from transformers import ASTConfig as HubConfig
from transformers import ASTForAudioClassification

from model.pretrained import AUDIOSET

COMMIT = AUDIOSET["revision"]


class Hub(BaseHTTPRequestHandler):
    """Serves `/<repo>/resolve/<revision>/<file>` as the hub does, from `server.files`."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.requests.append((self.command, self.path))
        data = self.server.files.get(self.path.split("?")[0])
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", '"' + hashlib.sha256(data).hexdigest() + '"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            for start in range(0, len(data), self.server.block):
                self.wfile.write(data[start:start + self.server.block])
                time.sleep(self.server.seconds_per_block)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.requests = {}, []
    server.block, server.seconds_per_block = 1 << 20, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


LOAD = """
import time
time.sleep = lambda seconds: None  # between the client's attempts
from model import pretrained
from model.ast import AST, ASTConfig
pretrained.AUDIOSET.update({published!r})
for name in {names!r}:
    model = AST(ASTConfig.tiny(4))
    try:
        report = pretrained.load_pretrained(model, name)
        print(report.lines()[0], model.norm.weight.double().sum().item())
    except pretrained.WeightsError as error:
        print("refused", error)
"""


def load(names, home, endpoint, published=None):
    """Load the weights `names` in a process that knows only this server and this cache.

    published: entries of AUDIOSET to replace. Returns one line per name: the first line of the
    report and the sum of the last norm, or "refused" and the error.
    """
    code = LOAD.format(published=published or {}, names=names)
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith("HF_") and "proxy" not in key.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stdout
    return lines


def hub_weights(folder):
    """Random weights of the tiny size in the hub's format -> (bytes, sum of the last norm)."""
    torch.manual_seed(1)
    config = HubConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3,
                       intermediate_size=768, num_labels=5)
    model = ASTForAudioClassification(config)
    norm = model.audio_spectrogram_transformer.layernorm.weight
    torch.nn.init.normal_(norm)
    model.save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes(), norm.double().sum().item()


def test_audioset_is_downloaded_checked_and_cached(hub, tmp_path):
    data, norm = hub_weights(tmp_path)
    path = f"/{AUDIOSET['repo_id']}/resolve/{COMMIT}/{AUDIOSET['filename']}"
    hub.files[path] = data
    published = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    line, = load(["audioset"], tmp_path / "home", endpoint, published)
    assert "tensors loaded" in line and published["sha256"][:12] in line
    assert float(line.split()[-1]) == pytest.approx(norm, rel=1e-12)
    assert ("GET", path) in hub.requests and all(COMMIT in path for _, path in hub.requests)

    hub.requests.clear()  # now from the cache, and compared with the real file's digest
    line, = load(["audioset"], tmp_path / "home", endpoint)
    assert line.startswith("refused") and "sha256" in line and "delete it" in line
    assert not [path for method, path in hub.requests if method == "GET"]


def test_imagenet_is_downloaded_by_timm(hub, tmp_path):
    torch.manual_seed(2)
    model = timm.create_model("deit_tiny_distilled_patch16_224")
    torch.nn.init.normal_(model.norm.weight)
    save_file(model.state_dict(), tmp_path / "deit.safetensors")
    path = f"/{model.default_cfg['hf_hub_id']}/resolve/main/model.safetensors"
    hub.files[path] = (tmp_path / "deit.safetensors").read_bytes()
    line, = load(["imagenet"], tmp_path / "home", f"http://127.0.0.1:{hub.server_port}")
    assert "imagenet (deit_tiny_distilled_patch16_224)" in line, line
    expected = model.norm.weight.double().sum().item()
    assert float(line.split()[-1]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("online", [True, False])
def test_a_failed_download_says_how_to_fix_it_and_does_not_start_from_random(
        online, hub, tmp_path):
    port = hub.server_port
    names = ["audioset", "imagenet"]
    if not online:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    lines = load(names, tmp_path, f"http://127.0.0.1:{port}")
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"refused --weights {name}"), line
        assert "cannot be fetched" in line and "--weights none" in line, line


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_missing_network_is_found_before_the_recordings_are_read(tmp_path):
    """In a fresh process, since the client reads its settings when it is imported."""
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub"),
                   "HF_ENDPOINT": f"http://127.0.0.1:{unused_port()}", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, ROOT / "train.py", "--data", "no such folder"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --weights audioset: ")  # not: no such folder
    assert done.stderr.count("\n") == 1
    assert "python train.py --data 'no such folder' --weights none" in done.stderr


def test_control_reachable_server_is_not_reported(tmp_path, hub):
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub"),
                   "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, ROOT / "train.py", "--data", "no such folder"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2
    assert "--data" in done.stderr
    assert "--weights audioset: " not in done.stderr


TRICKLE = """
import time
from model import pretrained, weight_sources
from model.ast import AST, ASTConfig
weight_sources.LEAST_SPEED, weight_sources.SPEED_SECONDS = {least}, 1.0
started = time.monotonic()
try:
    pretrained.load_pretrained(AST(ASTConfig.tiny(4)), {name!r})
    print("loaded")
except pretrained.WeightsError as error:
    print("refused", error, flush=True)
assert time.monotonic() - started < 30
import os; os._exit(0)
"""


@pytest.mark.parametrize("name", ["audioset", "imagenet"])
@pytest.mark.parametrize("least", [10**7, 1])  # the second is the control: fast enough
def test_download_of_weights_that_trickles_is_given_up(name, least, hub, tmp_path):
    model = timm.create_model("deit_tiny_distilled_patch16_224")
    save_file(model.state_dict(), tmp_path / "deit.safetensors")
    data = (tmp_path / "deit.safetensors").read_bytes()
    hub.files[f"/{model.default_cfg['hf_hub_id']}/resolve/main/model.safetensors"] = data
    hub.files[f"/{AUDIOSET['repo_id']}/resolve/{COMMIT}/{AUDIOSET['filename']}"] = data
    hub.block, hub.seconds_per_block = len(data) // 20, 0.2
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
                   "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*",
                   "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", TRICKLE.format(name=name, least=least)], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.count("\n") == 1, done.stderr
    assert ("kB/s" in done.stdout) == (least > 1), done.stdout
    if least > 1:
        assert done.stdout.startswith(f"refused --weights {name}: ")
        assert "--weights none" in done.stdout
