"""The header of one of our safetensors files, read without PyTorch: what `repvgg info` needs to answer at once."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from repvgg.disk import FileError, plain_file
from repvgg.models.manifest import Manifest
from repvgg.models.names import FAMILY
from repvgg.models.plan import layer_plan

LONGEST = 100_000_000  # bytes of a header, as safetensors has it
PARAMETERS = (".weight", ".bias")  # the ends of their names


@dataclass(frozen=True)
class Header:
    """The manifest of a file, and the shapes of its tensors."""

    manifest: Manifest
    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> Header | None:
    """Return the header of a model file of ours; None for any other file, and for one that is not whole."""
    try:
        with open(plain_file(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123 - a descriptor
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
    """One layer of a list, or one branch of a layer: what it costs for one image, as `repvgg.measure.costs` counts it."""

    path: str
    operator: str
    geometry: str
    output_shape: tuple[int, ...]
    params: int
    macs: int
    winograd_muls: int


def costs_of(header: Header) -> list[Row] | None:
    """Return what each layer of a deploy form's list costs, or each branch of a training form; None of any other network.

    Raises `FileError` where list and tensors do not fit.
    """
    try:
        if header.manifest.layers:
            return _listed(header)
        rows = _branches(header)
    except FileError:
        raise
    except (ValueError, LookupError, TypeError):  # a manifest that lies: who builds the network says where
        return None
    held = sum(math.prod(shape) for name, shape in header.shapes.items() if name.endswith(PARAMETERS))
    return rows if sum(row.params for row in rows) == held else None


def _listed(header: Header) -> list[Row]:
    channels, *sides = header.manifest.preprocessing.input_size
    rows: list[Row] = []
    for layer in header.manifest.layers or []:
        path = layer.get("path") or str(layer.get("weight", "")).removesuffix(".weight")
        geometry = NO_KERNEL
        if layer["op"] == "conv2d":
            geometry = Geometry(*(layer[name] for name in ("kernel_size", "stride", "dilation", "groups")))
            reach = [d * (k - 1) + 1 for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
            places = zip(sides, layer["padding"], reach, geometry.stride, strict=True)
            sides = [(side + 2 * padding - r) // step + 1 for side, padding, r, step in places]
            channels = layer["out_channels"]
        elif layer["op"] == "global_avg_pool":
            sides = []
        elif layer["op"] == "linear":
            channels = layer["out_features"]
        operator = layer["op"] + (" + relu" if layer.get("activation") else "")
        rows.append(_row(header, path, operator, (channels, *sides), geometry))
    return rows


def _branches(header: Header) -> list[Row]:
    """Return the branches of every layer of a RepVGG's training form, and its head. May raise anything for a manifest that lies."""
    arch, sides = header.manifest.arch or {}, list(header.manifest.preprocessing.input_size[1:])
    if (header.manifest.form, header.manifest.keys, arch["block"]) != ("training", "repvgg", "repvgg"):
        raise ValueError("no training form whose branches are known")
    options = ("in_chans", "output_stride", "width", "small_input", "widths")
    rows: list[Row] = []
    numbers = [0] * 5
    for spec in layer_plan(FAMILY[arch["name"]], **{name: arch[name] for name in options if name in arch}):
        layer = f"stages.{spec.stage - 1}.{numbers[spec.stage]}" if spec.stage else "stem"
        numbers[spec.stage] += 1
        sides = [(side - 1) // spec.stride + 1 for side in sides]
        out = (spec.out_channels, *sides)
        for side, branch in ((3, "conv_kxk"), (1, "conv_1x1")):
            path = f"{layer}.block.{branch}"
            if header.shapes[f"{path}.conv.weight"] != (spec.out_channels, spec.in_channels // spec.groups, side, side):
                raise ValueError(f"{path} is of another shape than the architecture's")
            dilation = spec.dilation if side > 1 else 1
            geometry = Geometry([side] * 2, [spec.stride] * 2, [dilation] * 2, spec.groups)
            rows.append(_row(header, path, "conv2d + batch_norm", out, geometry))
        if (spec.in_channels, spec.stride) == (spec.out_channels, 1):
            rows.append(_row(header, f"{layer}.block.identity", "batch_norm", out))
        if f"{layer}.se.reduce.weight" in header.shapes:
            rows.append(_row(header, f"{layer}.se", "squeeze_excite", out))
    if arch["num_classes"]:
        rows.append(_row(header, "head", "linear", (arch["num_classes"],)))
    if any(name.startswith("auxiliary.") for name in header.shapes):
        rows.append(replace(_row(header, "auxiliary", "in training alone", ()), macs=0, winograd_muls=0))
    return rows


@dataclass(frozen=True)
class Geometry:
    """The kernel of a convolution and how it moves; () of any other operator."""

    kernel: Sequence[int] = ()
    stride: Sequence[int] = (1,)
    dilation: Sequence[int] = (1,)
    groups: int = 1

    def __str__(self) -> str:
        """Return "3x3 /2 d2 g4", leaving out what is 1."""
        marks = (("/", self.stride[0]), ("d", self.dilation[0]), ("g", self.groups))
        return "x".join(map(str, self.kernel)) + "".join(f" {mark}{number}" for mark, number in marks if number != 1)


NO_KERNEL = Geometry()


def _row(header: Header, path: str, operator: str, output: tuple[int, ...], geometry: Geometry = NO_KERNEL) -> Row:
    tensors = [shape for name, shape in header.shapes.items() if path and name.startswith(f"{path}.") and name.endswith(PARAMETERS)]
    if path and not tensors:
        raise FileError(f"its list of layers names {path}, of which it holds no tensors")
    weights = sum(math.prod(shape) for shape in tensors if len(shape) > 1)  # those of a batch norm multiply nothing that is counted
    macs = weights * math.prod(output[1:]) if geometry.kernel else weights
    winograd = list(geometry.kernel) == [3, 3] and {*geometry.stride, *geometry.dilation} == {1}
    return Row(path, operator, str(geometry), (1, *output), sum(map(math.prod, tensors)), macs, macs // 9 * 4 if winograd else macs)
