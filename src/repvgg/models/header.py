"""The header of one of our safetensors files, read without PyTorch: what `repvgg info` needs to answer at once."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from repvgg.disk import FileError
from repvgg.models.manifest import Manifest

LONGEST = 100_000_000  # bytes of a header, as safetensors has it


@dataclass(frozen=True)
class Header:
    """The manifest of a file, and the shapes of its tensors."""

    manifest: Manifest
    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> Header | None:
    """Return the header of a model file of ours; None for any other file, and for one that is not whole."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST:
                return None
            entries = json.loads(file.read(length))
            manifest = Manifest.from_json(entries.pop("__metadata__")["repvgg"])
            ends = [entry["data_offsets"][1] for entry in entries.values()]
            shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
            whole = path.stat().st_size == 8 + length + max(ends)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return Header(manifest, shapes) if whole else None


@dataclass(frozen=True)
class Row:
    """One layer of a list: what it costs for one image, as `repvgg.measure.costs` counts it."""

    path: str
    operator: str
    geometry: str
    output: tuple[int, ...]
    params: int
    macs: int
    winograd_muls: int


def costs_of(header: Header) -> list[Row]:
    """Return what each layer of a deploy form's list costs. Raises `FileError` where list and tensors do not fit."""
    channels, *sides = header.manifest.preprocessing.input_size
    rows: list[Row] = []
    for layer in header.manifest.layers or []:
        path = layer.get("path") or str(layer.get("weight", "")).removesuffix(".weight")
        tensors = [(name, shape) for name, shape in header.shapes.items() if path and name.startswith(f"{path}.")]
        params, weights = (sum(math.prod(s) for name, s in tensors if name.endswith(end)) for end in ("", ".weight"))
        geometry, macs, muls = "", weights, weights
        if layer["op"] == "conv2d":
            kernel, stride, dilation = layer["kernel_size"], layer["stride"], layer["dilation"]
            reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
            places = zip(sides, layer["padding"], reach, stride, strict=True)
            sides = [(side + 2 * padding - r) // step + 1 for side, padding, r, step in places]
            channels, macs = layer["out_channels"], weights * math.prod(sides)
            winograd = kernel == [3, 3] and {*stride, *dilation} == {1}
            muls = macs // 9 * 4 if winograd else macs
            geometry = "x".join(map(str, kernel)) + "".join(
                f" {mark}{n}" for mark, n in (("/", stride[0]), ("d", dilation[0]), ("g", layer["groups"])) if n != 1
            )
        elif layer["op"] == "global_avg_pool":
            sides = []
        elif layer["op"] == "linear":
            channels = layer["out_features"]
        if path and not params:
            raise FileError(f"its list of layers names {path}, of which it holds no tensors")
        operator = layer["op"] + (" + relu" if layer.get("activation") else "")
        rows.append(Row(path, operator, geometry, (channels, *sides), params, macs, muls))
    return rows
