"""Model files of `repvgg` in deploy form, without PyTorch. The library reads them, and refuses what is hostile (src/model.cpp)."""

import ctypes
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_engine.layers import Array, Conv, Layer, Pool, SqueezeExcite
from repvgg_engine.library import LIBRARY, POOL, SQUEEZE_EXCITE, DescriptionStruct, EngineError, LayerStruct, Message


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


class _File:
    """The library's model, whose memory lives as long as anything that refers to it."""

    def __init__(self, path: Path) -> None:
        name, message = os.fsencode(path), Message()
        if b"\0" in name:
            raise EngineError("a path has no character 0")
        self.pointer = message.check(LIBRARY.repvgg_read(name, *message.room))
        weakref.finalize(self, LIBRARY.repvgg_free, self.pointer).atexit = False

    def describe(self) -> DescriptionStruct:
        description = DescriptionStruct(size=ctypes.sizeof(DescriptionStruct))
        LIBRARY.repvgg_describe(self.pointer, description)
        return description

    def array(self, address: int, *shape: int) -> Array:
        """Return numbers of the model, which stays for them."""
        numbers: Any = (ctypes.c_float * int(np.prod(shape))).from_address(address)
        numbers.file = self
        array: Array = np.frombuffer(numbers, np.float32).reshape(shape)
        array.flags.writeable = False
        return array


def read(path: Path) -> Model:
    """Return the model of a file. Raises `EngineError`."""
    file = _File(path)
    about = file.describe()
    mean, std = (tuple(numbers[: about.channels]) for numbers in (about.mean, about.std))
    preprocessing = Preprocessing(about.height, about.width, about.resize, about.interpolation.decode(), mean, std)
    layers = [_layer(file, about.layers[i]) for i in range(about.layer_count)]
    classes = [about.classes[i].decode(errors="replace") for i in range(about.class_count)]
    return Model(layers, preprocessing, classes or None)


def _layer(file: _File, struct: LayerStruct) -> Layer:
    into, out, relu = struct.in_channels, struct.out_channels, bool(struct.relu)
    if struct.op == POOL:
        return Pool(into)
    if struct.op == SQUEEZE_EXCITE:
        reduce, expand = file.array(struct.weight, out, into), file.array(struct.weight2, into, out)
        return SqueezeExcite(reduce, file.array(struct.bias, out), expand, file.array(struct.bias2, into), relu)
    weight = file.array(struct.weight, out, into // struct.groups, *struct.kernel)
    stride, padding, dilation = ((pair[0], pair[1]) for pair in (struct.stride, struct.padding, struct.dilation))
    return Conv(weight, file.array(struct.bias, out), stride, padding, dilation, struct.groups, relu, struct.largest_input)
