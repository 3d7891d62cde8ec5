"""What a net should give: the same layers in float64, by NumPy. Slow, and what every error is measured against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine.layers import Conv, Layer, Pool, SqueezeExcite

Array64 = NDArray[np.float64]


def run(layers: Sequence[Layer], images: NDArray[Any]) -> Array64:
    """The output of a net, float64, for images [N, C, H, W]: [N, classes], or [N, C, H, W] where no layer pools."""
    outputs = [_run_one(layers, image.astype(np.float64)) for image in images]
    pooled = any(isinstance(layer, Pool) for layer in layers)
    return np.stack([y.reshape(-1) if pooled else y for y in outputs])


def _run_one(layers: Sequence[Layer], x: Array64) -> Array64:
    for layer in layers:
        if isinstance(layer, Conv):
            x = conv(layer, x)
        elif isinstance(layer, SqueezeExcite):
            hidden = np.maximum(layer.reduce.astype(np.float64) @ x.mean((1, 2)) + layer.reduce_bias, 0)
            gate = 0.5 + 0.5 * np.tanh((layer.expand.astype(np.float64) @ hidden + layer.expand_bias) / 2)  # the sigmoid
            x = x * gate[:, None, None]
        else:
            x = x.mean((1, 2), keepdims=True)
        if not isinstance(layer, Pool) and layer.relu:
            x = np.maximum(x, 0)
    return x


def conv(layer: Conv, x: Array64) -> Array64:
    """One image [C, H, W] through a convolution, without its ReLU: a matrix product for each tap of the kernel."""
    out, depth, rows, columns = layer.weight.shape
    (sy, sx), (py, px), (dy, dx) = layer.stride, layer.padding, layer.dilation
    x = np.pad(x, ((0, 0), (py, py), (px, px)))
    height, width = (x.shape[1] - dy * (rows - 1) - 1) // sy + 1, (x.shape[2] - dx * (columns - 1) - 1) // sx + 1
    y = np.zeros((layer.groups, out // layer.groups, height * width))
    weight = layer.weight.astype(np.float64).reshape(layer.groups, out // layer.groups, depth, rows, columns)
    for i in range(rows):
        for j in range(columns):
            seen = x[:, i * dy : i * dy + sy * (height - 1) + 1 : sy, j * dx : j * dx + sx * (width - 1) + 1 : sx]
            y += weight[..., i, j] @ seen.reshape(layer.groups, depth, height * width)
    return y.reshape(out, height, width) + layer.bias.astype(np.float64)[:, None, None]


def error(got: NDArray[Any], wanted: Array64) -> float:
    """Root mean square of the error, relative to how much the wanted output differs from image to image: what is the same for
    every image tells nothing, and must not hide an error."""
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean((wanted - wanted.mean(0)) ** 2)))
