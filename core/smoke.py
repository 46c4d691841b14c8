"""A dry run: can one batch be learnt, are all gradients finite, how long will the full run take."""
import time

import torch


def overfit(model, loss_fn, spec, target, autocast, steps=60, lr=1e-3):
    """Train the model on one batch (B, n_mels, frames), (B, classes) and put its weights back.

    Returns (first loss, last loss, correct share at the end, names of parameters whose gradient was ever
    missing or not finite).
    """
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses, wrong = [], set()
    deadline = time.perf_counter() + 30
    for _ in range(steps):
        with autocast():
            logits = model(spec)
        loss = loss_fn(logits, target).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all()):
                wrong.add(name)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        correct = (logits.argmax(1) == target.argmax(1)).float().mean().item()
        if (losses[-1] < 0.05 * losses[0] and correct == 1) or time.perf_counter() > deadline:
            break
    model.load_state_dict(kept)
    return losses[0], losses[-1], correct, sorted(wrong)


def peak_memory_mb(device):
    """Peak memory of the device, or of the process on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def duration(seconds):
    """Seconds for a person: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
