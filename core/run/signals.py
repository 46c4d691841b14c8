"""Signals become a request that the loop reads: Ctrl-C, SIGTERM, SIGUSR1 (schedulers), SIGHUP."""
import os
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(Exception):  # noqa: N818  (not an error: the run stops because it was told to)
    """The run was saved after a signal and ends with `exit_code`."""

    def __init__(self, exit_code: int):
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


class StopRequest:
    """Note the first signal in `.signum`, which is 0 until then.

    Before `armed` is set a signal ends the process at once, because there is nothing to save. After
    that it is only noted. Further signals change nothing, so a save is never interrupted.

    SIGHUP stays ignored under nohup. The end of torchrun counts as a SIGTERM: its processes would
    go on, and nobody could tell them anything.
    """

    def __init__(self, has_launcher: bool = False):
        self.signum = 0
        self.armed = False
        self._pid = os.getpid()
        self._launcher = os.getppid() if has_launcher else None
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._note)

    def _note(self, signum, frame):
        if os.getpid() != self._pid:  # a worker that has not yet set its own handlers
            return
        is_first = self.signum == 0
        if is_first:
            self.signum = signum
        if not self.armed:
            raise SystemExit(self.exit_code)
        if is_first:
            print(f"\n{signal.Signals(signum).name}: saving at the next step", flush=True)

    @property
    def requested(self) -> bool:
        """Whether to stop at the next step."""
        if self._launcher is not None and os.getppid() != self._launcher and not self.signum:
            self.signum = signal.SIGTERM
            print("torchrun has ended: saving at the next step", flush=True)
        return self.signum != 0

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for the other signals, 0 without a signal."""
        if self.signum == 0:
            return 0
        return 130 if self.signum == signal.SIGINT else 143
