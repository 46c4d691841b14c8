"""Parameters of an AST -> named optimiser groups."""


def parameter_groups(model, lr_backbone, lr_head, weight_decay):
    """Groups for a torch optimiser: backbone and head, each with and without weight decay.

    Biases, norms, tokens and positions (everything of one dimension, and the embeddings) are not decayed.
    Each trainable parameter is in exactly one group; a frozen one (requires_grad False) is in none.
    Returns a list of {"name", "params", "lr", "weight_decay"}, empty groups left out.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "head" if name.startswith("head.") else "backbone"
        decayed = parameter.dim() > 1 and name not in ("cls_token", "dist_token", "pos_embed")
        key = part if decayed else f"{part}_no_decay"
        group = groups.setdefault(key, {
            "name": key,
            "params": [],
            "lr": lr_head if part == "head" else lr_backbone,
            "weight_decay": weight_decay if decayed else 0.0,
        })
        group["params"].append(parameter)
    return list(groups.values())
