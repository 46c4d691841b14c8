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
        best = logits.masked_fill(target.isnan(), -torch.inf).argmax(1, keepdim=True)
        correct = (target.gather(1, best) >= 0.5).float().mean().item()
        if (losses[-1] < 0.05 * losses[0] and correct == 1) or time.perf_counter() > deadline:
            break
    model.load_state_dict(kept)
    return losses[0], losses[-1], correct, sorted(wrong)


def smoke_test(model, loss_fn, precision, model_input, windows, step, n_train, n_val, epochs, n_bad):
    """Overfit one batch, train a short stretch, price the full run -> whether all is well.

    model_input(batch) -> (spec, target); windows: the first epoch's; step(window) -> what train_step returns;
    n_train: clips of an epoch, n_val: tiles of its validation.
    """
    window = next(windows)
    spec, target = model_input(window[0])
    model.train()
    first, last, correct, wrong = overfit(model, loss_fn, spec, target, precision.autocast)
    print(f"smoke: one batch of {len(spec)}: loss {first:.3f} to {last:.4f}, {correct:.0%} correct; gradients "
          + (f"missing or not finite in {', '.join(wrong[:3])}" if wrong else "all finite"))
    clips, steps, started = 0, 0, time.perf_counter()
    while window and time.perf_counter() - started < 20 and steps < 20:
        stepped = step(window)[0][3].item()
        clips += sum(len(batch.rows) for batch in window)
        steps += 1
        window = next(windows, None)
    speed = clips / (time.perf_counter() - started)  # with the loading of the data
    epoch = n_train / speed + n_val / (3 * speed)  # forward alone is a third of a training step
    print(f"smoke: {speed:.1f} clips/s, peak memory {peak_memory_mb(precision.device):.0f} MiB; about "
          f"{duration(epoch)} an epoch, {duration(epoch * epochs)} for all {epochs}")
    ok = last < 0.5 * first and not wrong and bool(stepped)
    print(f"smoke: {'passed' if ok else 'FAILED'}" + f", {n_bad} unreadable files" * bool(n_bad))
    return ok


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
