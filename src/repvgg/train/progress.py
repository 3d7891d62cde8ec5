"""The figures that people look at during a run, on a live line in a terminal, in plain lines elsewhere."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from repvgg import terminal
from repvgg.train.tasks import Evaluation

FIRST = 10  # steps, after which it is known how long all will take; the first half of them is slow
SPOKEN = {"top1": "top-1", "pixel_accuracy": "pixels"}


class Progress:
    """Loss and the share that is recognised (means since they were last looked at), images a second, the share of time that data
    was waited for, time left.

    before: steps that an earlier process did; share: the name of what is recognised; left: as `terminal.Progress` takes it. Use as
    a context manager.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        batch_size: int,
        log: Any = print,
        before: int = 0,
        share: str = "top1",
        left: Callable[[float], float] = terminal.alike,
    ) -> None:
        self.epochs, self.batch_size, self.share = epochs, batch_size, share
        self.total = epochs * steps
        self.line = terminal.Progress(self.total, log, before, left=left)
        self.steps, self.waited, self.lr, self.loader = 0, 0.0, 0.0, 0.0
        self.half = 0, 0.0  # steps done, and seconds, after half of the FIRST
        self.means: tuple[float, float] | None = None

    def __enter__(self) -> "Progress":
        self.line.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.line.__exit__(kind, error, trace)

    def step(self, epoch: int, lr: float, waited: float = 0.0, loader: float = 0.0) -> None:
        """Count a training step. waited: seconds for its images; loader: images a second that could be had."""
        self.steps, self.waited, self.lr, self.loader = self.steps + 1, self.waited + waited, lr, loader
        self.line.add(1, lambda: f"epoch {epoch + 1}/{self.epochs}  {self._loss()}{self._speed()}  lr {lr:.4f}", "step")
        if self.steps == FIRST // 2:
            self.half = self.line.done, self.line.seconds
        elif self.steps == FIRST:
            self._foretell(*self.half)

    def _foretell(self, done: int, seconds: float) -> None:
        """Say how long it will take, where that is long, by the steps since then."""
        minutes, left = self.line.minutes_left(done, self.line.seconds - seconds), self.total - self.line.done
        if minutes > 1:
            self.line.say(f"about {minutes:.0f} min for the {left} steps that are left; evaluations come on top")

    def seen(self, loss: float, right: float) -> None:
        """Take note of the means over some steps."""
        self.means = loss, right

    def evaluated(self, epoch: int, evaluation: Evaluation, trained: tuple[float, float]) -> None:
        """Say how good the model is after an epoch. trained: the means over the epoch's training steps."""
        loss, right = trained
        line = f"epoch {epoch + 1}/{self.epochs}: val {evaluation}; in training {SPOKEN[self.share]} {right:.1%}, loss {loss:.3f}"
        self.line.say(f"{line}, {self._speed()}, lr {self.lr:.4f}" if self.steps else line)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.line.say(line)

    def averages(self) -> dict[str, float]:
        """Return the figures for the log; the speed is that of all training steps so far, loading included, evaluation not."""
        assert self.means is not None
        seconds = self.line.seconds
        return {
            "loss": self.means[0],
            self.share: self.means[1],
            "lr": self.lr,
            "img_per_s": round(self.steps * self.batch_size / seconds, 1),
            "loader_img_per_s": round(self.loader, 1),
            "data_wait": round(self.waited / seconds, 4),
        }

    def _loss(self) -> str:
        if self.means is None:
            return ""
        return f"loss {self.means[0]:.3f}  {SPOKEN[self.share]} {self.means[1]:.1%}  "

    def _speed(self) -> str:
        seconds = self.line.seconds
        speed, waited = self.steps * self.batch_size / seconds, self.waited / seconds
        return f"{speed:.0f} img/s (loader {self.loader:.0f}, data wait {waited:.0%})"
