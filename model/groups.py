"""Parameters of an AST -> named optimiser groups, and which of them train."""


def parameter_groups(model, lr_backbone, lr_head, weight_decay, layer_decay=1.0):
    """Groups for a torch optimiser: backbone and head, each with and without weight decay.

    Biases, norms, tokens and positions (everything of one dimension, and the embeddings) are not decayed.
    layer_decay: each block has so many times the LR of the next one, the last block that share of lr_backbone (which
    the final norm has), the embeddings the least (H. Bao et al., "BEiT", 2021); the groups are then
    backbone_layer00 (the embeddings) and so on.
    Each trainable parameter is in exactly one group; a frozen one (requires_grad False) is in none.
    Returns a list of {"name", "params", "lr", "weight_decay"}, empty groups left out.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, lr = ("head", lr_head) if name.startswith("head.") else ("backbone", lr_backbone)
        layer = _layer(name, model.config.depth)
        if layer_decay != 1 and part == "backbone" and layer <= model.config.depth:
            part, lr = f"backbone_layer{layer:02d}", lr * layer_decay ** (model.config.depth + 1 - layer)
        decayed = parameter.dim() > 1 and name not in ("cls_token", "dist_token", "pos_embed")
        key = part if decayed else f"{part}_no_decay"
        group = groups.setdefault(key, {"name": key, "params": [], "lr": lr, "weight_decay": weight_decay if decayed else 0.0})
        group["params"].append(parameter)
    return list(groups.values())


def _layer(name, depth):
    """0 for the embeddings, 1 to depth for the blocks, depth + 1 for what comes after."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name in ("cls_token", "dist_token", "pos_embed") or name.startswith("patch_embed.") else depth + 1


def freeze_backbone(model, frozen):
    """Let only the head train, or all again; the optimiser leaves what has no gradient alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith("head."))
