"""Progress of a prediction: a live line in a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from repvgg.disk import Log
from repvgg.train.progress import PLAIN_EVERY


class Meter:
    """Counts images and says how many a second there are. total: None where it is not known."""

    def __init__(self, total: int | None, log: Log = print) -> None:
        self.total, self.log = total, log
        self.images, self.seconds = 0, 0.0
        self.bar: Any = None

    def __enter__(self) -> "Meter":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.row = self.bar.add_task("starting", total=self.total)
        self.started = self.spoke = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def add(self, images: int) -> None:
        """Count so many more images."""
        self.images += images
        now = time.perf_counter()
        self.seconds = now - self.started
        speed = self.images / self.seconds
        if self.bar is not None:
            self.bar.update(self.row, completed=self.images, description=f"{speed:,.0f} img/s")
        elif now - self.spoke > PLAIN_EVERY:
            self.spoke = now
            left = f" of {self.total:,}, {(self.total - self.images) / speed / 60:.1f} min left" if self.total else ""
            self.log(f"{self.images:,} images{left}, {speed:,.0f} img/s")
