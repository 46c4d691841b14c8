"""Weights by name, fetched from a hub on loopback: the real client, the real file formats, random values."""
import hashlib
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import ASTConfig as HubConfig
from transformers import ASTForAudioClassification

from conftest import ROOT
from model.pretrained import AUDIOSET

COMMIT = AUDIOSET["revision"]


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for `/<repo>/resolve/<revision>/<file>`; `server.files` maps path to bytes."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.asked.append((self.command, self.path))
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
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(names, home, endpoint, published=None):
    """`load_pretrained(AST.tiny, name)` for each name, in a process that knows only this hub and this cache
    -> what it printed for each: the report's first line and the sum of the last norm, or the refusal."""
    change = f"pretrained.AUDIOSET.update({published!r})" if published else "pass"
    code = ("from model import pretrained\nfrom model.ast import AST, ASTConfig\n" + change + "\n"
            f"for name in {names!r}:\n"
            "    net = AST(ASTConfig.tiny(4))\n"
            "    try:\n"
            "        report = pretrained.load_pretrained(net, name)\n"
            "        print(report.lines()[0], net.norm.weight.double().sum().item())\n"
            "    except pretrained.WeightsError as error:\n"
            "        print('refused', error)\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stdout
    return lines


def hub_weights(tmp_path):
    """Random weights of the tiny size in the hub's file format -> (bytes, the sum of the last norm)."""
    torch.manual_seed(1)
    net = ASTForAudioClassification(HubConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3,
                                              intermediate_size=768, num_labels=5))
    torch.nn.init.normal_(net.audio_spectrogram_transformer.layernorm.weight)
    net.save_pretrained(tmp_path)
    norm = net.audio_spectrogram_transformer.layernorm.weight.double().sum().item()
    return (tmp_path / "model.safetensors").read_bytes(), norm


def test_audioset_is_fetched_checked_and_kept(hub, tmp_path):
    data, norm = hub_weights(tmp_path)
    path = f"/{AUDIOSET['repo_id']}/resolve/{COMMIT}/{AUDIOSET['filename']}"
    hub.files[path] = data
    published = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    out, = load(["audioset"], tmp_path / "home", endpoint, published)
    assert "tensors loaded" in out and published["sha256"][:12] in out
    assert float(out.split()[-1]) == pytest.approx(norm, rel=1e-12)
    assert ("GET", path) in hub.asked and all(COMMIT in asked for _, asked in hub.asked)

    hub.asked.clear()  # the second time from the cache, now against the real file's digest
    out, = load(["audioset"], tmp_path / "home", endpoint)
    assert out.startswith("refused") and "sha256" in out and "delete it" in out
    assert not [asked for asked in hub.asked if asked[0] == "GET"]


def test_imagenet_is_fetched_through_timm(hub, tmp_path):
    torch.manual_seed(2)
    net = timm.create_model("deit_tiny_distilled_patch16_224")
    torch.nn.init.normal_(net.norm.weight)
    save_file(net.state_dict(), tmp_path / "deit.safetensors")
    hub.files[f"/{net.default_cfg['hf_hub_id']}/resolve/main/model.safetensors"] = (
        tmp_path / "deit.safetensors").read_bytes()
    out, = load(["imagenet"], tmp_path / "home", f"http://127.0.0.1:{hub.server_port}")
    assert "imagenet (deit_tiny_distilled_patch16_224)" in out, out
    assert float(out.split()[-1]) == pytest.approx(net.norm.weight.double().sum().item(), rel=1e-12)


@pytest.mark.parametrize("there", [True, False])
def test_without_the_file_or_a_network_there_is_a_mend_and_no_random_start(there, hub, tmp_path):
    port = hub.server_port
    if not there:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    names = ["audioset", "imagenet"] if there else ["audioset"]  # without a network the client tries for 25 s a file
    for name, out in zip(names, load(names, tmp_path, f"http://127.0.0.1:{port}"), strict=True):
        assert out.startswith(f"refused --weights {name}") and "cannot be fetched" in out and "--weights none" in out, out
