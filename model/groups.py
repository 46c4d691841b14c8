"""Which parameters of an AST train, and with which learning rate and weight decay."""
import re

from torch import nn

EMBEDDINGS = ("cls_token", "dist_token", "pos_embed")


def parameter_groups(model: nn.Module, lr_backbone: float, lr_head: float, weight_decay: float,
                     layer_decay: float = 1.0) -> list[dict]:
    """Optimizer groups: backbone and head, each with and without weight decay.

    Returns a list of {"name", "params", "lr", "weight_decay"} without empty groups. Each trainable
    parameter is in exactly one group, a frozen one (requires_grad False) in none. Biases, norms,
    tokens and positions are not decayed.

    layer_decay: ratio of the learning rates of a block and the next (H. Bao et al., "BEiT", 2021).
        The final norm has lr_backbone, the last block layer_decay times that, and so on down to the
        embeddings. The groups are then backbone_layer00 (the embeddings), backbone_layer01, ...
    """
    groups = {}
    last_layer = model.config.depth + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer(name, model.config.depth)
        if _is_head(name):
            key, lr = "head", lr_head
        elif layer_decay == 1 or layer == last_layer:
            key, lr = "backbone", lr_backbone
        else:
            key = f"backbone_layer{layer:02d}"
            lr = lr_backbone * layer_decay ** (last_layer - layer)
        decay = weight_decay
        if parameter.dim() <= 1 or name in EMBEDDINGS:
            key, decay = f"{key}_no_decay", 0.0
        group = groups.setdefault(key, {"name": key, "params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def freeze_backbone(model: nn.Module, frozen: bool) -> bool:
    """Train the head alone if `frozen`, else all parameters; return whether that is a change.

    Optimizers skip parameters without a gradient, so the groups need not change.
    """
    has_changed = False
    for name, parameter in model.named_parameters():
        is_trained = _is_head(name) or not frozen
        has_changed |= parameter.requires_grad != is_trained
        parameter.requires_grad_(is_trained)
    return has_changed


def _is_head(name):
    return name.startswith("head.")


def _layer(name, depth):
    """0 for the embeddings, 1 to depth for the blocks, depth + 1 for the rest."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    if name in EMBEDDINGS or name.startswith("patch_embed."):
        return 0
    return depth + 1
