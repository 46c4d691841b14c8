"""Load pretrained weights into an AST. Every tensor is accounted for; none is silently random.

Sources: the AudioSet weights by name (pinned revision and SHA-256), timm's distilled DeiT by name,
or a file: the AST authors' `.pth`, the Hugging Face hub's safetensors (or a folder with them, as
`export.py --to hf` writes it), or a checkpoint of this program. `to_hub` converts the other way.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from util import summarize

from .ast import AST, N_EXTRA_TOKENS, ASTConfig, fit_positions
from .frontend import FrontendConfig
from .weight_sources import (
    AUDIOSET,
    IMAGENET,
    NAMES,
    WeightsError,
    check_available,
    read_weights,
)

__all__ = ["AUDIOSET", "IMAGENET", "NAMES", "SIZES", "LoadReport", "WeightsError",
           "check_available", "load_pretrained", "to_hub"]
SIZES = {(768, 12): "base", (384, 12): "small", (192, 12): "tiny"}  # by (dim, depth)


@dataclass
class LoadReport:
    """What happened to every tensor of the source and of the model."""
    source: str
    sha256: str
    columns: int  # of the model's position parameter, after loading
    loaded: list[str] = field(default_factory=list)  # model parameters taken unchanged
    fitted: dict[str, str] = field(default_factory=dict)  # model parameter -> how it was changed
    reinitialised: dict[str, str] = field(default_factory=dict)  # model parameter -> why
    unused: dict[str, str] = field(default_factory=dict)  # source tensor -> why
    frontend_change: str = ""  # how the model's front end differs from the source's, if known

    def lines(self) -> list[str]:
        """The report in words, one line per source and reason."""
        n_loaded = len(self.loaded) + len(self.fitted)
        lines = [f"weights: {self.source} (sha256 {self.sha256[:12]}), {n_loaded} tensors loaded"]
        parts = {"fitted": self.fitted, "new": self.reinitialised, "unused": self.unused}
        for title, reasons in parts.items():
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                lines.append(f"  {title}: {summarize(names, most=3)} ({reason})")
        if self.frontend_change:
            lines.append(f"  front end: not the one of the weights: {self.frontend_change}")
        return lines


def load_pretrained(model: AST, path_or_name: str | Path, keep_head: bool = False,
                    own_reader: Callable[[Path], dict] | None = None,
                    frontend: FrontendConfig | None = None,
                    classes: Sequence[str] = ()) -> LoadReport:
    """Load weights into `model` in place.

    path_or_name: "audioset", "imagenet", a file, or a hub folder.
    keep_head: load the classifier, too. It must have as many classes as the model.
    own_reader: reads and checks a checkpoint of this program. Default: no checks.
    classes: the model's. If the weights are a checkpoint of this program, the rows of its
        classifier for classes of the same name are taken; the other rows stay as they are.
    frontend: the model's front end. The report says how it differs from the weights' one, if known.

    The model's position parameter takes the grid of another AST; an image model's grid is fitted
    to it. Raises WeightsError if a tensor is missing, unexpected, of the wrong shape or not finite;
    the model is then unchanged.
    """
    source = read_weights(model.config, str(path_or_name), own_reader)
    report = LoadReport(source.name, source.sha256, columns=model.config.time_patches)
    if frontend is not None:
        report.frontend_change = _frontend_change(source.frontend, frontend)
    tensors = _to_our_names(source, report)
    _check_geometry(model.config, tensors, source)
    state = model.state_dict()
    new = {}
    for key, own in state.items():
        if key.startswith("head.") and not keep_head:
            value = _known_rows(key, own, tensors.get(key), source, classes, report)
            if value is not None:
                new[key] = value
        elif key not in tensors:
            raise WeightsError(f"--weights {source.name}: no tensor for {key}; it is not a whole "
                               "AST")
        else:
            new[key] = _fit(key, tensors, own, model.config, report)
    for key in tensors:
        if key not in state:
            raise WeightsError(f"--weights {source.name}: unexpected tensor {key}; use the weights "
                               "of an AST")
        if key in report.reinitialised:
            report.unused[key] = "the source's own classifier"
    for key, value in new.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"--weights {source.name}: {key} has values that are not finite; "
                               "the file is damaged, use another copy")
    model.set_grid(report.columns)
    model.load_state_dict(new, strict=False)
    return report


def _known_rows(key, own, theirs, source, classes, report):
    """The value of a parameter of the classifier with the rows of classes that the weights know.

    None if they know none: the classifier then starts anew. Notes in the report what it did.
    """
    rows = {}
    if isinstance(source.classes, list) and theirs is not None:
        rows = {row: source.classes.index(name) for row, name in enumerate(classes)
                if name in source.classes}
    if not rows:
        report.reinitialised[key] = "new classes"
        return None
    is_linear = key.startswith("head.1.")  # one row per class; head.0 is a norm
    n_rows = len(source.classes) if is_linear else len(own)
    if theirs.shape != (n_rows, *own.shape[1:]):
        raise WeightsError(f"--weights {source.name}: {key} is {tuple(theirs.shape)}, which does "
                           f"not fit its {len(source.classes)} classes; use another copy")
    if not is_linear:
        report.loaded.append(key)
        return theirs.float()
    value = own.detach().clone()
    value[list(rows)] = theirs[list(rows.values())].to(value)
    report.fitted[key] = (f"{len(rows)} of {len(classes)} classes have the weights' own rows, by "
                          "name; the others start anew")
    return value


def _frontend_change(theirs, own):
    """"kind fbank, now logmel; ..." for the settings that differ; "" if none or unknown."""
    changes = {}
    for name, value in own.to_dict().items():
        before = theirs.get(name) if isinstance(theirs, dict) else None
        if isinstance(before, str | int | float) and before != value:
            changes[name] = f"{name} {before!s:.20}, now {value}"
    if "kind" in changes:  # the rest follows from it
        changes = {name: changes[name] for name in ("kind", "sample_rate") if name in changes}
    return "; ".join(changes.values())


def _check_geometry(config, tensors, source):
    """Explain the commonest mistake, weights of another size, and find what no shape shows."""
    blocks = [int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))]
    if blocks and "norm.weight" in tensors:
        dim, depth = tensors["norm.weight"].numel(), 1 + max(blocks)
        if dim and (dim, depth) != (config.dim, config.depth):
            fix = "give the --dim, --depth and --heads that the weights were made with"
            if (dim, depth) in SIZES:
                fix = f"use --size {SIZES[dim, depth]}"
            raise WeightsError(f"--weights {source.name}: dim {dim} and depth {depth}, but the "
                               f"model has dim {config.dim} and depth {config.depth}; {fix}")
    for theirs, ours in _HUB_CONFIG.items():
        own = getattr(config, ours)
        value = source.hub_config.get(theirs, own)
        if value not in (own, [own, own]):
            fix = "use other weights"
            if theirs == "num_attention_heads" and type(value) is int:
                fix = f"use --heads {value}"
            raise WeightsError(f"--weights {source.name}: its {theirs} is {value!r:.40}, the "
                               f"model's is {own}; {fix}")


def _fit(key, tensors, own, config, report):
    """The source's value for the parameter `key`, now `own`. Notes in the report what it did."""
    value, kernel = tensors[key].float(), tensors.get("patch_embed.weight")
    is_image = kernel is not None and kernel.dim() == 4 and kernel.shape[1] == 3
    if key == "pos_embed" and value.dim() == 3 and value.shape[2] == own.shape[2]:
        n_patches, (rows, columns) = value.shape[1] - N_EXTRA_TOKENS, config.grid
        side = round(max(0, n_patches) ** 0.5)
        if value.shape == own.shape or n_patches <= 0:
            pass  # taken unchanged, or refused for its shape, below
        elif is_image and side * side == n_patches:
            report.fitted[key] = f"grid {side}x{side} to {rows}x{columns}"
            return fit_positions(value, (side, side), config.grid)
        elif n_patches % rows == 0:
            report.columns = n_patches // rows
            report.fitted[key] = (f"the weights' own grid {rows}x{report.columns}, not "
                                  f"{rows}x{columns}; fitted to the input's length")
            return value
    if key == "patch_embed.weight" and is_image:
        report.fitted[key] = "RGB kernel summed to one channel"
        return value.sum(dim=1, keepdim=True)
    if value.shape != own.shape:
        hint = "; leave the head out or match the classes" if key.startswith("head.") else ""
        raise WeightsError(f"--weights {report.source}: {key} is {tuple(value.shape)}, the model's "
                           f"is {tuple(own.shape)}{hint}")
    report.loaded.append(key)
    return value


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
_HUB_CONFIG = {  # settings that no tensor's shape shows: the hub's name -> ASTConfig's
    "num_attention_heads": "heads", "num_mel_bins": "n_mels", "patch_size": "patch",
    "frequency_stride": "stride", "time_stride": "stride",
}


def _to_our_names(source, report):
    """The source's tensors by this model's parameter names, whichever known format they are in."""
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value
               for key, value in source.tensors.items()}
    if any(key.startswith(_HUB) for key in tensors):
        return _from_hub(tensors, source.name)
    renamed = {}
    for key, value in tensors.items():
        if re.match(r"(v\.)?head(_dist)?\.(weight|bias)$", key):
            report.unused[key] = "image classifier that AST does not use"
            continue
        key = key.removeprefix("v.").replace("patch_embed.proj.", "patch_embed.")
        renamed[key.replace("mlp_head.", "head.")] = value
    return renamed


def _from_hub(tensors, name):
    renamed, qkv = {}, {}
    for key, value in tensors.items():
        short = key.removeprefix(_HUB)
        layer = re.match(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$", short)
        attention = layer and re.match(r"attention\.attention\.(query|key|value)$", layer[2])
        if attention:
            joined = f"blocks.{layer[1]}.attn.qkv.{layer[3]}"
            qkv.setdefault(joined, {})[attention[1]] = value
        elif layer and layer[2] in _HUB_LAYER:
            renamed[f"blocks.{layer[1]}.{_HUB_LAYER[layer[2]]}.{layer[3]}"] = value
        elif short in _HUB_OTHER:
            renamed[_HUB_OTHER[short]] = value
        else:
            raise WeightsError(f"--weights {name}: unexpected tensor {key}; use the weights of the "
                               "hub's AST")
    for key, parts in qkv.items():
        if parts.keys() != {"query", "key", "value"}:
            raise WeightsError(f"--weights {name}: {key} needs query, key and value, "
                               f"found {sorted(parts)}")
        renamed[key] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed


def to_hub(weights: dict[str, Tensor], config: ASTConfig, frames: int) -> tuple[dict, dict]:
    """Convert an AST's weights for transformers' ASTForAudioClassification.

    weights: by their names here. frames: the one input length of the hub's model; the position grid
    is fitted to it. Returns (the geometry for its config.json, tensors by its names).

    The hub's model has one eps for all norms, here the blocks' 1e-6. The head's is 1e-5, as the AST
    authors have it; the difference is about 1e-5 of a logit.
    """
    hub_layer = {ours: theirs for theirs, ours in _HUB_LAYER.items()}
    hub_other = {ours: theirs for theirs, ours in _HUB_OTHER.items()}
    tensors = {}
    for key, value in weights.items():
        block = re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)$", key)
        if key == "pos_embed":
            value = fit_positions(value, config.grid, config.patches(frames))
        if block:
            number, layer, kind = block.groups()
            prefix = f"{_HUB}encoder.layer.{number}"
        if block and layer == "attn.qkv":
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                tensors[f"{prefix}.attention.attention.{part}.{kind}"] = third
        elif block:
            tensors[f"{prefix}.{hub_layer[layer]}.{kind}"] = value
        else:
            prefix = "" if key.startswith("head.") else _HUB
            tensors[prefix + hub_other[key]] = value
    geometry = {
        "hidden_size": config.dim, "num_hidden_layers": config.depth,
        "intermediate_size": int(config.dim * config.mlp_ratio), "hidden_act": "gelu",
        "qkv_bias": True, "layer_norm_eps": 1e-6, "max_length": frames,
        **{theirs: getattr(config, ours) for theirs, ours in _HUB_CONFIG.items()},
    }
    # copies, since safetensors refuses tensors that share memory
    return geometry, {key: value.clone(memory_format=torch.contiguous_format)
                      for key, value in tensors.items()}
