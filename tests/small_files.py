"""Small model files, whole ones and made by hand."""

import io
import json
import struct
import zipfile
from collections import OrderedDict
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from repvgg.models.checkpoint import METADATA_KEY
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.plain import PlainNet

LAYERS: list[dict[str, Any]] = [
    {
        "op": "conv2d",
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": [3, 3],
        "stride": [2, 2],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "activation": "relu",
        "weight": "stem.block.weight",
        "bias": "stem.block.bias",
    },
    {"op": "squeeze_excite", "channels": 4, "activation": "relu", "path": "stem.se"},
    {"op": "global_avg_pool"},
    {"op": "linear", "in_features": 4, "out_features": 2, "weight": "head.weight", "bias": "head.bias"},
]
SMALL = Preprocessing((3, 16, 16), 16)
MANIFEST = Manifest(None, "deploy", ["cat", "dog"], SMALL, {"epochs": 1}, LAYERS)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return PlainNet(LAYERS).state_dict()


def header(fields: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def ours() -> bytes:
    return save(tensors(), {METADATA_KEY: MANIFEST.to_json()})


def pickled(value: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def archive(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name.replace('_', '.')}", content)
    return buffer.getvalue()


def repacked(whole: bytes, compression: int) -> bytes:
    """A checkpoint of PyTorch, packed again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


TWO = struct.pack("<2f", 1, 2)


def with_attribute(name: str, value: Any) -> OrderedDict[str, Tensor]:
    state = OrderedDict(tensors())
    vars(state)[name] = value
    return state
