"""Products of 16-bit integers: as exact as their rounding says, never an overflow, and an image alone decides its scales."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from nets import conv, images, model_file, plain_net
from repvgg_engine import Net, Plan, instruction_sets, load, reference, tune
from repvgg_engine.layers import Array, Conv
from test_engine_conv import geometries, rms

# As integer.h has them.
LARGEST_INPUT, LARGEST_WEIGHT, WEIGHTS_SUM = 8191, 32767, 2**18
SETS = [name for name in instruction_sets() if name != "bf16"]
# AVX-512 without VNNI, which multiplies and adds by two instructions.
ALL_SETS = [*SETS, *(["avx512bw"] if "avx512" in SETS else [])]


def rounded(layer: Conv, x: Array) -> tuple[Conv, np.ndarray]:
    """Weights and images in so many bits, images on a grid of their own, weights on one for each output channel."""
    steps = np.abs(x).max((1, 2, 3), keepdims=True) / LARGEST_INPUT
    sizes = np.abs(layer.weight.astype(np.float64))
    grid = np.maximum(sizes.sum((1, 2, 3), keepdims=True) / WEIGHTS_SUM, sizes.max((1, 2, 3), keepdims=True) / LARGEST_WEIGHT)
    weight = np.round(layer.weight / grid) * grid
    return replace(layer, weight=weight.astype(np.float32)), np.round(x / steps) * steps


def by(layer: Conv, algorithm: str, x: Array, isa: str, threads: int = 1) -> Array:
    net = Net([layer], precision="int16", isa=isa, threads=threads)
    net.choose(0, algorithm)
    return net(x)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometry=geometries())
def test_as_exact_as_its_rounding_says(geometry: dict[str, Any]) -> None:
    """Against float64; how many times the plain rounding a tile's size amplifies it follows from its matrices."""
    g = dict(geometry)
    random = np.random.default_rng(g.pop("seed"))
    (into, out), size, n, threads = g.pop("channels"), g.pop("size"), g.pop("n"), g.pop("threads")
    layer = conv(random, into, out, **g)
    x = random.standard_normal((n, into, *size)).astype(np.float32)
    wanted = reference.run([layer], x)
    scale = np.sqrt(np.mean(np.sum(layer.weight.astype(np.float64) ** 2, (1, 2, 3))) * np.mean(x.astype(np.float64) ** 2))
    coarse, grid = rounded(layer, x)
    own = max(rms(reference.run([coarse], grid) - wanted), scale / LARGEST_INPUT / 2)  # few outputs may be exact by luck
    for isa in ALL_SETS:
        net = Net([layer], precision="int16", isa=isa, threads=threads)
        for algorithm in net.algorithms(0):
            if algorithm.endswith(" int16"):
                net.choose(0, algorithm)
                got = net(x)
                error = rms(got - wanted)
                assert error < 3 * tune.GROWTH[algorithm.split()[0]] * own, f"{isa} {algorithm}: {error:.1e}, own {own:.1e}"
                assert np.array_equal(net(x), got)


def test_the_bound_of_the_sums() -> None:
    """The largest inputs times the most that a chunk's weights may add up to, after their rounding, fit 32 bits."""
    assert LARGEST_INPUT * WEIGHTS_SUM < 2**31
    source = (Path(__file__).parents[1] / "src" / "integer.h").read_text()
    said = f"LARGEST_INPUT = {LARGEST_INPUT}, LARGEST_WEIGHT = {LARGEST_WEIGHT}, WEIGHTS_SUM = 1 << 18"
    assert said in source


@pytest.mark.parametrize("isa", ALL_SETS)
@pytest.mark.parametrize("channels", [1, 2, 31, 192, 255, 256, 257, 640])
def test_no_sum_overflows(isa: str, channels: int) -> None:
    """The worst there is: every product as large as it can be, and all of one sign. Then a sum is 0.999 of what 32 bits hold."""
    x = np.ones((1, channels, 9, 9), np.float32)
    for sign in (1, -1):
        layer = Conv(np.full((17, channels, 3, 3), sign, np.float32), np.zeros(17, np.float32), padding=(1, 1))
        wanted = reference.run([layer], x)
        for algorithm in ("direct int16", "F2 int16", "F4 int16", "F5 int16"):
            got = by(layer, algorithm, x, isa)
            assert np.abs(got - wanted).max() < 0.01 * np.abs(wanted).max(), algorithm


@pytest.mark.parametrize("isa", SETS)
def test_an_images_scales_are_its_own(isa: str) -> None:
    """Whatever else is in the batch: bright, dark, or no numbers at all."""
    known = Net(plain_net(), precision="int16", isa=isa).known
    x = images(7) * np.float32(10.0) ** np.arange(-3, 4, dtype=np.float32)[:, None, None, None]
    x[3] = np.nan
    for algorithm in ("direct int16", "F2 int16", "F4 int16", "F7 int16"):
        names = [algorithm if algorithm in of else of[0] if of else "" for of in known]
        net = Net(plain_net(), precision="int16", isa=isa, threads=3)
        net.choose_all(names)
        alone = np.concatenate([net(x[i : i + 1]) for i in range(7)])
        assert np.isnan(alone[3]).all()
        assert np.isfinite(np.delete(alone, 3, 0)).all()
        for threads in (1, 2):
            other = Net(plain_net(), precision="int16", isa=isa, threads=threads)
            other.choose_all(names)
            assert np.array_equal(other(x), alone, equal_nan=True), algorithm


@pytest.mark.skipif("avx512" not in SETS, reason="no AVX-512 here")
def test_the_same_bits_with_vnni_and_without() -> None:
    random = np.random.default_rng(0)
    layer, x = conv(random, 40, 70, padding=(1, 1), relu=True), images(3, channels=40, size=(19, 23))
    for algorithm in ("direct int16", "F2 int16", "F4 int16", "F5 int16", "F6 int16", "F7 int16"):
        assert np.array_equal(by(layer, algorithm, x, "avx512"), by(layer, algorithm, x, "avx512bw"))


@pytest.mark.parametrize("isa", SETS)
def test_infinities_nans_zeros_and_tiny_numbers(isa: str) -> None:
    random = np.random.default_rng(0)
    layer = conv(random, 40, 17, padding=(1, 1))
    x = images(1, channels=40, size=(12, 12))
    for odd in (np.nan, np.inf):
        x[0, 1, 6, 6] = odd
        got = by(layer, "direct int16", x, isa)
        assert np.isnan(got[0, :, 5:8, 5:8]).all()
        assert np.isfinite(got[0, :, :4]).all()
        assert not np.isfinite(by(layer, "F4 int16", x, isa)[0, :, 5:8, 5:8]).any()
    flat = layer.bias[:, None, None] + np.zeros((17, 12, 12), np.float32)
    for algorithm in ("direct int16", "F4 int16"):
        for small in (0, 1e-40, 1e-35):
            assert np.array_equal(by(layer, algorithm, np.full_like(x, small), isa)[0], flat)
    nothing = Conv(layer.weight * 0, layer.bias, padding=(1, 1))
    assert np.array_equal(by(nothing, "F4 int16", np.ones_like(x), isa)[0], flat)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("channel", [0, 19, 39])
def test_a_nan_among_the_weights_stays(isa: str, channel: int) -> None:
    """Wherever it is: of the output's other channels nothing changes."""
    layer = conv(np.random.default_rng(0), 40, 17, padding=(1, 1))
    spoiled = layer.weight.copy()
    spoiled[2, channel, 1, 1] = np.nan
    x = images(1, channels=40, size=(12, 12))
    others = np.arange(17) != 2
    for algorithm in ("direct int16", "F4 int16"):
        got = by(Conv(spoiled, layer.bias, padding=(1, 1)), algorithm, x, isa)
        assert np.isnan(got[:, 2]).all()
        assert np.array_equal(got[:, others], by(layer, algorithm, x, isa)[:, others])


def test_half_the_bytes_of_float32() -> None:
    net = Net([conv(np.random.default_rng(0), 192, 192, padding=(1, 1))], precision="int16")
    assert net.weight_bytes(0, "F4 int16") < 0.51 * net.weight_bytes(0, "F4")


@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_the_tuner_keeps_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: str) -> None:
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "cache"))
    path = model_file(tmp_path / "net.safetensors", plain_net())
    net, exact = (load(path, precision="int16", accuracy=a) for a in (accuracy, "exact"))
    assert exact.chosen[1] == "direct int16"
    x = tune.calibration_images(net)
    wanted = reference.run(net.layers, x)
    assert reference.error(net(x), wanted) <= tune.TIMES_DIRECT["int16", accuracy] * reference.error(exact(x), wanted)
    given = Plan(net.isa, net.precision, tuple(net.chosen))
    assert np.array_equal(load(path, plan=given, threads=1)(x[:1]), net(x)[:1])
