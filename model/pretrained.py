"""Weights from elsewhere into an AST, every tensor accounted for; never a random fallback.

Sources: the AudioSet weights by name (pinned revision and sha256), timm's distilled DeiT by name, or a
file: the authors' `.pth`, the hub's safetensors (or its folder, such as `export.py --to hf` writes), a checkpoint of
this program. `to_hub` goes the other way, by the same map of names.
"""
import hashlib
import json
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .ast import fit_positions

AUDIOSET = {
    "repo_id": "MIT/ast-finetuned-audioset-10-10-0.4593",
    "revision": "f826b80d28226b62986cc218e5cec390b1096902",
    "filename": "model.safetensors",
    "size": 346_404_948,
    "sha256": "ae0c1e2ad4e1381d851fa9bf298ba13ebc9c5a914cdee2dbe427a6583869924d",
}
IMAGENET = {  # the DeiT of each dim that the authors started from
    192: "deit_tiny_distilled_patch16_224",
    384: "deit_small_distilled_patch16_224",
    768: "deit_base_distilled_patch16_384",
}
NAMES = ("audioset", "imagenet")


class WeightsError(ValueError):
    """Weights that cannot be had or do not fit: one line that names the file, what is wrong, the mend."""


@dataclass
class LoadReport:
    """What became of every tensor of the source and of the model."""
    source: str
    sha256: str
    loaded: list = field(default_factory=list)  # model parameters taken as they are
    fitted: dict = field(default_factory=dict)  # model parameter -> how its shape was fitted
    columns: int = 0  # of the model's position grid, now the source's
    reinitialised: dict = field(default_factory=dict)  # model parameter -> why
    unused: dict = field(default_factory=dict)  # source tensor -> why
    frontend: dict | None = None  # FrontendConfig the weights were trained with, where the source says

    def lines(self):
        count = f"{len(self.loaded) + len(self.fitted)} tensors loaded"
        out = [f"weights: {self.source} (sha256 {self.sha256[:12]}), {count}"]
        for title, what in (("fitted", self.fitted), ("new", self.reinitialised), ("unused", self.unused)):
            reasons = {}
            for key, why in what.items():
                reasons.setdefault(why, []).append(key)
            for why, keys in reasons.items():
                shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
                out.append(f"  {title}: {shown} ({why})")
        return out


def load_pretrained(model, path_or_name, keep_head=False, own_reader=None):
    """Load weights into `model` (an AST) in place and return a LoadReport.

    path_or_name: "audioset", "imagenet", or a file (or hub folder). keep_head also takes the classifier,
    whose classes must then be as many as the model's. own_reader(path): reads a checkpoint of this program,
    with its checks; without it the weights are taken as they are. The model's position grid gets as many columns as that
    of another AST; an image model's is fitted to it. Raises WeightsError for anything that is missing,
    left over without a known reason, of the wrong shape, or not finite; the model is then untouched.
    """
    source, tensors, digest, frontend, hub_config = _read(model.config, str(path_or_name), own_reader)
    report = LoadReport(source, digest, columns=model.config.time_patches, frontend=frontend)
    tensors = _to_our_names(tensors, source, report)
    state = model.state_dict()
    new = {}
    _check_geometry(model.config, tensors, source, hub_config)
    for key, own in state.items():
        if key.startswith("head.") and not keep_head:
            report.reinitialised[key] = "new classes"
        elif key not in tensors:
            raise WeightsError(f"--weights {source}: no tensor for {key}; it is not a whole AST")
        else:
            new[key] = _fit(key, tensors, own, model.config, report, source)
    for key in tensors.keys() - state.keys():
        raise WeightsError(f"--weights {source}: unexpected tensor {key}; it is not an AST that this program knows")
    for key in tensors.keys() & report.reinitialised.keys():
        report.unused[key] = "the source's own classifier"
    for key, value in new.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"--weights {source}: {key} has values that are not finite; the file is damaged")
    model.set_grid(report.columns)
    model.load_state_dict(new, strict=False)
    return report


def _check_geometry(config, tensors, source, hub_config):
    """One clear line for the commonest mistake, weights of another size, before any shape error, and for what no shape
    shows."""
    depth = 1 + max((int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    dim = tensors["norm.weight"].numel() if "norm.weight" in tensors else 0
    if depth and dim and (dim, depth) != (config.dim, config.depth):
        size = {(768, 12): "base", (384, 12): "small", (192, 12): "tiny"}.get((dim, depth))
        mend = f"use --size {size}" if size else "give the --dim, --depth and --heads that the weights were made with"
        raise WeightsError(f"--weights {source}: dim {dim} and depth {depth}, but the model has dim {config.dim} "
                           f"and depth {config.depth}; {mend}")
    for theirs, ours in _HUB_CONFIG.items():
        value, own = hub_config.get(theirs, getattr(config, ours)), getattr(config, ours)
        if value not in (own, [own, own]):
            mend = f"use --heads {value}" if theirs == "num_attention_heads" and type(value) is int else "use other weights"
            raise WeightsError(f"--weights {source}: its {theirs} is {value!r:.40}, the model's is {own}; {mend}")


def _fit(key, tensors, own, config, report, source):
    value, kernel = tensors[key].float(), tensors.get("patch_embed.weight")
    image = kernel is not None and kernel.dim() == 4 and kernel.shape[1] == 3
    if key == "pos_embed" and value.dim() == 3 and value.shape != own.shape and value.shape[2] == own.shape[2]:
        patches, (rows, columns) = value.shape[1] - 2, config.grid
        side = round(max(0, patches) ** 0.5)
        if image and side * side == patches > 0:
            report.fitted[key] = f"grid {side}x{side} to {rows}x{columns}"
            return fit_positions(value, (side, side), config.grid)
        if patches > 0 and patches % rows == 0:
            report.columns = patches // rows
            report.fitted[key] = f"the weights' own grid {rows}x{report.columns}, not {rows}x{columns}; fitted to the input's length"
            return value
    if key == "patch_embed.weight" and image:
        report.fitted[key] = "RGB kernel summed to one channel"
        return value.sum(dim=1, keepdim=True)
    if value.shape != own.shape:
        hint = "; leave the head out or match the classes" if key.startswith("head.") else ""
        raise WeightsError(f"--weights {source}: {key} is {tuple(value.shape)}, the model's is {tuple(own.shape)}{hint}")
    report.loaded.append(key)
    return value


# --- where the tensors come from ---

def _read(config, name, own_reader):
    """-> (name to print, tensors by their names in the source, sha256, front end or None, what a hub folder's config says)"""
    if name == "imagenet":
        return *_imagenet(config), {}
    path, hub_config = _audioset_file() if name == "audioset" else Path(name), {}
    if path.is_dir():
        path, hub_config = path / "model.safetensors", _hub_config(path / "config.json", name)
        if not path.is_file():
            raise WeightsError(f"--weights {name}: a folder without model.safetensors; give one that export.py --to hf wrote, "
                               "or the path of a .pth, .safetensors or .pt file")
    if not path.is_file():
        raise WeightsError(f"--weights {name}: no such file; give {', '.join(NAMES)}, none, or the path of a "
                           ".pth, .safetensors or .pt file")
    tensors, frontend = _load_file(path, name, own_reader)
    if name == "audioset":
        digest = AUDIOSET["sha256"]
    else:
        digest = _sha256(path)
    return name, tensors, digest, frontend, hub_config


def _hub_config(path, name):
    """What the config.json of a hub folder says; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"--weights {name}: its config.json cannot be read ({type(error).__name__}); mend it or use other "
                           "weights") from None
    return found if isinstance(found, dict) else {}


def _load_file(path, name, own_reader):
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        if head[8:9] == b"{":  # safetensors: 8 bytes of length, then JSON
            from safetensors.torch import load_file
            return load_file(path), None
        with warnings.catch_warnings(action="ignore"):  # of TorchScript in the zip, before the error
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(f"--weights {name}: holds pickled Python objects, which are never run; convert it to "
                           ".safetensors, or save its state_dict alone") from None
    except Exception as error:  # the readers raise what they like on damaged bytes
        raise WeightsError(f"--weights {name}: cannot be read, it is damaged or of another format "
                           f"({' '.join(str(error).split())[:120]})") from None
    frontend = None
    if isinstance(state, dict) and state.get("format") == "warble":
        state = own_reader(path) if own_reader else state
        frontend, state = state.get("frontend"), state.get("ema") or state.get("model")
    elif isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) and torch.is_tensor(value)
                                                           for key, value in state.items()):
        raise WeightsError(f"--weights {name}: not a state dict; save model.state_dict() with torch.save")
    return state, frontend


def _audioset_file():
    """The pinned AudioSet file from huggingface_hub's cache, fetched where need be and checked."""
    from huggingface_hub import hf_hub_download
    url = f"https://huggingface.co/{AUDIOSET['repo_id']}/resolve/{AUDIOSET['revision']}/{AUDIOSET['filename']}"
    try:
        path = Path(hf_hub_download(AUDIOSET["repo_id"], AUDIOSET["filename"], revision=AUDIOSET["revision"]))
    except Exception as error:  # offline, refused, proxy, disk full: the mend is the same
        raise WeightsError(f"--weights audioset: the file cannot be fetched ({type(error).__name__}); download {url} "
                           "with any machine and give its path to --weights, or start from --weights none") from None
    if path.stat().st_size != AUDIOSET["size"] or _sha256(path) != AUDIOSET["sha256"]:
        raise WeightsError(f"--weights audioset: {path} is not the published file (sha256 differs); delete it and "
                           "run again")
    return path


def _imagenet(config):
    name = IMAGENET.get(config.dim)
    if name is None or config.depth != 12:
        raise WeightsError(f"--weights imagenet: there is no distilled DeiT of dim {config.dim} and depth "
                           f"{config.depth}; use --size tiny, small or base")
    import timm
    try:
        tensors = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        raise WeightsError(f"--weights imagenet: {name} cannot be fetched ({type(error).__name__}); on a machine with "
                           f"a network run `python -c \"import timm; timm.create_model('{name}', pretrained=True)\"` "
                           "and copy its cache, or start from --weights none") from None
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    return f"imagenet ({name})", tensors, digest.hexdigest(), None


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- names of the tensors ---

_HUB = "audio_spectrogram_transformer."  # before all names but the classifier's
_HUB_LAYER = {
    "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
}
_HUB_OTHER = {
    "embeddings.cls_token": "cls_token", "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.bias",
    "layernorm.weight": "norm.weight", "layernorm.bias": "norm.bias",
    "classifier.layernorm.weight": "head.0.weight", "classifier.layernorm.bias": "head.0.bias",
    "classifier.dense.weight": "head.1.weight", "classifier.dense.bias": "head.1.bias",
}
_HUB_CONFIG = {  # what no shape of a tensor shows
    "num_attention_heads": "heads", "num_mel_bins": "n_mels", "patch_size": "patch", "frequency_stride": "stride",
    "time_stride": "stride",
}


def _to_our_names(tensors, source, report):
    """Rename the tensors of any known format to this model's parameter names."""
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in tensors.items()}
    if any(key.startswith(_HUB) for key in tensors):
        return _from_hub(tensors, source)
    out = {}
    for key, value in tensors.items():
        if re.match(r"(v\.)?head(_dist)?\.(weight|bias)$", key):
            report.unused[key] = "image classifier that AST does not use"
            continue
        key = key.removeprefix("v.").replace("patch_embed.proj.", "patch_embed.").replace("mlp_head.", "head.")
        out[key] = value
    return out


def _from_hub(tensors, source):
    out, qkv = {}, {}
    for key, value in tensors.items():
        short = key.removeprefix(_HUB)
        layer = re.match(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$", short)
        if layer and (part := re.match(r"attention\.attention\.(query|key|value)$", layer[2])):
            qkv.setdefault(f"blocks.{layer[1]}.attn.qkv.{layer[3]}", {})[part[1]] = value
        elif layer and layer[2] in _HUB_LAYER:
            out[f"blocks.{layer[1]}.{_HUB_LAYER[layer[2]]}.{layer[3]}"] = value
        elif short in _HUB_OTHER:
            out[_HUB_OTHER[short]] = value
        else:
            raise WeightsError(f"--weights {source}: unexpected tensor {key}; it is not the hub's AST")
    for key, parts in qkv.items():
        if parts.keys() != {"query", "key", "value"}:
            raise WeightsError(f"--weights {source}: {key} needs query, key and value, found {sorted(parts)}")
        out[key] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return out


def to_hub(weights, config, frames):
    """The weights of an AST (by their names here) as transformers' ASTForAudioClassification has them -> (the geometry for
    its config.json, tensors by its names). Its position grid is of the one length `frames`, ours is fitted to that.

    It has one eps for all norms, here the blocks' 1e-6; in the head's, the authors' 1e-5, the difference is of the order of
    1e-5 of a logit.
    """
    layer, other = ({ours: theirs for theirs, ours in names.items()} for names in (_HUB_LAYER, _HUB_OTHER))
    tensors = {}
    for key, value in weights.items():
        block = re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)$", key)
        if key == "pos_embed":
            value = fit_positions(value, config.grid, config.patches(frames))
        if block and block[2] == "attn.qkv":
            for part, split in zip(("query", "key", "value"), value.chunk(3), strict=True):
                tensors[f"{_HUB}encoder.layer.{block[1]}.attention.attention.{part}.{block[3]}"] = split
        elif block:
            tensors[f"{_HUB}encoder.layer.{block[1]}.{layer[block[2]]}.{block[3]}"] = value
        else:
            tensors[("" if key.startswith("head.") else _HUB) + other[key]] = value
    geometry = {"hidden_size": config.dim, "num_hidden_layers": config.depth,
                "intermediate_size": int(config.dim * config.mlp_ratio), "hidden_act": "gelu", "qkv_bias": True,
                "layer_norm_eps": 1e-6, "max_length": frames,
                **{theirs: getattr(config, ours) for theirs, ours in _HUB_CONFIG.items()}}
    return geometry, {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
