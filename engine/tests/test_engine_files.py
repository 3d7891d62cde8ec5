"""Model files: what is read, and what strangers may try."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from nets import conv, images, model_file, plain_net, write
from repvgg_engine import EngineError, Net, load


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return model_file(tmp_path / "net.safetensors", plain_net(), classes=[f"class {i}" for i in range(10)])


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_what_is_read(path: Path) -> None:
    net = load(path, accuracy="exact")
    assert np.array_equal(net(images()), Net(plain_net())(images()))
    assert net.classes is not None
    assert net.classes[3] == "class 3"
    features = load(path, accuracy="exact", features=True)(images())
    assert features.shape == (4, 48, 8, 8)


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16"])
def test_other_types_of_weights(path: Path, dtype: str) -> None:
    header, data = parts(path)
    values = np.frombuffer(data, np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values.astype({"F64": "f8", "F16": "f2"}[dtype])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["dtype"] = dtype
            entry["data_offsets"] = [offset * raw.itemsize // 4 for offset in entry["data_offsets"]]
    put(path, header, b"" + raw.tobytes())
    got, wanted = load(path, accuracy="exact")(images()), Net(plain_net())(images())
    assert np.abs(got - wanted).max() < (0.2 if dtype == "BF16" else 1e-2) * np.abs(wanted).max()


def change(entry: str, **values: Any) -> Any:
    return lambda header, data: (header[entry].update(values), data)[1]


def manifest(**values: Any) -> Any:
    def changed(header: dict[str, Any], data: bytes) -> bytes:
        text = json.loads(header["__metadata__"]["repvgg"])
        header["__metadata__"]["repvgg"] = json.dumps({**text, **values})
        return data

    return changed


def preprocessing(**values: Any) -> Any:
    given = {"input_size": [3, 32, 32], "resize": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    return manifest(preprocessing=given | values)


def layer(index: int, **values: Any) -> Any:
    def changed(header: dict[str, Any], data: bytes) -> bytes:
        text = json.loads(header["__metadata__"]["repvgg"])
        text["layers"][index].update(values)
        header["__metadata__"]["repvgg"] = json.dumps(text)
        return data

    return changed


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (manifest(form="training"), "is in training form: run repvgg convert"),
        (manifest(format_version=2), "format version 2"),
        (manifest(layers=None), "has no list of layers"),
        (manifest(layers=[]), "has no list of layers"),
        (manifest(layers=[3]), "layer 0 lacks 'op'"),
        (manifest(classes=["one"]), "class names that do not fit"),
        (manifest(preprocessing={"input_size": [3, 32, 10**9]}), "1000000000"),
        (preprocessing(mean=[0.5, 1e300, 0.5]), "mean and std that turn images into no finite numbers"),
        (preprocessing(std=[0.5, 1e-300, 0.5]), "no finite numbers"),
        (preprocessing(std=[0.5, float("nan"), 0.5]), "is not JSON"),
        (layer(2, weight="l1.weight", in_channels=40, groups=1), "layer 2 has l1.weight"),
        (lambda header, data: (header.pop("__metadata__"), data)[1], "has no list of layers"),
        (lambda header, data: (header.pop("l1.weight"), data)[1], "layer 1 wants a tensor l1.weight, which the file lacks"),
        (lambda header, data: data[:-4], "layer 7 has 222132 where a number"),
        (change("l1.weight", dtype="I64"), "layer 1 has l1.weight of type I64"),
        (change("l1.weight", shape=[40, 24, 3, 2]), "l1.weight of shape"),
        (change("l1.weight", data_offsets=[-4, 4]), "layer 1 has -4 where a number"),
        (change("l1.weight", data_offsets=[0, 10**12]), "where a number"),
        (change("l1.weight", data_offsets=[0.0, 4]), "where a number"),
        (layer(1, op="conv3d"), "layer 1 is 'conv3d', which this engine does not know"),
        (layer(6, op="linear"), "layer 6 is 'linear', which cannot stand there"),
        (layer(1, activation="gelu"), "layer 1 has an unknown activation, 'gelu'"),
        (layer(1, in_channels=23), "layer 1 has channels that do not fit"),
        (layer(1, groups=5), "layer 1 has channels that do not fit"),
        (layer(1, stride=[0, 1]), "layer 1 has 0 where a number"),
        (layer(1, padding=[9, 9]), "layer 1 is a convolution that cannot be"),
        (layer(1, dilation=[50, 50]), "layer 1 is a convolution that cannot be"),
        (layer(1, kernel_size=[3]), "layer 1 has a list of 1 where two numbers belong"),
        (layer(4, channels=47), "layer 4 has channels"),
        (lambda header, data: b"\xff" * len(data), "layer 0 has NaN or Inf in l0.weight"),
    ],
)
def test_what_is_refused(path: Path, attack: Any, reason: str) -> None:
    header, data = parts(path)
    put(path, header, attack(header, data))
    with pytest.raises(EngineError, match=reason) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a safetensors file"),
        (b"PK\x03\x04 a zip file, which might be a pickle", "is not a safetensors file"),
        (b"\xff" * 64, "is not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "header that is no dictionary"),
        ((8).to_bytes(8, "little") + b"{" * 8, "is not JSON, or damaged"),
        ((100000).to_bytes(8, "little") + b"[" * 100000, "is JSON too deep"),
    ],
)
def test_what_is_no_model_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=reason):
        load(path)


def test_a_file_changed_under_a_net(path: Path, tmp_path: Path) -> None:
    """Overwritten, truncated or removed between calls of one image and of many, which take their weights at different times."""
    other = model_file(tmp_path / "other.safetensors", plain_net(seed=1)).read_bytes()
    for change in (lambda: path.write_bytes(other), lambda: path.write_bytes(b""), path.unlink):
        model_file(path, plain_net())
        net = load(path, accuracy="exact", threads=1)
        few, many = Net(plain_net())(images(1)), Net(plain_net())(images(8))
        assert np.array_equal(net(images(1)), few)
        change()
        assert np.array_equal(net(images(8)), many)
        net.choose(1, "F2")
        assert np.allclose(net(images(8)), many, atol=1e-4)


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>
ssize_t pread(int file, void *to, size_t n, off_t at) {
    static int reads;
    if (++reads == 5) truncate(getenv("VICTIM"), atoi(getenv("BYTES")));
    return ((ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread"))(file, to, n, at);
}
ssize_t pread64(int file, void *to, size_t n, off_t at) { return pread(file, to, n, at); }
"""


@pytest.mark.parametrize("bytes_left", [0, 10**6])
def test_a_file_changed_while_it_is_read(path: Path, tmp_path: Path, bytes_left: int) -> None:
    """Cut, or grown, under the library's fifth read."""
    if shutil.which("cc") is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", tmp_path / "shim.c", "-o", tmp_path / "shim.so", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so"), "VICTIM": str(path), "BYTES": str(bytes_left)}
    code = "import sys, repvgg_engine; repvgg_engine.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment)
    assert "changed while it was read" in done.stderr


def test_a_named_pipe_is_no_model_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngineError, match="is a device or a pipe, not a model file"):
        load(tmp_path / "pipe")


def test_three_thousand_layers_of_one_tensor(tmp_path: Path) -> None:
    """They would take gigabytes from a file of a megabyte."""
    layers = [conv(np.random.default_rng(0), 64, 64, padding=(1, 1)) for _ in range(2)]
    path = model_file(tmp_path / "net.safetensors", [conv(np.random.default_rng(0), 3, 64), *layers])
    header, data = parts(path)
    text = json.loads(header["__metadata__"]["repvgg"])
    text["layers"] += [text["layers"][1]] * 3000
    header["__metadata__"]["repvgg"] = json.dumps(text)
    put(path, header, data)
    with pytest.raises(EngineError, match=r"layer 3 has l1\.weight, whose bytes belong to other layers too"):
        load(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="No such file"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(EngineError, match="is a folder"):
        load(tmp_path)
    path = model_file(tmp_path / "net.safetensors", plain_net())
    with pytest.raises(EngineError, match="no accuracy 'low'"):
        load(path, accuracy="low")
    with pytest.raises(EngineError, match="memory_limit is 0"):
        load(path, memory_limit=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(position=st.floats(0, 1), byte=st.integers(0, 255), end=st.floats(0, 1))
def test_damaged_files_raise_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, position: float, byte: int, end: float
) -> None:
    path = model_file(tmp_path_factory.mktemp("damaged") / "net.safetensors", plain_net())
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[int(position * (header - 1))] = byte
    path.write_bytes(raw[: int(len(raw) * end)] if end < 0.3 else raw)
    with suppress(EngineError):  # anything else fails the test
        load(path, accuracy="exact", threads=1)(images(1))


def test_a_lying_squeeze_excite(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {}, {})
    header, data = parts(path)
    header["l4.reduce.weight"]["shape"] = []
    put(path, header, data)
    with pytest.raises(EngineError, match=r"layer 4 wants a tensor l4.reduce.weight"):
        load(path)
