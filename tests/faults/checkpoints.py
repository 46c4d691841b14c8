"""Small checkpoints that can be told apart, damaged ones, and the ways into the program."""
import os
import random
import signal
import subprocess
import sys
import traceback

import torch
from conftest import ROOT

from core.run.checkpoint import link, save_checkpoint

WEIGHTS = {"a": torch.arange(3000.0)}


def numbered(n):
    """A small state that can be told from its neighbours, in its tensors too."""
    return {"n": n, "model": {name: value + n for name, value in WEIGHTS.items()}}


def is_numbered(state, n):
    """Whether a state is exactly `numbered(n)`."""
    return (state.get("n") == n and state["model"].keys() == WEIGHTS.keys()
            and all(torch.equal(state["model"][name], value + n)
                    for name, value in WEIGHTS.items()))


def number(state):
    """The n of a state; fails if its weights are of another n."""
    assert is_numbered(state, state["n"])
    return state["n"]


def save(folder, n):
    """Save as the training loop does after an epoch that was the best."""
    save_checkpoint(folder / "last.pt", numbered(n))
    link(folder / "last.pt", folder / "best.pt")


def flipped(good, seed, count):
    """Yield `count` copies of bytes, each with one bit flipped at a random place."""
    rng = random.Random(seed)
    for _ in range(count):
        bad = bytearray(good)
        bad[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        yield bytes(bad)


def truncated(good, seed, count):
    """Yield `count` copies of bytes, each cut off at a random place."""
    rng = random.Random(seed)
    for _ in range(count):
        yield good[:rng.randrange(len(good))]


def with_flipped_weight(good):
    """A copy of a checkpoint's bytes with one bit flipped in its largest tensor's zip member."""
    bad = bytearray(good)
    bad[len(good) // 2] ^= 1
    return bytes(bad)


def in_child(work):
    """Run `work()` in a fork of this process -> its exit code; 99 for an exception."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(script, *flags, cwd, **options):
    """Run a script of the project as a person would -> CompletedProcess."""
    environment = {**os.environ, "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, flags)], cwd=cwd,
                          env=environment, text=True, capture_output=True, timeout=120, **options)


def check_one_line(stderr, *names):
    """Check that stderr is one error line that holds the given names."""
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    for name in names:
        assert name in stderr, (name, stderr)
