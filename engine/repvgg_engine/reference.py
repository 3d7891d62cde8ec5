"""What a net should give: the same layers in float64, by NumPy. Slow, and what every error is measured against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine.layers import Conv, Layer, MaxPool, Pool, SqueezeExcite

Array64 = NDArray[np.float64]


def run(layers: Sequence[Layer], images: NDArray[Any], dtype: Any = np.float64) -> NDArray[Any]:
    """Return the output of a net for images [N, C, H, W]: [N, classes], or [N, C, H, W] where no layer pools.

    dtype: of all numbers and sums; float32 shows what rounding alone does.
    """
    x = images.astype(dtype)
    for layer in layers:
        if isinstance(layer, Conv):
            x = conv(layer, x)
        elif isinstance(layer, SqueezeExcite):
            reduce, expand = layer.reduce.astype(x.dtype), layer.expand.astype(x.dtype)
            hidden = np.maximum(x.mean((2, 3)) @ reduce.T + layer.reduce_bias, 0)
            gate = 0.5 + 0.5 * np.tanh((hidden @ expand.T + layer.expand_bias) / 2)  # the sigmoid
            x = x * gate[:, :, None, None]
        elif isinstance(layer, MaxPool):
            x = max_pool(layer, x)
        else:
            x = x.mean((2, 3), keepdims=True)
        if isinstance(layer, Conv | SqueezeExcite) and layer.relu:
            x = np.maximum(x, 0)
    return x.reshape(len(x), -1) if any(isinstance(layer, Pool) for layer in layers) else x


def conv(layer: Conv, x: NDArray[Any]) -> NDArray[Any]:
    """Return images [N, C, H, W] after a convolution, without its ReLU: a matrix product for each tap of the kernel."""
    out, depth, rows, columns = layer.weight.shape
    (sy, sx), (py, px), (dy, dx) = layer.stride, layer.padding, layer.dilation
    x = np.pad(x.swapaxes(0, 1), ((0, 0), (0, 0), (py, py), (px, px)))  # channels first: one product for all images
    n, height, width = x.shape[1], (x.shape[2] - dy * (rows - 1) - 1) // sy + 1, (x.shape[3] - dx * (columns - 1) - 1) // sx + 1
    y = np.zeros((layer.groups, out // layer.groups, n * height * width), x.dtype)
    weight = layer.weight.reshape(layer.groups, out // layer.groups, depth, rows, columns)
    for i in range(rows):
        for j in range(columns):
            seen = x[:, :, i * dy : i * dy + sy * (height - 1) + 1 : sy, j * dx : j * dx + sx * (width - 1) + 1 : sx]
            y += weight[..., i, j].astype(x.dtype) @ seen.reshape(layer.groups, depth, -1)
    y += layer.bias.astype(x.dtype).reshape(layer.groups, -1, 1)
    return y.reshape(out, n, height, width).swapaxes(0, 1)


def max_pool(layer: MaxPool, x: NDArray[Any]) -> NDArray[Any]:
    """Return the largest number of each window of images [N, C, H, W]."""
    (rows, columns), (sy, sx), (py, px) = layer.kernel, layer.stride, layer.padding
    x = np.pad(x, ((0, 0), (0, 0), (py, py), (px, px)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (rows, columns), (2, 3))
    largest: NDArray[Any] = windows[:, :, ::sy, ::sx].max((4, 5))
    return largest


def error(got: NDArray[Any], wanted: Array64) -> float:
    """Root mean square of the error, relative to how much the wanted output differs from image to image: what is the same for
    every image tells nothing, and must not hide an error. Where all of it is the same, relative to its size."""
    told = np.mean((wanted - wanted.mean(0)) ** 2) or np.mean(wanted**2) or 1.0
    return float(np.sqrt(np.mean((got - wanted) ** 2) / told))
