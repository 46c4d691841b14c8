"""Kill a training run at random moments until it is done, and compare it with one that was never touched.

    python tests/faults/kill.py --kills 5 --folder OUT --data esc10 --fold 1 --weights none --size tiny --epochs 2 ...

Everything that this script does not know is passed on to train.py. Each life is a process of its own, forked
from one that has imported the program, and ends by SIGKILL after a random time; when a run is done before all
kills are spent, another one is begun. Every other kill is timed from the moment the training loop is reached,
or most would fall into the start of the program. Exit code 1 where any run differs.
"""
import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import train
from harness import outcome
from report import pictures


def inode(path):
    return path.stat().st_ino if path.exists() else None


def life(flags, folder, log, seconds=None, in_loop=False, break_resume=False):
    """One process of the program, killed after `seconds`, from its start or from when it reached the loop
    -> (whether it came to its end, how long it lived, how long it was in the loop)."""
    started, looping, before = time.monotonic(), None, inode(folder / "steps.csv")
    pid = os.fork()
    if pid == 0:
        code = 1
        with open(log, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                for name in ("schedule", "batch", "curves", "confusion"):  # not compared, and slower than tiny epochs
                    setattr(pictures, name, lambda *_, **__: None)
                if break_resume:
                    real = train.Progress
                    train.Progress = lambda **state: real(**{**state, "window": 0} if state else {})
                code = train.main([*flags, "--run-dir", str(folder), "--resume", "auto"])
            except BaseException as error:
                print(f"ended by {error!r}")
            finally:
                out.flush()
                os._exit(code)
    while True:
        now = time.monotonic()
        ended, status = os.waitpid(pid, os.WNOHANG)
        if looping is None and inode(folder / "steps.csv") != before:
            looping = now
        if ended and status:
            sys.exit(f"a process ended by itself with status {status}; see {log}")
        if ended:
            return True, now - started, now - looping
        since = looping if in_loop else started
        if seconds is not None and since is not None and now - since >= seconds:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False, now - started, 0
        time.sleep(0.002)


def outcome_of(folder):
    """`outcome`, in a process of its own: this one must not start torch's threads, which a fork would not have."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(outcome, (folder,))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--moments", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--within", type=float, default=1.0, help="each life is at most this share of a whole run; small "
                        "for many kills of one run")
    parser.add_argument("--folder", type=Path, default=Path("runs/kill"))
    parser.add_argument("--break-resume", action="store_true", help="lose the place in the epoch: must be found out")
    args, flags = parser.parse_known_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng, log = random.Random(args.moments), args.folder / "output.txt"
    _, whole, loop = life(flags, args.folder / "untouched", log)
    reference = outcome_of(args.folder / "untouched")
    print(f"untouched: {len(reference['steps'])} steps in {whole:.1f} s, weights {reference['weights'][:16]}", flush=True)
    kills, runs, different = 0, 0, 0
    while kills < args.kills or runs == 0:
        folder, here, ended = args.folder / f"killed{runs}", 0, False
        while not ended:
            in_loop = kills % 2 == 0
            seconds = args.within * rng.uniform(0, loop if in_loop else whole) if kills < args.kills else None
            ended, *_ = life(flags, folder, log, seconds, in_loop, args.break_resume)
            kills, here = kills + (not ended), here + (not ended)
        found = outcome_of(folder)
        differing = [key for key in reference if found[key] != reference[key]]
        runs, different = runs + 1, different + bool(differing)
        print(f"killed {here} times: weights {found['weights'][:16]}, {len(found['steps'])} steps: "
              + (f"DIFFERENT in {', '.join(differing)}" if differing else "equal"), flush=True)
        if runs > 1 and not differing:
            shutil.rmtree(folder)
    print(f"{kills} kills, {runs} runs, {different} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
