"""Products of 8-bit integers: direct ones exact to the bit against whole numbers of NumPy on every instruction set; no overflow."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from nets import calibrated, conv, images, model_file, plain_net
from repvgg_engine import EngineError, Net, Plan, load, reference, tune
from repvgg_engine.layers import Array, Conv, Layer
from test_engine_conv import rms
from test_engine_integer import ALL_SETS, SETS

LARGEST_BYTE, LARGEST_WEIGHT = 255, 127


def read(channels: int) -> Conv:
    """What comes first: the images themselves, without their negative numbers."""
    return Conv(np.eye(channels, dtype=np.float32)[:, :, None, None], np.zeros(channels, np.float32), relu=True)


def whole(random: np.random.Generator, into: int, out: int, kernel: int, largest: float, **options: Any) -> Conv:
    """A convolution whose weights in 8 bits are what they are: whole numbers, the largest of each output channel 127."""
    weight = random.integers(-LARGEST_WEIGHT, LARGEST_WEIGHT + 1, (out, into, kernel, kernel)).astype(np.float32)
    weight.reshape(out, -1)[:, 0] = LARGEST_WEIGHT
    bias = random.integers(-1000, 1000, out).astype(np.float32)
    return Conv(weight, bias, relu=True, largest_input=largest, **options)


def in_integers(layers: list[Conv], x: Array) -> np.ndarray:
    """The answer in whole numbers: a layer reads round(number / step), at most 255. Biases are those of a step of 1."""
    y = np.maximum(x, 0).astype(np.float64)
    for layer in layers:
        step = layer.largest_input / LARGEST_BYTE
        assert step == 1 or not layer.bias.any()
        y = reference.run([layer], np.minimum(np.rint(y / step), LARGEST_BYTE)) * step
    return y


def by(layers: Sequence[Layer], names: list[str], x: Array, isa: str, threads: int = 1) -> Array:
    net = Net(layers, precision="int8", isa=isa, threads=threads)
    net.choose_all(names)
    return net(x)


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.sampled_from([1, 3, 3, 3, 5]))
    dilation, stride = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.integers(0, dilation * (kernel - 1) // 2))
    least = dilation * (kernel - 1) + 1
    return {
        "kernel": kernel,
        "channels": draw(st.tuples(st.integers(1, 40), st.integers(1, 70))),
        "size": draw(st.tuples(*[st.integers(least, least + 12)] * 2)),
        "n": draw(st.integers(1, 5)),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**31)),
        "options": {"stride": (stride, stride), "padding": (padding, padding), "dilation": (dilation, dilation)},
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometry=geometries())
def test_exact_to_the_bit(geometry: dict[str, Any]) -> None:
    """Sums of up to 1000 products of bytes are whole numbers that float32 holds."""
    random, (into, out) = np.random.default_rng(geometry["seed"]), geometry["channels"]
    x = random.integers(-50, 350, (geometry["n"], into, *geometry["size"])).astype(np.float32)
    layer = whole(random, into, out, geometry["kernel"], LARGEST_BYTE, **geometry["options"])
    wanted = in_integers([layer], x)
    for isa in ALL_SETS:
        assert np.array_equal(by([read(into), layer], ["direct", "direct int8"], x, isa, geometry["threads"]), wanted), isa


@pytest.mark.parametrize("isa", ALL_SETS)
@pytest.mark.parametrize("widths", [(3, 16, 48, 10), (16, 17, 33, 64), (48, 64, 7, 5)])
def test_bytes_from_layer_to_layer(isa: str, widths: tuple[int, ...]) -> None:
    """Whatever writes them: direct in 8 bits, or by Winograd's algorithms in float32 and in 16 bits."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (3, widths[0], 13, 11)).astype(np.float32)
    first, *others = (whole(random, a, b, 3, LARGEST_BYTE, padding=(1, 1)) for a, b in pairwise(widths))
    steps = (2.0**14, 2.0**23)  # about as large as the numbers are
    others = [replace(layer, largest_input=LARGEST_BYTE * s, bias=layer.bias * 0) for layer, s in zip(others, steps, strict=True)]
    layers = [read(widths[0]), first, *others]
    wanted = in_integers([first, *others], x)
    got = by(layers, ["direct"] + ["direct int8"] * 3, x, isa)
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()
    for algorithm in ("direct", "F2", "F4", "F2 int16", "F4 int16"):
        mixed = by(layers, ["direct", algorithm, "direct int8", "direct int8"], x, isa)
        assert rms(mixed - wanted) < 0.02 * rms(wanted), algorithm


@pytest.mark.parametrize("isa", ALL_SETS)
@pytest.mark.parametrize("channels", [1, 3, 64, 257, 7400])
def test_no_sum_overflows(isa: str, channels: int) -> None:
    """The worst there is: every product as large as it can be, all of one sign. Of 7400 channels, 0.999 of what 32 bits hold."""
    x = np.ones((1, channels, 3, 3), np.float32)
    for sign in (1, -1):
        layer = Conv(np.full((3, channels, 3, 3), sign, np.float32), np.zeros(3, np.float32), padding=(1, 1), largest_input=1)
        wanted = reference.run([layer], x)
        middle = (slice(None), slice(None), slice(1, 2), slice(1, 2))
        assert wanted[middle].max() == sign * 9 * channels
        names = ["direct int8"] if channels > 1000 else ["direct int8", "F2 int8", "F4 int8"]
        for name in names:
            one = replace(read(1), weight=np.ones((channels, 1, 1, 1), np.float32), bias=np.zeros(channels, np.float32))
            got = by([one, layer], ["direct", name], x[:, :1], isa)
            assert np.abs(got - wanted).max() < 0.01 * 9 * channels, name


@pytest.mark.parametrize("isa", ALL_SETS)
def test_tiles_as_exact_as_8_bits_are(isa: str) -> None:
    """Against float64: each tile's own scales keep F2 about as exact as the direct algorithm, and F4 within what it amplifies."""
    random = np.random.default_rng(0)
    for into, out, stride in ((40, 17, 1), (64, 64, 1), (300, 20, 1), (40, 48, 2)):
        layer = conv(random, into, out, padding=(1, 1), stride=(stride, stride))
        x = np.maximum(images(3, channels=into, size=(19, 23)), 0)
        layer = replace(layer, largest_input=float(x.max()))
        wanted = reference.run([layer], x)
        errors = {}
        for name in Net([read(into), layer], precision="int8", isa=isa).known[1]:
            if name.endswith("int8"):
                errors[name] = rms(by([read(into), layer], ["direct", name], x, isa) - wanted) / rms(wanted - wanted.mean())
        assert errors["direct int8"] < 0.02
        assert errors["F2 int8"] < 0.03
        assert errors.get("F4 int8", 0) < 0.1


@pytest.mark.skipif("avx512" not in SETS, reason="no AVX-512 here")
def test_the_same_bits_with_vnni_and_without() -> None:
    random = np.random.default_rng(0)
    layer, x = replace(conv(random, 40, 70, padding=(1, 1), relu=True), largest_input=3.3), images(3, channels=40, size=(19, 23))
    for name in ("direct int8", "F2 int8", "F4 int8"):
        vnni, without = (by([read(40), layer], ["direct", name], x, isa) for isa in ("avx512", "avx512bw"))
        assert np.array_equal(vnni, without), name


@pytest.mark.parametrize("isa", SETS)
def test_the_same_bits_alone_and_in_a_batch(isa: str) -> None:
    layers, x = calibrated(plain_net()), images(7)
    known = Net(layers, precision="int8", isa=isa).known
    for preferred in ("direct int8", "F2 int8"):
        names = [preferred if preferred in of else of[0] if of else "" for of in known]
        alone = np.concatenate([by(layers, names, x[i : i + 1], isa, 3) for i in range(7)])
        assert all(np.array_equal(by(layers, names, x, isa, threads), alone) for threads in (1, 2))


def test_which_layers_can() -> None:
    """Those that are calibrated; directly, those that read what a ReLU of a convolution leaves, without groups."""
    known = Net(calibrated(plain_net()), precision="int8").known
    assert [i for i, names in enumerate(known) if "direct int8" in names] == [1]
    assert [i for i, names in enumerate(known) if "F2 int8" in names] == [0, 1, 2, 3, 5]
    layers = calibrated(plain_net())
    assert isinstance(layers[1], Conv)
    layers[1] = replace(layers[1], largest_input=0.0)  # a sensitive one
    assert Net(layers, precision="int8").known[1][0] == "direct int16"
    assert all(names[0].startswith("direct") for names in known if names)
    assert all("int8" not in name for of in Net(calibrated(plain_net()), precision="int16").known for name in of)


def test_what_is_no_number_stays_in_its_image() -> None:
    layers, x = calibrated(plain_net()), images(3)
    names = [of[0] if of else "" for of in Net(layers, precision="int8").known]
    wanted = by(layers, names, x, "")
    x[1, :, 5:9] = np.nan
    assert np.array_equal(np.delete(by(layers, names, x, ""), 1, 0), np.delete(wanted, 1, 0))


def test_without_calibration_it_says_how(tmp_path: Path) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    with pytest.raises(EngineError, match="needs a calibrated model: repvgg quantize MODEL --data DATA --to native --out FOLDER"):
        load(path, precision="int8")


@pytest.mark.parametrize("value", [0, -1, 1e300, 1e-300, True, "1", [1.0], {}])
def test_hostile_ranges_of_a_file(tmp_path: Path, value: Any) -> None:
    path = model_file(tmp_path / "net.safetensors", calibrated(plain_net()))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["repvgg"])
    manifest["layers"][1]["largest_input"] = value
    header["__metadata__"]["repvgg"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(EngineError, match="layer 1 "):
        load(path, precision="int8")


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf, 1e30, 1e-30])
def test_hostile_ranges_of_a_layer(value: float) -> None:
    with pytest.raises(EngineError, match="layer 1 has a largest input that cannot be"):
        Net([read(3), replace(conv(np.random.default_rng(0), 3, 5), largest_input=value)], precision="int8")


@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("passes", [True, False])
def test_the_tuner_keeps_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: str, passes: bool) -> None:
    """Even where no check of a choice passes."""
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "cache"))
    if not passes:
        monkeypatch.setattr(tune, "MOST_CHECKS", 0)
        monkeypatch.setattr(tune, "MOST_PUT_RIGHT", 0)
    path = model_file(tmp_path / "net.safetensors", calibrated(plain_net()))
    net, exact = (load(path, precision="int8", accuracy=a) for a in (accuracy, "exact"))
    assert exact.chosen[1] == "direct int8"
    x = tune.calibration_images(net)
    for kind in np.split(x, len(x) // tune.CALIBRATION_IMAGES):
        wanted = reference.run(net.layers, kind)
        allowed = tune.TIMES_DIRECT["int8", accuracy] * reference.error(exact(kind), wanted)
        assert reference.error(net(kind), wanted) <= allowed * 1.0001
    given = Plan(net.isa, net.precision, tuple(net.chosen))
    assert np.array_equal(load(path, plan=given, threads=1)(x[:1]), net(x)[:1])
