"""What people look at during a run: a live line in a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import Any

from repvgg.train.tasks import Evaluation

PLAIN_EVERY = 30.0  # seconds between lines where there is no terminal
SPOKEN = {"top1": "top-1", "pixel_accuracy": "pixels"}


class Progress:
    """Loss and the share that is recognised (means of the last steps), images a second, the share of time that data was waited
    for, time left.

    before: steps that an earlier process did; share: the name of what is recognised. Use as a context manager.
    """

    def __init__(self, epochs: int, steps: int, batch_size: int, log: Any = print, before: int = 0, share: str = "top1") -> None:
        self.epochs, self.steps, self.batch_size, self.log, self.before = epochs, steps, batch_size, log, before
        self.share = share
        self.recent: deque[tuple[float, float]] = deque(maxlen=50)
        self.done, self.lr, self.loader = 0, 0.0, 0.0
        self.bar: Any = None
        self.training_seconds, self.waited, self.mark, self.spoke = 0.0, 0.0, 0.0, 0.0

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.epochs * self.steps, completed=self.before)
        self.mark = self.spoke = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, epoch: int, loss: float, right: float, lr: float, waited: float = 0.0, loader: float = 0.0) -> None:
        """After each training step. waited: seconds for its images; loader: images a second that the workers could load."""
        now = time.perf_counter()
        self.training_seconds += now - self.mark
        self.waited += waited
        self.mark, self.lr, self.loader = now, lr, loader
        self.done += 1
        self.recent.append((loss, right))
        a = self.averages()
        share = f"{SPOKEN[self.share]} {a[self.share]:.1%}"
        line = (
            f"epoch {epoch + 1}/{self.epochs}  loss {a['loss']:.3f}  {share}  {a['img_per_s']:.0f} img/s "
            f"(loader {a['loader_img_per_s']:.0f}, data wait {a['data_wait']:.0%})  lr {lr:.4f}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=self.before + self.done, description=line)
        elif now - self.spoke > PLAIN_EVERY:
            self.spoke = now
            total, step = self.epochs * self.steps, self.before + self.done
            left = self.training_seconds / self.done * (total - step)
            self.log(f"{line}  step {step}/{total}  {left / 60:.1f} min left")

    def evaluated(self, epoch: int, evaluation: Evaluation) -> None:
        """After each epoch's evaluation."""
        self.mark = self.spoke = time.perf_counter()
        a = self.averages() if self.done else None
        line = f"epoch {epoch + 1}/{self.epochs}: val {evaluation}"
        if a is not None:
            speed = f"{a['img_per_s']:.0f} img/s (loader {a['loader_img_per_s']:.0f}, data wait {a['data_wait']:.0%})"
            line = f"{line}, loss {a['loss']:.3f}, {speed}, lr {self.lr:.4f}"
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        else:
            self.log(line)

    def averages(self) -> dict[str, float]:
        """Of the last 50 steps; the speed is that of all training steps so far, loading included, evaluation not."""
        loss, right = (sum(values) / len(self.recent) for values in zip(*self.recent, strict=True))
        speed = self.done * self.batch_size / self.training_seconds
        return {
            "loss": loss,
            self.share: right,
            "lr": self.lr,
            "img_per_s": round(speed, 1),
            "loader_img_per_s": round(self.loader, 1),
            "data_wait": round(self.waited / self.training_seconds, 4),
        }
