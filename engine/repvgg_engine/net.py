"""A net that runs: the library's, with NumPy arrays in and out.

net = Net(layers)                     # or repvgg_engine.load("a0.safetensors")
logits = net(images)                  # float32 [N, C, H, W], or uint8 [N, H, W, C] with the file's own mean and std applied
"""

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine.files import Preprocessing
from repvgg_engine.layers import Array, Conv, Layer, MaxPool, Pool, SqueezeExcite, in_channels
from repvgg_engine.library import (
    CONV,
    LIBRARY,
    MAX_POOL,
    POOL,
    SQUEEZE_EXCITE,
    EngineError,
    ImagesStruct,
    LayerStruct,
    Message,
    OptionsStruct,
)
from repvgg_engine.machine import available_threads

NETS: "weakref.WeakSet[Net]" = weakref.WeakSet()  # of this process
PRECISIONS = ("fp32", "bf16", "int16", "int8")  # in the order of the library's numbers for them


class Net:
    """A stack of layers. Calls may come from several threads at once; the GIL is free while they compute."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        precision: str = "fp32",
        threads: int | None = None,
        pin: bool = False,
        preprocessing: Preprocessing | None = None,
        classes: list[str] | None = None,
        isa: str | None = None,
    ) -> None:
        """Every convolution is direct at first; see `choose`. isa: by default the best. Raises `EngineError`."""
        if precision not in PRECISIONS:
            raise EngineError(f"no precision {precision!r}: {', '.join(PRECISIONS)}")
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}: it is at least 1")
        self.layers = list(layers)
        self.channels = in_channels(self.layers)
        self.precision, self.preprocessing, self.classes = precision, preprocessing, classes
        self.threads = available_threads() if threads is None else threads
        self.before_first_call: Callable[[Net], None] | None = None  # what chooses the algorithms, once
        self._lock = threading.Lock()  # of that
        structs = (LayerStruct * len(self.layers))(*[_struct(layer) for layer in self.layers])
        options = OptionsStruct(self.threads, pin, PRECISIONS.index(precision), isa.encode(errors="replace") if isa else None)
        message = Message()
        self._net = LIBRARY.repvgg_create(structs, len(structs), options, *message.room)
        message.check(self._net)
        # Not when Python exits: another thread may be in a call then, and the memory goes with the process.
        weakref.finalize(self, LIBRARY.repvgg_destroy, self._net).atexit = False
        self.isa: str = LIBRARY.repvgg_isa(self._net).decode()
        self.known = [self.algorithms(i) for i in range(len(self.layers))]
        self.chosen = [names[0] if names else "" for names in self.known]
        NETS.add(self)

    def __call__(self, images: NDArray[Any]) -> Array:
        """Logits [N, classes], or, of a net that ends before its pool, the feature map [N, C, H, W]. Raises `EngineError`."""
        self.prepare()
        return self.run(images)

    def prepare(self) -> None:
        """Do what the first call would do before it computes; other callers wait."""
        with self._lock:
            if self.before_first_call:
                self.before_first_call(self)
                self.before_first_call = None

    def run(self, images: NDArray[Any]) -> Array:
        """The same, by the algorithms that are chosen now."""
        images = np.asarray(images)
        channels, as_bytes = self.channels, images.dtype == np.uint8
        order = "[N, H, W, C]" if as_bytes else "[N, C, H, W]"
        if images.ndim != 4 or images.shape[3 if as_bytes else 1] != channels or 0 in images.shape:
            raise EngineError(f"images are {order} with {channels} channels, not of shape {list(images.shape)}")
        if not as_bytes and images.dtype != np.float32:
            raise EngineError(f"images are float32 [N, C, H, W] or uint8 [N, H, W, C], not {images.dtype}")
        if as_bytes and self.preprocessing is None:
            raise EngineError("this net has no mean and std: give float32 images")
        if max(images.shape) >= 2**31:
            raise EngineError(f"images of shape {list(images.shape)} are too many or too large")
        images = np.ascontiguousarray(images)
        height, width = images.shape[1:3] if as_bytes else images.shape[2:]
        shape = (ctypes.c_int32 * 3)()
        message = Message()
        message.check(LIBRARY.repvgg_output_shape(self._net, height, width, shape, *message.room))
        output = np.empty((len(images), *shape), np.float32)
        given = ImagesStruct(images.ctypes.data, as_bytes, len(images), height, width)
        if as_bytes:
            scale, shift = self._scale_and_shift()
            given.scale, given.shift = (a.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for a in (scale, shift))
        message.check(LIBRARY.repvgg_run(self._net, given, output.ctypes.data, *message.room))
        return output.reshape(len(images), -1) if any(isinstance(layer, Pool) for layer in self.layers) else output

    def classify(self, photo: "bytes | str | os.PathLike[str]", top: int = 5) -> list[tuple[str, float]]:
        """Return the likeliest classes of a photo, a file or its bytes, with their probabilities, best first. It is prepared as the
        model file says. Needs Pillow. Raises `EngineError` for what is no image, and for a net without classes."""
        from repvgg_engine.images import read_image

        if self.preprocessing is None or not any(isinstance(layer, Pool) for layer in self.layers[:-1]):
            raise EngineError("a backbone, which gives no labels: train a head on it first")
        if top < 1:
            raise EngineError(f"top is {top}: it is at least 1")
        image = read_image(photo if isinstance(photo, bytes) else Path(photo), self.preprocessing)
        logits = self(image[None])[0].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[:top]
        return [(self.classes[i] if self.classes else str(i), float(probabilities[i])) for i in best]

    def algorithms(self, layer: int) -> list[str]:
        """Those that fit a layer: "direct", and Winograd's with m x m outputs a tile, "F2", "F4", ...; in bf16 first "direct bf16",
        "F2 bf16", ..., in int16 "direct int16", ..., in int8 "direct int8", ...; [] for no convolution. The first is the layer's
        until another is chosen."""
        names: list[str] = []
        while name := LIBRARY.repvgg_algorithm(self._net, layer, len(names)):
            names.append(name.decode())
        return names

    def choose(self, layer: int, algorithm: str) -> None:
        """Have a layer computed by one of its algorithms."""
        message = Message()
        message.check(LIBRARY.repvgg_choose(self._net, layer, algorithm.encode(), *message.room))
        self.chosen[layer] = algorithm

    def choose_all(self, algorithms: Sequence[str]) -> None:
        """Choose for every layer, "" for those that are no convolutions."""
        for i, name in enumerate(algorithms):
            if name and name != self.chosen[i]:
                self.choose(i, name)

    def weight_bytes(self, layer: int, algorithm: str) -> int:
        """Of a layer's weights as that algorithm wants them."""
        return int(LIBRARY.repvgg_weight_bytes(self._net, layer, algorithm.encode()))

    def profile(self) -> list[float]:
        """Seconds that threads have computed in each layer since the last call of this function; none before the first."""
        seconds = (ctypes.c_double * len(self.layers))()
        LIBRARY.repvgg_profile(self._net, seconds)
        return list(seconds)

    def _scale_and_shift(self) -> tuple[Array, Array]:
        assert self.preprocessing is not None
        mean, std = (np.array(v, np.float64) for v in (self.preprocessing.mean, self.preprocessing.std))
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def _struct(layer: Layer) -> LayerStruct:
    def address(array: Array, *shape: int) -> int:
        if array.dtype != np.float32 or not array.flags.c_contiguous:
            raise EngineError("weights are contiguous float32")
        if array.shape != shape:
            raise EngineError(f"weights have the shape {array.shape}, where the layer needs {shape}")
        return array.ctypes.data

    if isinstance(layer, Pool):
        return LayerStruct(op=POOL, in_channels=layer.channels)
    if isinstance(layer, MaxPool):
        return LayerStruct(MAX_POOL, layer.channels, 0, layer.kernel, layer.stride, layer.padding)
    if isinstance(layer, SqueezeExcite):
        hidden, channels = layer.reduce.shape
        struct = LayerStruct(op=SQUEEZE_EXCITE, in_channels=channels, out_channels=hidden, relu=layer.relu)
        struct.weight, struct.bias = address(layer.reduce, hidden, channels), address(layer.reduce_bias, hidden)
        struct.weight2, struct.bias2 = address(layer.expand, channels, hidden), address(layer.expand_bias, channels)
        return struct
    assert isinstance(layer, Conv)
    struct = LayerStruct(
        op=CONV, in_channels=layer.in_channels, out_channels=layer.out_channels, groups=layer.groups, relu=layer.relu
    )
    struct.kernel[:], struct.stride[:], struct.padding[:] = layer.weight.shape[2:], layer.stride, layer.padding
    struct.dilation[:], struct.largest_input = layer.dilation, layer.largest_input
    struct.weight, struct.bias = address(layer.weight, *layer.weight.shape), address(layer.bias, layer.out_channels)
    return struct


def _unlock() -> None:
    """Give every net a new lock: in a forked process the old one may be held by a thread that is not here."""
    for net in list(NETS):
        net._lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock)
