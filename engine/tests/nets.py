"""Small nets and model files for the tests, and what of the C interface only programs in C call."""

import ctypes
import json
import os
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from repvgg_engine import Net, instruction_sets, reference
from repvgg_engine.files import Preprocessing
from repvgg_engine.layers import Array, Conv, Layer, Pool, SqueezeExcite
from repvgg_engine.library import LIBRARY, ImagesStruct, Message

HAS_BF16 = "bf16" in instruction_sets() and os.environ.get("REPVGG_ENGINE_ISA", "avx512") == "avx512"
PREPROCESSING = Preprocessing(32, 32, 32, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class OpenOptionsStruct(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("plan", c_char_p),
        ("plan_text", c_char_p),
        ("isa", c_char_p),
        ("threads", c_int32),
        ("pin", c_int32),
        ("features", c_int32),
    ]


LIBRARY.repvgg_open.argtypes = [c_char_p, POINTER(OpenOptionsStruct), c_char_p, c_size_t]
LIBRARY.repvgg_open.restype = c_void_p
LIBRARY.repvgg_work.argtypes = [c_void_p, c_int32, POINTER(ImagesStruct), POINTER(c_int64), c_int32, c_char_p, c_size_t]


def work(net: Net, layer: int, n: int, size: tuple[int, int]) -> list[int]:
    """Multiplications, in vectors, of each piece that a convolution of n images of that size is cut into."""
    given, message = ImagesStruct(n=n, height=size[0], width=size[1]), Message()

    def noted(room: Any) -> int:
        return message.check(LIBRARY.repvgg_work(net._net, layer, given, room, len(room), *message.room))

    pieces = (c_int64 * noted((c_int64 * 0)()))()
    assert noted(pieces) == len(pieces)
    return list(pieces)


def conv(random: np.random.Generator, into: int, out: int, kernel: int = 3, **options: Any) -> Conv:
    """Weights that keep the variance."""
    depth = into // options.get("groups", 1)
    weight = random.standard_normal((out, depth, kernel, kernel)) * (2 / (depth * kernel**2)) ** 0.5
    return Conv(weight.astype(np.float32), (random.standard_normal(out) * 0.1).astype(np.float32), **options)


def plain_net(seed: int = 0, classes: int = 10) -> list[Layer]:
    """Every operator once: strides, groups, dilation, squeeze-excite, pool, linear."""
    random = np.random.default_rng(seed)
    same: dict[str, Any] = {"padding": (1, 1), "relu": True}
    excite = [(random.standard_normal(shape) * 0.3).astype(np.float32) for shape in ((3, 48), (3,), (48, 3), (48,))]
    return [
        conv(random, 3, 24, stride=(2, 2), **same),
        conv(random, 24, 40, **same),
        conv(random, 40, 40, groups=2, **same),
        conv(random, 40, 48, stride=(2, 2), padding=(1, 1)),
        SqueezeExcite(excite[0], excite[1], excite[2], excite[3], relu=True),
        conv(random, 48, 48, padding=(2, 2), dilation=(2, 2), relu=True),
        Pool(48),
        conv(random, 48, classes, kernel=1),
    ]


def calibrated(layers: list[Layer], seed: int = 2) -> list[Layer]:
    """The same layers, convolutions with the largest number that their input has for some images."""
    found: list[Layer] = []
    x = images(8, seed).astype(np.float64)
    for layer in layers:
        found.append(replace(layer, largest_input=float(np.abs(x).max())) if isinstance(layer, Conv) else layer)
        x = reference.run([layer], x)
        x = x[:, :, None, None] if isinstance(layer, Pool) else x
    return found


def images(n: int = 4, seed: int = 1, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Array:
    return np.random.default_rng(seed).standard_normal((n, channels, *size)).astype(np.float32)


def model_file(path: Path, layers: list[Layer], **changes: Any) -> Path:
    """A model file as repvgg writes it. changes: of the manifest."""
    tensors: dict[str, Array] = {}
    specs: list[dict[str, Any]] = []
    pooled = False
    for i, layer in enumerate(layers):
        if isinstance(layer, Pool):
            pooled = True
            specs.append({"op": "global_avg_pool"})
            continue
        spec: dict[str, Any] = {"activation": "relu" if isinstance(layer, Conv | SqueezeExcite) and layer.relu else None}
        if isinstance(layer, SqueezeExcite):
            spec |= {"op": "squeeze_excite", "channels": len(layer.expand), "path": f"l{i}"}
            tensors |= {f"l{i}.reduce.weight": layer.reduce[..., None, None], f"l{i}.reduce.bias": layer.reduce_bias}
            tensors |= {f"l{i}.expand.weight": layer.expand[..., None, None], f"l{i}.expand.bias": layer.expand_bias}
        else:
            assert isinstance(layer, Conv)  # files hold no others
            spec |= {"weight": f"l{i}.weight", "bias": f"l{i}.bias"}
            tensors |= {f"l{i}.weight": layer.weight[:, :, 0, 0] if pooled else layer.weight, f"l{i}.bias": layer.bias}
            if pooled:
                spec |= {"op": "linear", "in_features": layer.in_channels, "out_features": layer.out_channels}
            else:
                spec |= {"op": "conv2d", "in_channels": layer.in_channels, "out_channels": layer.out_channels}
                spec |= {"kernel_size": layer.weight.shape[2:], "stride": layer.stride, "padding": layer.padding}
                spec |= {"dilation": layer.dilation, "groups": layer.groups}
                spec |= {"largest_input": layer.largest_input} if layer.largest_input else {}
        specs.append(spec)
    p = PREPROCESSING
    preprocessing = {
        "input_size": [3, p.height, p.width],
        "resize": p.resize,
        "interpolation": p.interpolation,
        "mean": p.mean,
        "std": p.std,
    }
    manifest = {"format_version": 1, "form": "deploy", "layers": specs, "preprocessing": preprocessing, "classes": None, **changes}
    write(path, tensors, manifest)
    return path


def write(path: Path, tensors: dict[str, Array], manifest: dict[str, Any]) -> None:
    """Safetensors by hand."""
    header: dict[str, Any] = {"__metadata__": {"repvgg": json.dumps(manifest)}}
    data = b""
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += np.ascontiguousarray(tensor).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
