"""Find and read pretrained weights: by name, downloaded if necessary, or from a file."""
import contextlib
import hashlib
import json
import os
import pickle
import socket
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util import InputError, SpeedLimit, read_regular, sha256_of

from .frontend import FrontendConfig

AUDIOSET = {
    "repo_id": "MIT/ast-finetuned-audioset-10-10-0.4593",
    "revision": "f826b80d28226b62986cc218e5cec390b1096902",
    "filename": "model.safetensors",
    "size": 346_404_948,
    "sha256": "ae0c1e2ad4e1381d851fa9bf298ba13ebc9c5a914cdee2dbe427a6583869924d",
}
IMAGENET = {  # the DeiT of each dim that the AST authors started from
    192: "deit_tiny_distilled_patch16_224",
    384: "deit_small_distilled_patch16_224",
    768: "deit_base_distilled_patch16_384",
}
NAMES = ("audioset", "imagenet")
LEAST_SPEED, SPEED_SECONDS = 10_000, 60.0  # bytes/s over this time, or a download is given up


class WeightsError(InputError):
    """Weights that cannot be loaded: one line with the source, the problem and how to fix it."""


@dataclass
class WeightsSource:
    """Weights as they were read."""
    name: str  # for messages
    tensors: dict[str, Tensor]  # by the source's own names
    sha256: str
    frontend: Any = None  # FrontendConfig of their training as a dict, None if unknown
    classes: Any = None  # names of the rows of the classifier, of a checkpoint of this program
    hub_config: dict = field(default_factory=dict)  # the config.json of a hub folder


# --- find the source ---

def check_available(path_or_name: str, fallback: str) -> None:
    """Raise WeightsError at once if the weights cannot be had: a missing file, or no network.

    Call it before anything that takes long. The hub's own client would try for half a minute.
    fallback: a command that works without the weights, for the message.
    """
    if path_or_name == "audioset":
        from huggingface_hub import constants, try_to_load_from_cache
        cached = try_to_load_from_cache(AUDIOSET["repo_id"], AUDIOSET["filename"],
                                        revision=AUDIOSET["revision"])
        is_cached = isinstance(cached, str)
        if not is_cached and (constants.HF_HUB_OFFLINE or not _is_reachable(constants.ENDPOINT)):
            raise WeightsError(
                f"--weights audioset: {constants.ENDPOINT} cannot be reached; download {_url()} "
                "with any machine and give its path to --weights, or start without pretrained "
                f"weights:  {fallback}")
    elif path_or_name not in ("imagenet", "none") and not os.path.exists(path_or_name):
        raise WeightsError(f"--weights {path_or_name}: no such file; give {', '.join(NAMES)}, "
                           "none, or the path of a .pth, .safetensors or .pt file")


def _is_reachable(endpoint, seconds=4):
    """Whether a connection to a server opens; True if a proxy decides that."""
    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(endpoint)
    port = url.port or (443 if url.scheme == "https" else 80)
    is_open = []

    def connect():
        with contextlib.suppress(OSError):
            socket.create_connection((url.hostname, port), timeout=seconds).close()
            is_open.append(True)

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(is_open)


def _url():
    return (f"https://huggingface.co/{AUDIOSET['repo_id']}/resolve/{AUDIOSET['revision']}/"
            f"{AUDIOSET['filename']}")


# --- read the source ---

def read_weights(config, name: str, own_reader: Callable[[Path], dict] | None) -> WeightsSource:
    """Read the weights of a name or path, see `pretrained.load_pretrained`. Raises WeightsError.

    config: the ASTConfig of the model.
    """
    if name == "imagenet":
        return _imagenet(config)
    path = _audioset_file() if name == "audioset" else Path(name)
    hub_config = {}
    if path.is_dir():
        hub_config = _hub_config(path / "config.json", name)
        path = path / "model.safetensors"
        if not path.is_file():
            raise WeightsError(f"--weights {name}: a folder without model.safetensors; give one "
                               "that export.py --to hf wrote, or the path of a .pth, .safetensors "
                               "or .pt file")
    if not path.is_file():
        raise WeightsError(f"--weights {name}: no such file; give {', '.join(NAMES)}, none, or the "
                           "path of a .pth, .safetensors or .pt file")
    tensors, frontend, classes = _load_file(path, name, own_reader)
    digest = AUDIOSET["sha256"] if name == "audioset" else sha256_of(path)
    if digest == AUDIOSET["sha256"]:
        frontend = FrontendConfig.of("fbank").to_dict()
    return WeightsSource(name, tensors, digest, frontend, classes, hub_config)


def _hub_config(path, name):
    """The content of a hub folder's config.json, {} if there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"--weights {name}: its config.json cannot be read "
                           f"({type(error).__name__}); repair it or use other weights") from None
    return config if isinstance(config, dict) else {}


def _load_file(path, name, own_reader):
    """-> (tensors by their names, fields of the FrontendConfig or None, classes or None)"""
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[8:9] == b"{":  # safetensors: 8 bytes of length, then JSON
            from safetensors.torch import load_file
            return load_file(path), None, None
        with warnings.catch_warnings(action="ignore"):  # a TorchScript archive warns, then fails
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(f"--weights {name}: contains pickled Python objects, which are never "
                           "run; convert it to .safetensors or save its state_dict alone") from None
    except Exception as error:  # the readers raise many types for damaged files
        reason = " ".join(str(error).split())[:120]
        raise WeightsError(f"--weights {name}: cannot be read, it is damaged or of another format "
                           f"({reason})") from None
    frontend = classes = None
    if isinstance(state, dict) and state.get("format") == "warble":
        if own_reader:
            state = own_reader(path)
        frontend, classes = state.get("frontend"), state.get("classes")
        state = state.get("ema") or state.get("model")
    elif isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not _is_state_dict(state):
        raise WeightsError(f"--weights {name}: not a state dict; save model.state_dict() with "
                           "torch.save")
    return state, frontend, classes


def _is_state_dict(state):
    if not isinstance(state, dict) or not state:
        return False
    return all(isinstance(key, str) and torch.is_tensor(value) for key, value in state.items())


def _audioset_file():
    """Path of the pinned AudioSet file, checked. It is downloaded if it is not cached."""
    from huggingface_hub import hf_hub_download
    repo, revision, filename = AUDIOSET["repo_id"], AUDIOSET["revision"], AUDIOSET["filename"]
    try:
        path = Path(_fetch(lambda: hf_hub_download(repo, filename, revision=revision)))
    except Exception as error:  # offline, refused, proxy, disk full: the fix is the same
        raise WeightsError(f"--weights audioset: the file cannot be fetched "
                           f"({_reason(error)}); download {_url()} with any machine and give "
                           "its path to --weights, or start from --weights none") from None
    if path.stat().st_size != AUDIOSET["size"] or sha256_of(path) != AUDIOSET["sha256"]:
        raise WeightsError(f"--weights audioset: {path} is not the published file (sha256 "
                           "differs); delete it and run again")
    return path


def _reason(error):
    return str(error) if isinstance(error, TimeoutError) else type(error).__name__


def _fetch(download: Callable[[], Any]) -> Any:
    """download()'s result. Raises TimeoutError if the hub's client gets almost no bytes.

    The client has no such limit. What it has fetched is seen on the disk, so it has to write small
    pieces, and over HTTP: the hub's other protocol keeps bytes in memory.
    """
    from huggingface_hub import constants
    result = []

    def run():
        try:
            result.append((download(), None))
        except Exception as error:
            result.append((None, error))

    before = _unfinished_files(constants)
    settings = constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET
    constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = 1 << 16, True
    try:
        thread = threading.Thread(target=run, daemon=True)  # left behind if it is too slow
        thread.start()
        limit, n_bytes = None, 0
        while thread.is_alive():
            thread.join(min(1.0, SPEED_SECONDS / 4))
            growing = [size for path, size in _unfinished_files(constants).items()
                       if size != before.get(path)]
            if limit is None or not growing or not thread.is_alive():
                limit = SpeedLimit(LEAST_SPEED, SPEED_SECONDS) if growing else None
            else:
                limit.add(abs(sum(growing) - n_bytes))  # fewer after a file is complete
            n_bytes = sum(growing)
    finally:
        constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = settings
    value, error = result[0]
    if error is not None:
        raise error
    return value


def _unfinished_files(constants):
    """{path: bytes} of the files that the hub's client has begun to download."""
    sizes = {}
    for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*.incomplete"):
        with contextlib.suppress(OSError):
            sizes[path] = path.stat().st_size
    return sizes


def _imagenet(config):
    name = IMAGENET.get(config.dim)
    if name is None or config.depth != 12:
        raise WeightsError(f"--weights imagenet: there is no distilled DeiT of dim {config.dim} "
                           f"and depth {config.depth}; use --size tiny, small or base")
    import timm
    try:
        tensors = _fetch(lambda: timm.create_model(name, pretrained=True)).state_dict()
    except Exception as error:
        command = f"import timm; timm.create_model('{name}', pretrained=True)"
        raise WeightsError(f"--weights imagenet: {name} cannot be fetched "
                           f"({_reason(error)}); on a machine with a network run "
                           f"`python -c \"{command}\"` and copy its cache, or start from "
                           "--weights none") from None
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    return WeightsSource(f"imagenet ({name})", tensors, digest.hexdigest())
