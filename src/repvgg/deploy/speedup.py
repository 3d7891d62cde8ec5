"""Speed of a network over that of what it was, the two taking turns."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from repvgg.deploy.runner import Runner
from repvgg.measure.timing import Ratio, interleave, ratio, synchroniser

ROUNDS, BATCHES, WARMUP = 7, 3, 2


@dataclass(frozen=True)
class Speedup:
    """Speed of a network over that of what it was. images_per_second: before and after; ratio: of the two, with its 95%
    interval."""

    batch_size: int
    images_per_second: tuple[float, float]
    ratio: Ratio

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rounds": ROUNDS, "batches": BATCHES}


def speedup(before: Runner, after: Runner) -> Speedup:
    """Time two runners for images of one size, taking turns, at the batch size of the first."""
    options = before.options
    images = torch.randn(options.batch_size, *options.input_size, generator=torch.Generator().manual_seed(0))
    runners = {"before": before.engine, "after": after.engine}
    calls = {name: partial(engine.run, engine.prepare(images)) for name, engine in runners.items()}
    times = interleave(calls, rounds=ROUNDS, batches=BATCHES, warmup=WARMUP, synchronise=synchroniser(options.device))
    speeds = (options.batch_size / times["before"].median, options.batch_size / times["after"].median)
    return Speedup(options.batch_size, speeds, ratio(times["before"], times["after"]))
