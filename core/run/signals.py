"""Signals become a request that the loop reads: Ctrl-C, SIGTERM, SIGUSR1 (schedulers), SIGHUP."""
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
    """

    def __init__(self):
        self.signum = 0
        self.armed = False
        for signum in SIGNALS:
            signal.signal(signum, self._note)

    def _note(self, signum, frame):
        is_first = self.signum == 0
        if is_first:
            self.signum = signum
        if not self.armed:
            raise SystemExit(self.exit_code)
        if is_first:
            print(f"\n{signal.Signals(signum).name}: saving at the next step", flush=True)

    @property
    def requested(self) -> bool:
        return self.signum != 0

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for the other signals, 0 without a signal."""
        if self.signum == 0:
            return 0
        return 130 if self.signum == signal.SIGINT else 143
