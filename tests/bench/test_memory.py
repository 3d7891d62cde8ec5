"""bench/memory.py: the stacks of Figure 3, counted, measured and seen by the operating system."""

import sys
from pathlib import Path

import pytest
import torch
from forks import Forks

from repvgg.bench.memory import STACKS, fitting, resident_growth, stack
from repvgg.measure.costs import cost, measure_peak_activation
from repvgg.paper.numbers import PEAK_ACTIVATION

CHANNELS, SIZE = 64, 32
MAP = CHANNELS * SIZE * SIZE * 4


TWICE = """
import torch
from repvgg.bench.memory import held, peak
for _ in range(2):
    before = held("cpu")
    tensors = [torch.ones(2**16 // 4) for _ in range(1024)]
    size = sum(t.nbytes for t in tensors)
    assert 0.5 * size < peak("cpu") - before < 2 * size, (size, peak("cpu"), before)
    del tensors
"""


@pytest.mark.parametrize("kind", STACKS)
def test_peaks_are_those_of_the_paper(kind: str) -> None:
    counted = cost(stack(kind, CHANNELS), (1, SIZE, SIZE))
    image = SIZE * SIZE * 4
    assert counted.peak_activation_bytes == PEAK_ACTIVATION[kind] * MAP
    assert counted.peak_working_bytes == (PEAK_ACTIVATION[kind] + 1) * MAP
    assert measure_peak_activation(stack(kind, CHANNELS), torch.randn(1, 1, SIZE, SIZE)) == counted.peak_working_bytes + image


def test_stacks_do_the_same_work() -> None:
    macs = {cost(stack(kind, 8), (1, 16, 16)).macs for kind in STACKS}
    assert macs == {16 * 16 * 9 * (8 + 4 * 8 * 8)}
    with pytest.raises(ValueError, match="no stack 'dense': there are residual, plain"):
        stack("dense", 8)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_process_grows_by_what_is_counted() -> None:
    growth, counted = resident_growth("residual", 64, 256), cost(stack("residual", 64), (1, 256, 256)).peak_working_bytes
    assert growth is not None
    assert 0.8 * counted < growth < 1.5 * counted


def test_held_and_peak_see_an_allocation_even_where_as_much_was_just_freed(forks: Forks, tmp_path: Path) -> None:
    """In a young process: one that has run for long has room in pages that it keeps."""
    ended = forks.python(TWICE, tmp_path)
    assert ended.code == 0, ended.err


def test_fitting_halves_until_it_fits() -> None:
    tried: list[int] = []
    words: list[str] = []

    def make(n: int) -> int:
        tried.append(n)
        if n > 3:
            raise MemoryError
        return n

    assert fitting(make, 12, "it", words.append) == 3
    assert tried == [12, 6, 3]
    assert words == ["it: out of memory, trying batch 6", "it: out of memory, trying batch 3"]


def test_another_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        fitting(_mismatch, 4, "it", print)


def _mismatch(batch_size: int) -> None:
    raise RuntimeError("size mismatch")
