"""SIGTERM, Ctrl-C and a scheduler's warning (SIGUSR1) become a request that the loop reads."""
import signal


class StopRequest:
    """The signal that came, `.signum`, 0 while there was none. Until `armed` a signal ends the process at
    once, there being nothing to save; from then on it is only noted. Further signals change nothing, so a
    save in progress is never broken off."""

    def __init__(self):
        self.signum = 0
        self.armed = False
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self._note)

    def _note(self, signum, frame):
        first, self.signum = not self.signum, self.signum or signum
        if not self.armed:
            raise SystemExit(self.exit_code)
        if first:
            print(f"\n{signal.Signals(signum).name}: saving at the next step", flush=True)

    def __call__(self):
        return self.signum != 0

    @property
    def exit_code(self):
        """130 for Ctrl-C, 143 for SIGTERM and the schedulers' SIGUSR1."""
        return 130 if self.signum == signal.SIGINT else 143
