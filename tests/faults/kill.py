"""Kill a training run at random moments until it is done; compare it with an untouched run.

    python tests/faults/kill.py --kills 5 --folder OUT --data esc10 --fold 1 --weights none ...

Flags that this script does not know go to train.py. Each attempt is a process of its own, forked
from one that has imported the program. It is killed by SIGKILL after a random time. If a run is
done before all kills are spent, another one is begun. Every other kill is timed from the start of
the training loop; otherwise most would fall into the start of the program. Exit code 1 if any run
differs.
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

from harness import PICTURES, outcome

import core.run.run
import train
from report import pictures


def main():
    args, flags = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng, log = random.Random(args.moments), args.folder / "output.txt"
    _, run_seconds, loop_seconds = attempt(flags, args.folder / "untouched", log)
    reference = outcome_of(args.folder / "untouched")
    print(f"untouched: {len(reference['steps'])} steps in {run_seconds:.1f} s, weights "
          f"{reference['weights'][:16]}", flush=True)
    n_kills, n_runs, n_different = 0, 0, 0
    while n_kills < args.kills or n_runs == 0:
        folder, n_kills_here, is_done = args.folder / f"killed{n_runs}", 0, False
        while not is_done:
            in_loop = n_kills % 2 == 0
            seconds = None
            if n_kills < args.kills:
                seconds = args.within * rng.uniform(0, loop_seconds if in_loop else run_seconds)
            is_done, *_ = attempt(flags, folder, log, seconds, in_loop, args.break_resume)
            if not is_done:
                n_kills += 1
                n_kills_here += 1
        found = outcome_of(folder)
        differing = [key for key in reference if found[key] != reference[key]]
        n_runs += 1
        if differing:
            n_different += 1
        verdict = f"DIFFERENT in {', '.join(differing)}" if differing else "equal"
        print(f"killed {n_kills_here} times: weights {found['weights'][:16]}, "
              f"{len(found['steps'])} steps: {verdict}", flush=True)
        if n_runs > 1 and not differing:
            shutil.rmtree(folder)
    print(f"{n_kills} kills, {n_runs} runs, {n_different} different")
    return 1 if n_different else 0


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--moments", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--within", type=float, default=1.0, help="longest attempt as a share of a "
                        "whole run; small for many kills of one run")
    parser.add_argument("--folder", type=Path, default=Path("runs/kill"))
    parser.add_argument("--break-resume", action="store_true", help="control: lose the position in "
                        "the epoch, which must be found out")
    return parser.parse_known_args()


def attempt(flags, folder, log, seconds=None, in_loop=False, break_resume=False):
    """One process of the program, killed after `seconds` from its start, or from its loop's start.

    Returns whether it finished, how long it lived, and how long it was in the loop.
    """
    started, loop_started, before = time.monotonic(), None, inode(folder / "steps.csv")
    pid = os.fork()
    if pid == 0:
        run_program(flags, folder, log, break_resume)
    while True:
        now = time.monotonic()
        ended, status = os.waitpid(pid, os.WNOHANG)
        if loop_started is None and inode(folder / "steps.csv") != before:
            loop_started = now
        if ended and status:
            sys.exit(f"a process ended by itself with status {status}; see {log}")
        if ended:
            return True, now - started, now - loop_started
        timed_from = loop_started if in_loop else started
        if seconds is not None and timed_from is not None and now - timed_from >= seconds:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False, now - started, 0
        time.sleep(0.002)


def run_program(flags, folder, log, break_resume):
    """In the forked process: run train.main, then exit."""
    code = 1
    with open(log, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            for name in PICTURES:  # not compared, and slower than tiny epochs
                setattr(pictures, name, lambda *_, **__: None)
            train.write_report = lambda *_: ""
            if break_resume:
                lose_position_in_epoch()
            code = train.main([*flags, "--run-dir", str(folder), "--resume", "auto"])
        except BaseException as error:
            print(f"ended by {error!r}")
        finally:
            out.flush()
            os._exit(code)


def lose_position_in_epoch():
    real_progress = core.run.run.Progress

    def progress(**state):
        return real_progress(**(state | {"step_in_epoch": 0} if state else {}))
    core.run.run.Progress = progress


def inode(path):
    return path.stat().st_ino if path.exists() else None


def outcome_of(folder):
    """`outcome`, in a process of its own: a fork would not have torch's threads."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(outcome, (folder,))


if __name__ == "__main__":
    sys.exit(main())
