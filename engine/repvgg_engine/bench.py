"""Images a second, by engines that take turns: whatever else the machine does hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repvgg_engine import reference, rivals
from repvgg_engine.library import EngineError
from repvgg_engine.net import Net

TURN = 0.4  # seconds that an engine runs in each round, at least one call


@dataclass(frozen=True)
class Speed:
    """images_per_second: of each round, by its median call. error: root mean square, against float64 (see reference.error)."""

    images_per_second: list[float]
    error: float

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_second)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.images_per_second, (0.25, 0.75))
        return float(low), float(high)


def ratio(fast: Speed, slow: Speed) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(f / s for f, s in zip(fast.images_per_second, slow.images_per_second, strict=True))


def bench(nets: Mapping[str, Net], against: Sequence[str], batch_size: int, rounds: int = 7, judged: int = 4) -> dict[str, Speed]:
    """Speeds of nets and of other engines that run the first of them. judged: images whose outputs are compared with float64."""
    if batch_size < 1 or rounds < 1:
        raise EngineError("batch size and rounds are at least 1")
    first = next(iter(nets.values()))
    size = (first.preprocessing.height, first.preprocessing.width) if first.preprocessing else (224, 224)
    images = np.random.default_rng(0).standard_normal((max(batch_size, judged), first.channels, *size), np.float32)
    wanted = reference.run(first.layers, images[:judged]) if judged else None
    batch = images[:batch_size]
    calls: dict[str, Callable[[], Any]] = {name: _call(net, batch) for name, net in nets.items()}
    for name in against:
        calls[name] = rivals.rival(name, first.layers, batch, first.precision, first.threads)
    errors = {name: float("nan") for name in calls}
    if wanted is not None:
        for name, call in calls.items():
            if name in nets:
                got = np.concatenate([nets[name](images[i : i + batch_size]) for i in range(0, judged, batch_size)])
            elif batch_size >= judged:
                got = call()
            else:
                got = rivals.rival(name, first.layers, images[:judged], first.precision, first.threads)()
            errors[name] = reference.error(got[:judged], wanted)
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            speeds[name].append(batch_size / _seconds(calls[name]))
    return {name: Speed(speeds[name], errors[name]) for name in names}


def _call(net: Net, images: Any) -> Callable[[], Any]:
    return lambda: net(images)


def _seconds(call: Callable[[], Any]) -> float:
    """The median call of one turn."""
    call()
    taken: list[float] = []
    while sum(taken) < TURN:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
