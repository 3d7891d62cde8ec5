"""Single convolutions timed side by side, in any engine: Table 1, and the test for Winograd.

batch, times = time_convolutions([Convolution(64, 64, 56), Convolution(64, 64, 112, stride=2)], batch_size=8)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from repvgg.bench.memory import fitting
from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.disk import Log
from repvgg.measure.timing import Times, interleave, synchroniser


@dataclass(frozen=True)
class Convolution:
    """A square convolution with bias of `in_channels` maps of `size` x `size`, padded by half its kernel."""

    in_channels: int
    out_channels: int
    size: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.out_channels * self.out_size**2 * self.kernel_size**2 * self.in_channels // self.groups

    def module(self) -> nn.Conv2d:
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.kernel_size // 2, groups=self.groups
        )
        return conv.eval()

    def __str__(self) -> str:
        marks = (f" /{self.stride}" if self.stride > 1 else "") + (f" g{self.groups}" if self.groups > 1 else "")
        return f"{self.kernel_size}x{self.kernel_size}{marks}, {self.in_channels} to {self.out_channels}, {self.size} px"


def time_convolutions(
    convolutions: Sequence[Convolution],
    options: Options,
    *,
    engine: str = "eager",
    rounds: int = 10,
    batches: int = 1,
    warmup: int = 2,
    log: Log = print,
) -> tuple[int, list[Times]]:
    """Return the batch size, halved with a word as often as memory runs out, and each convolution's times, taking turns.

    `options` says for what to build; its input size is each convolution's own.
    """
    calls = fitting(lambda n: _calls(convolutions, engine, replace(options, batch_size=n)), options.batch_size, "convolutions", log)
    times = interleave(
        {str(i): call for i, (_, call) in enumerate(calls)},
        rounds=rounds,
        batches=batches,
        warmup=warmup,
        synchronise=synchroniser(options.device),
    )
    return calls[0][0], [times[str(i)] for i in range(len(calls))]


def _calls(convolutions: Sequence[Convolution], engine: str, options: Options) -> list[tuple[int, Callable[[], Any]]]:
    """Each built and run once, with its batch size."""
    calls: list[tuple[int, Callable[[], Any]]] = []
    for convolution in convolutions:
        size = (convolution.in_channels, convolution.size, convolution.size)
        built = engines.build(engine, convolution.module(), replace(options, input_size=size))
        images = built.prepare(torch.randn(options.batch_size, *size))
        built.run(images)
        calls.append((options.batch_size, partial(built.run, images)))
    return calls
