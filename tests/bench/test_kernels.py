"""bench/kernels.py against the convolutions that it times."""

from typing import Any

import pytest
import torch
from torch import nn

from repvgg.bench.kernels import Convolution, time_convolutions
from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.measure.costs import cost


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_counts_are_those_of_the_module(kernel_size: int, stride: int, size: int) -> None:
    c = Convolution(4, 6, size, kernel_size, stride, groups=2)
    out = c.module()(torch.randn(1, 4, size, size))
    assert out.shape == (1, 6, c.out_size, c.out_size)
    assert c.macs == cost(c.module(), (4, size, size)).macs


def test_each_is_timed_in_every_round() -> None:
    wanted = [Convolution(4, 4, 8), Convolution(4, 4, 16, stride=2), Convolution(4, 4, 8, 1)]
    batch, times = time_convolutions(wanted, Options(batch_size=2), rounds=3, batches=2, warmup=0)
    assert batch == 2
    assert [[len(turn) for turn in t.rounds] for t in times] == [[2, 2, 2]] * 3


def test_the_same_convolution_twice_is_two_candidates() -> None:
    _, times = time_convolutions([Convolution(4, 4, 8)] * 2, Options(), rounds=2, warmup=0)
    assert len(times) == 2
    assert times[0] is not times[1]


def test_out_of_memory_lowers_the_batch_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    build = engines.build

    def limited(name: str, model: nn.Module, options: Options) -> Any:
        if isinstance(model, nn.Conv2d) and model.kernel_size == (3, 3) and options.batch_size > 2:
            raise MemoryError
        return build(name, model, options)

    monkeypatch.setattr(engines, "build", limited)
    words: list[str] = []
    wanted = [Convolution(4, 4, 8, 1), Convolution(4, 4, 8, 3)]
    batch, _ = time_convolutions(wanted, Options(batch_size=4), rounds=1, warmup=0, log=words.append)
    assert batch == 2
    assert words == ["convolutions: out of memory, trying batch 2"]
