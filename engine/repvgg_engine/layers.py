"""The operators of a net as the engine takes them. A linear layer is a 1x1 convolution of the pooled map."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repvgg_engine.library import EngineError

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Conv:
    """A convolution; then perhaps a ReLU. weight: float32 [out, in / groups, kh, kw]; bias: float32 [out].

    largest_input: as far as calibration knows it, for products of 8 bits; otherwise 0.
    """

    weight: Array
    bias: Array
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    relu: bool = False
    largest_input: float = 0.0

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])


@dataclass(frozen=True)
class SqueezeExcite:
    """Channels times sigmoid(expand(relu(reduce(their means)))); then perhaps a ReLU.

    reduce: float32 [hidden, channels]; expand: float32 [channels, hidden].
    """

    reduce: Array
    reduce_bias: Array
    expand: Array
    expand_bias: Array
    relu: bool = False


@dataclass(frozen=True)
class Pool:
    """The mean of each channel."""

    channels: int


@dataclass(frozen=True)
class MaxPool:
    """The largest number of each channel in each window, which is cut off at the map's edge."""

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)


Layer = Conv | SqueezeExcite | Pool | MaxPool


def in_channels(layers: Sequence[Layer]) -> int:
    """Of the images that the net takes."""
    if not layers or not isinstance(layers[0], Conv):
        raise EngineError("a net has layers, and the first is a convolution")
    return layers[0].in_channels
