"""The one timing loop: warm-up, then rounds in which the candidates take turns, so that a machine's drift hits all alike.

times = interleave({"a": lambda: a(x), "b": lambda: b(x)}, rounds=10, batches=5)
print(times["b"].median, ratio(times["a"], times["b"]))
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds a call: one list a round. `median` and the quartiles are over the rounds' own medians."""

    rounds: list[list[float]]

    @property
    def by_round(self) -> list[float]:
        return [statistics.median(r) for r in self.rounds]

    @property
    def median(self) -> float:
        return statistics.median(self.by_round)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rounds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.by_round, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Ratio:
    """The ratio of two candidates' speeds, with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f})"


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    batches: int = 10,
    warmup: int = 3,
    synchronise: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Times]:
    """Time each candidate's calls. In each round each makes `batches` calls in a row, in an order that rotates.

    synchronise: waits for the device to finish (torch.cuda.synchronize). progress: told each round that is done.
    """
    if min(rounds, batches) < 1:
        raise ValueError("rounds and batches are at least 1")
    for call in candidates.values():
        for _ in range(warmup):
            call()
    synchronise()
    names = list(candidates)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(_round(candidates[name], batches, synchronise))
        progress(number + 1)
    return {name: Times(s) for name, s in seconds.items()}


def synchroniser(device: str) -> Callable[[], None]:
    """Return a call that waits until `device` has finished; on a CPU there is nothing to wait for."""
    if device == "cpu":
        return lambda: None
    import torch

    return lambda: torch.accelerator.synchronize(device)


def ratio(slow: Times, fast: Times, resamples: int = 2000) -> Ratio:
    """Return the speed of `fast` over that of `slow`: the median of the rounds' ratios, its interval by bootstrap over rounds."""
    ratios = [s / f for s, f in zip(slow.by_round, fast.by_round, strict=True)]
    draw = random.Random(0)  # noqa: S311 - statistics, and the same answer each time
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return Ratio(statistics.median(ratios), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])


def _round(call: Callable[[], Any], batches: int, synchronise: Callable[[], None]) -> list[float]:
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        call()
        synchronise()
        times.append(time.perf_counter() - start)
    return times
