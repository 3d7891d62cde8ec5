"""Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) in the middle of a run: finish the step, save, then leave."""

import signal
import threading
from types import FrameType
from typing import Any


class StoppedError(KeyboardInterrupt):
    """The run was asked to stop, and its state is saved. `signal` is what asked."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signal = signum


class StopRequests:
    """Remembers the first signal; a second one does what it always did. Use as a context manager."""

    def __init__(self) -> None:
        self.signal = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
                    self.before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signal = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
