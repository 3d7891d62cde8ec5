"""Every geometry, by every algorithm, on every instruction set, against float64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from nets import HAS_BF16, conv
from repvgg_engine import EngineError, Net, instruction_sets, reference
from repvgg_engine.layers import Array

# Root mean square error, in units of what float32 (bfloat16) rounding alone does to the plain sums on this machine. The larger the
# tile, the larger the numbers in its transforms; a geometry may have few outputs, so some times what is seen on many.
TIMES_OWN = {"direct": 4, "F2": 6, "F4": 20, "F5": 40, "F6": 80, "F7": 250}
TIMES_OWN_BF16 = {"direct": 3, "F2": 6, "F4": 25, "F5": 50, "F6": 100, "F7": 300}
SETS = [name for name in instruction_sets() if name != "bf16"]


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    kernel = draw(st.sampled_from([3, 3, 3, 3, 1, 2, 5]))
    dilation = (draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2, 4])))
    padding = tuple(draw(st.integers(0, d * (kernel - 1) // 2 + 1)) for d in dilation)
    stride = draw(st.sampled_from([1, 1, 2]))
    return {
        "groups": groups,
        "channels": (draw(st.integers(1, 40)) * groups, draw(st.integers(1, 70)) * groups),
        "kernel": kernel,
        "stride": (stride, draw(st.sampled_from([stride, stride, 3]))),
        "padding": padding,
        "dilation": dilation,
        "relu": draw(st.booleans()),
        "size": tuple(draw(st.integers(max(1, d * (kernel - 1) + 1 - 2 * p), 34)) for d, p in zip(dilation, padding, strict=True)),
        "n": draw(st.integers(1, 6)),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**32)),
    }


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def to_bf16(values: Array) -> Array:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def check(geometry: dict[str, Any], precision: str = "fp32", sets: Sequence[str | None] = (None,)) -> None:
    """With each of these sets of instructions; None: the best that the machine has."""
    g = dict(geometry)
    random = np.random.default_rng(g.pop("seed"))
    (into, out), size, n, threads = g.pop("channels"), g.pop("size"), g.pop("n"), g.pop("threads")
    layer = conv(random, into, out, **g)
    images = random.standard_normal((n, into, *size)).astype(np.float32)
    wanted = reference.run([layer], images)
    scale = np.sqrt(np.mean(np.sum(layer.weight.astype(np.float64) ** 2, (1, 2, 3))) * np.mean(images.astype(np.float64) ** 2))
    # At least one rounding of a number as large as the sums usually are: few outputs may be exact by luck.
    own = max(rms(reference.run([layer], images, np.float32) - wanted), float(np.finfo(np.float32).eps) * scale)
    bounds = {name: times * own for name, times in TIMES_OWN.items()}
    if precision == "bf16":
        rounded = reference.run([replace(layer, weight=to_bf16(layer.weight))], to_bf16(images))
        own = max(rms(rounded - wanted), 2.0**-8 * scale)
        bounds |= {f"{name} bf16": times * own for name, times in TIMES_OWN_BF16.items()}
    for isa in sets:
        net = Net([layer], threads=threads, precision=precision, isa=isa)
        for algorithm in net.algorithms(0):
            net.choose(0, algorithm)
            got = net(images)
            assert got.shape == wanted.shape
            error = rms(got - wanted)
            assert error < bounds[algorithm], f"{isa} {algorithm}: {error:.1e}, own {own:.1e}"
            assert np.array_equal(net(images), got)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(geometry=geometries())
def test_against_float64(geometry: dict[str, Any]) -> None:
    check(geometry, sets=SETS)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(geometry=geometries())
def test_thousands_against_float64(geometry: dict[str, Any]) -> None:
    check(geometry, sets=SETS)


@pytest.mark.skipif(not HAS_BF16, reason="no AVX512-BF16 here, or not to be used")
@settings(max_examples=80, deadline=None, derandomize=True)
@given(geometry=geometries())
def test_bf16_against_float64(geometry: dict[str, Any]) -> None:
    check(geometry, "bf16")


def test_reference_against_the_definition() -> None:
    """The float64 reference is an oracle; so it is checked itself, number by number."""
    random = np.random.default_rng(0)
    layer = conv(random, 4, 6, stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2)
    x = random.standard_normal((4, 9, 8))
    y = reference.conv(layer, x[None])[0]
    padded = np.pad(x, ((0, 0), (2, 2), (1, 1)))
    for o, i, j in np.ndindex(*y.shape):
        total = float(layer.bias[o])
        for c, u, v in np.ndindex(2, 3, 3):
            total += float(layer.weight[o, c, u, v]) * padded[o // 3 * 2 + c, 2 * i + u, j + 2 * v]
        assert y[o, i, j] == pytest.approx(total, abs=1e-12)


def test_which_algorithms_fit() -> None:
    random = np.random.default_rng(0)

    def names(**geometry: Any) -> list[str]:
        return Net([conv(random, 4, 4, **geometry)]).algorithms(0)

    assert names() == names(dilation=(2, 3)) == ["direct", "F2", "F4", "F5", "F6", "F7"]
    assert names(stride=(2, 2)) == ["direct", "F2", "F4", "F7"]
    if HAS_BF16:
        both = Net([conv(random, 4, 4)], precision="bf16").algorithms(0)
        assert both == [*(f"{name} bf16" for name in names()), *names()]
    assert names(kernel=1) == names(kernel=5) == names(stride=(1, 2)) == names(stride=(2, 2), dilation=(2, 2)) == ["direct"]
    with pytest.raises(EngineError, match="layer 0 cannot be computed by F3"):
        Net([conv(random, 4, 4)]).choose(0, "F3")


def test_infinities_and_nans_stay() -> None:
    random = np.random.default_rng(0)
    images = random.standard_normal((1, 3, 8, 8)).astype(np.float32)
    images[0, 1, 4, 4] = np.nan
    got = Net([conv(random, 3, 5, padding=(1, 1), relu=True)])(images)
    assert np.isnan(got[0, :, 3:6, 3:6]).all()
    assert np.isfinite(got[0, :, :3]).all()


@pytest.mark.skipif(not HAS_BF16, reason="no AVX512-BF16 here, or not to be used")
def test_a_nan_beside_the_last_of_odd_channels() -> None:
    """Two channels share 32 bits; what is beside the last is the next pixel's, or the next group's, and counts for nothing."""
    random = np.random.default_rng(0)
    images = random.standard_normal((1, 3, 8, 9)).astype(np.float32)
    images[0, 0, 4, 6] = np.nan
    wide = conv(random, 3, 5, kernel=5, padding=(2, 2))  # too many numbers for one sum: row by row
    got = Net([wide], precision="bf16")(images)
    assert np.array_equal(np.isnan(got), np.isnan(reference.run([wide], images)))
    tiles = Net([conv(random, 3, 5, padding=(1, 1))], precision="bf16")
    tiles.choose(0, "F2 bf16")
    images[0, 0, 4] = images[0, 0, 0]
    images[0, 0, :, 3] = np.nan  # beside the samples of the tiles that begin at 0
    assert np.isfinite(tiles(images)[..., :2]).all()
    grouped = conv(random, 6, 8, kernel=5, padding=(2, 2), groups=2)
    both = random.standard_normal((1, 6, 8, 9)).astype(np.float32)
    both[0, 3] = np.inf
    assert np.isfinite(Net([grouped], precision="bf16")(both)[:, :4]).all()
