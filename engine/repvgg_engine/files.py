"""Model files of `repvgg` in deploy form, without PyTorch: safetensors whose metadata lists the layers one by one.

Files of strangers are hostile: every length is checked against the file's before it is used, and whatever is wrong becomes one
`EngineError` that names the file. Weights are read into memory, once: what happens to the file afterwards changes no answer.
"""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine.layers import Array, Conv, Layer, Pool, SqueezeExcite
from repvgg_engine.library import EngineError

FORMAT_VERSION = 1
MOST_HEADER = 100_000_000
# Of mean / std and of std: far from what float32 holds, and farther from any that makes sense.
MOST_SHIFT = 1e15
CHANGED = "changed while it was read: write model files beside the old ones, and rename them"
DTYPES = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class Preprocessing:
    """From image to input: resize the short side, crop the centre, scale to 0..1, subtract mean, divide by std."""

    height: int
    width: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Model:
    """What a file holds."""

    layers: list[Layer]
    preprocessing: Preprocessing
    classes: list[str] | None


def read(path: Path) -> Model:
    """Return the model of a file. Raises `EngineError`."""
    try:
        # Without O_NONBLOCK a named pipe would wait for somebody to write into it.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return _Reader(file).model()
        finally:
            os.close(file)
    except EngineError as error:
        raise EngineError(_one_line(f"{path}: {error}")) from None
    except OSError as error:
        raise EngineError(_one_line(f"{path}: cannot be read ({error.strerror})")) from None
    except MemoryError:
        raise EngineError(_one_line(f"{path}: there is not enough memory for its weights")) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise EngineError(_one_line(f"{path}: not a model file, or a damaged one ({reason})")) from None


class _Reader:
    def __init__(self, file: int) -> None:
        self.file, self.before = file, os.fstat(file)
        if not stat.S_ISREG(self.before.st_mode):
            raise EngineError(f"is a {'folder' if stat.S_ISDIR(self.before.st_mode) else 'device or a pipe'}, not a model file")
        start = self._bytes(0, min(8, self.before.st_size))
        length = int.from_bytes(start.tobytes(), "little")
        if len(start) < 8 or not 2 <= length <= min(self.before.st_size - 8, MOST_HEADER):
            raise EngineError("is not a safetensors file, or is truncated")
        self.header = json.loads(self._bytes(8, length).tobytes())
        if not isinstance(self.header, dict):
            raise EngineError("has a header that is no dictionary")
        self.data, self.left = 8 + length, self.before.st_size - 8 - length

    def _bytes(self, start: int, length: int) -> NDArray[np.uint8]:
        """Return so many bytes of the file."""
        data = np.empty(length, np.uint8)
        done = 0
        while done < length:
            got = os.preadv(self.file, [data.data[done:]], start + done)
            if got == 0:
                raise EngineError(CHANGED)
            done += got
        return data

    def _check_unchanged(self) -> None:
        """Refuse a file that was written to while it was read: its weights may be of two models."""
        now = os.fstat(self.file)
        if (now.st_size, now.st_mtime_ns) != (self.before.st_size, self.before.st_mtime_ns):
            raise EngineError(CHANGED)

    def model(self) -> Model:
        metadata = self.header.pop("__metadata__", {})
        if "repvgg" not in metadata:
            raise EngineError("has no list of layers: write it with repvgg convert")
        manifest = json.loads(metadata["repvgg"])
        if manifest["format_version"] != FORMAT_VERSION:
            raise EngineError(
                f"is of format version {manifest['format_version']!r}, this engine reads {FORMAT_VERSION}: upgrade it"
            )
        if manifest["form"] != "deploy":
            raise EngineError("is in training form: run repvgg convert on it first")
        if not isinstance(manifest["layers"], list) or not manifest["layers"]:
            raise EngineError("has no list of layers: this network is no plain stack")
        given = manifest["preprocessing"]
        channels, height, width = (_number(n, 1, 8192) for n in given["input_size"])
        mean, std = (tuple(float(x) for x in given[name]) for name in ("mean", "std"))
        if not len(mean) == len(std) == channels:
            raise EngineError("has a mean and std that do not fit its channels")
        if not all(1 / MOST_SHIFT < s < MOST_SHIFT and abs(m) <= MOST_SHIFT * s for m, s in zip(mean, std, strict=True)):
            raise EngineError(f"has a mean {list(mean)} and std {list(std)} that turn images into no finite numbers")
        preprocessing = Preprocessing(height, width, _number(given["resize"], 1, 8192), str(given["interpolation"]), mean, std)
        layers: list[Layer] = []
        sides: tuple[int, ...] = (height, width)
        for i, spec in enumerate(manifest["layers"]):
            try:
                layer, channels, sides = self._layer(spec, channels, sides)
            except EngineError as error:
                raise EngineError(f"layer {i} {error}") from None
            layers.append(layer)
        classes = manifest.get("classes")
        if classes is not None and (not all(isinstance(c, str) for c in classes) or len(classes) != channels):
            raise EngineError("has class names that do not fit its outputs")
        self._check_unchanged()
        return Model(layers, preprocessing, classes)

    def _layer(self, spec: dict[str, Any], channels: int, sides: tuple[int, ...]) -> tuple[Layer, int, tuple[int, ...]]:
        """The layer, and the channels and sides of what it gives for a map of so many channels and those sides."""
        op = spec["op"]
        if spec.get("activation") not in (None, "relu"):
            raise EngineError(f"has an unknown activation, {spec['activation']!r}")
        relu = spec.get("activation") == "relu"
        if op == "conv2d" and sides:
            out, groups = _number(spec["out_channels"]), _number(spec["groups"])
            kernel, stride, dilation = (_pair(spec[name]) for name in ("kernel_size", "stride", "dilation"))
            padding = _pair(spec["padding"], 0)
            if _number(spec["in_channels"]) != channels or channels % groups or out % groups:
                raise EngineError("has channels that do not fit the layer before it, or its groups")
            weight = self._tensor(spec["weight"], (out, channels // groups, *kernel))
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(2 * p > r or s + 2 * p <= r for s, p, r in zip(sides, padding, reach, strict=True)):
                raise EngineError("is a convolution that cannot be, by its kernel, padding and dilation")
            after = tuple((s + 2 * p - r - 1) // t + 1 for s, p, r, t in zip(sides, padding, reach, stride, strict=True))
            return Conv(weight, self._tensor(spec["bias"], (out,)), stride, padding, dilation, groups, relu), out, after
        if op == "squeeze_excite" and sides:
            path, hidden = spec["path"], self._rows(f"{spec['path']}.reduce.weight")
            if _number(spec["channels"]) != channels:
                raise EngineError("has channels that do not fit the layer before it")
            reduce = self._tensor(f"{path}.reduce.weight", (hidden, channels, 1, 1)).reshape(hidden, channels)
            expand = self._tensor(f"{path}.expand.weight", (channels, hidden, 1, 1)).reshape(channels, hidden)
            biases = self._tensor(f"{path}.reduce.bias", (hidden,)), self._tensor(f"{path}.expand.bias", (channels,))
            return SqueezeExcite(reduce, biases[0], expand, biases[1], relu), channels, sides
        if op == "global_avg_pool" and sides:
            return Pool(channels), channels, ()
        if op == "linear" and not sides:
            out = _number(spec["out_features"])
            if _number(spec["in_features"]) != channels:
                raise EngineError("has channels that do not fit the layer before it")
            weight = self._tensor(spec["weight"], (out, channels)).reshape(out, channels, 1, 1)
            return Conv(weight, self._tensor(spec["bias"], (out,)), relu=relu), out, ()
        known = op in ("conv2d", "squeeze_excite", "global_avg_pool", "linear")
        raise EngineError(f"is {op!r}, which " + ("cannot stand there" if known else "this engine does not know"))

    def _rows(self, name: str) -> int:
        if name not in self.header or not self.header[name]["shape"]:
            raise EngineError(f"wants a tensor {name}, which the file lacks")
        return _number(self.header[name]["shape"][0])

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self.header:
            raise EngineError(f"wants a tensor {name}, which the file lacks")
        entry = self.header[name]
        if entry["dtype"] not in DTYPES:
            raise EngineError(f"has {name} of type {entry['dtype']}: {', '.join(DTYPES)} are read")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        size = self.before.st_size - self.data
        start, end = (_number(n, 0, size) for n in entry["data_offsets"])
        if tuple(entry["shape"]) != shape or end - start != math.prod(shape) * dtype.itemsize:
            raise EngineError(f"has {name} of shape {entry['shape']} in {end - start} bytes, not {list(shape)} in {entry['dtype']}")
        self.left -= end - start  # or a small file could hold as many layers as fill the memory
        if self.left < 0:
            raise EngineError(f"has {name}, whose bytes belong to other layers too")
        raw: NDArray[Any] = self._bytes(self.data + start, end - start).view(dtype.newbyteorder("<"))
        if entry["dtype"] == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            array: Array = np.ascontiguousarray(raw, np.float32).reshape(shape)
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise EngineError(f"has NaN or Inf in {name}: the file is damaged, or training diverged")
        return array


def _number(value: Any, least: int = 1, most: int = 2**20) -> int:
    if type(value) is not int or not least <= value <= most:
        raise EngineError(f"has {value!r} where a number from {least} to {most} belongs")
    return value


def _pair(values: Any, least: int = 1) -> tuple[int, int]:
    first, second = values
    return _number(first, least, 2**16), _number(second, least, 2**16)


def _one_line(text: str) -> str:
    """A stranger's words on one printable line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]
