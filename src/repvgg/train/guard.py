"""A watch over one process of many: it ends although its main thread waits, deaf to signals, for a process that is gone.

A Python signal handler runs in the main thread alone, and only once that returns from C++. So a second thread hears of signals
through a pipe (`signal.set_wakeup_fd`), and looks every second whether the agent that started this process is still there.
"""

import os
import select
import signal
import sys
import threading
import time
from types import TracebackType

GRACE = 30.0  # seconds between a request to stop and the end, as torchrun's own
REQUESTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Guard:
    """Use as a context manager; `limit` sets how long what follows may take."""

    def __init__(self, name: str) -> None:
        """Name this process in the line that it may end with."""
        self.name, self.agent = name, os.getppid()
        self.deadline, self.reason, self.grace = float("inf"), "", 0.0
        self.asked = 0

    def limit(self, seconds: float, reason: str) -> None:
        """End this process with `reason` unless `free` is called in time; a request to stop ends it at once until then."""
        self.reason, self.deadline, self.grace = reason, time.monotonic() + seconds, 0.0

    def free(self) -> None:
        """Let this process go on for as long as it likes."""
        self.deadline, self.grace = float("inf"), GRACE

    def __enter__(self) -> "Guard":
        self.ears, self.mouth = os.pipe()
        os.set_blocking(self.mouth, False)
        self.is_main = threading.current_thread() is threading.main_thread()
        self.before = signal.set_wakeup_fd(self.mouth, warn_on_full_buffer=False) if self.is_main else -1
        self.thread = threading.Thread(target=self._watch, name="repvgg guard", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_main:
            signal.set_wakeup_fd(self.before)
        os.write(self.mouth, b"\0")
        self.thread.join()
        os.close(self.ears)
        os.close(self.mouth)

    def _watch(self) -> None:
        while True:
            if select.select([self.ears], [], [], 1.0)[0]:
                heard = os.read(self.ears, 64)
                if 0 in heard:
                    return
                self._note(REQUESTS.intersection(heard))
            if os.getppid() != self.agent:
                self._end(f"the process that started this one ({self.agent}) is gone", 1)
            if time.monotonic() > self.deadline:
                self._end(self.reason, 128 + self.asked if self.asked else 1)

    def _note(self, requests: set[signal.Signals]) -> None:
        if requests and not self.asked:
            self.asked = min(requests)
            self.deadline = time.monotonic() + self.grace
            self.reason = "asked to stop, but another process does not answer; all saved files are intact"

    def _end(self, reason: str, code: int) -> None:
        print(f"{self.name}: {reason}", file=sys.stderr, flush=True)
        os._exit(code)
