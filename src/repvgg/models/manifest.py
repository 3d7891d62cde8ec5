"""The manifest of a model file: what it says of its model, as one JSON text.

It says how to build the model, in which form it is, what its classes are called and how images are prepared; for a
deploy form it also lists the layers one by one, so that an engine without PyTorch, or a pruned net, needs nothing else:

    {"op": "conv2d", "in_channels": 3, "out_channels": 48, "kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1],
     "dilation": [1, 1], "groups": 1, "activation": "relu", "weight": "stem.block.weight", "bias": "stem.block.bias"}
    (a calibrated one also: "largest_input": 3.25, the largest number of its input, for products of 8 bits)
    {"op": "squeeze_excite", "channels": 160, "activation": "relu", "path": "stages.0.0.se"}
    {"op": "global_avg_pool"}
    {"op": "linear", "in_features": 1280, "out_features": 1000, "weight": "head.weight", "bias": "head.bias"}
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from repvgg.disk import FileError, describe
from repvgg.models.names import Task, task_of

FORMAT_VERSION = 1
MOST_NUMBERS = 1 << 25  # in one prepared image: a stranger's file must not ask for gigabytes


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of an image: resize the short side, crop the centre, scale to 0..1, subtract mean, divide by std."""

    input_size: tuple[int, int, int] = (3, 224, 224)
    resize: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or not all(type(n) is int and 1 <= n <= 8192 for n in (*self.input_size, self.resize)):
            raise ValueError("preprocessing: input_size is channels, height, width; sizes are between 1 and 8192 pixels")
        if math.prod(self.input_size) > MOST_NUMBERS:
            raise ValueError(f"preprocessing: input_size {self.input_size} has more than {MOST_NUMBERS:,} numbers")
        if not self.input_size[0] == len(self.mean) == len(self.std) or not all(map(math.isfinite, self.mean)):
            raise ValueError("preprocessing: mean and std need one number for each channel")
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError("preprocessing: std is positive")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"preprocessing: no interpolation {self.interpolation!r}: nearest, bilinear or bicubic")

    def sized(self, size: int) -> "Preprocessing":
        """Return the same for square inputs of `size` pixels. What is cropped away stays the same share; of up to 64 pixels
        nothing."""
        channels, *sides = self.input_size
        resize = round(self.resize * size / min(sides)) if size > 64 else size
        return replace(self, input_size=(channels, size, size), resize=resize)


@dataclass(frozen=True)
class Manifest:
    """The manifest of a model file: its own description of its model.

    arch: the arguments of `create_model`, or None for a net known by its layers alone.

    Raises ValueError or TypeError where it contradicts itself.
    """

    arch: dict[str, Any] | None
    form: str = "training"
    classes: list[str] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    training: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] | None = None
    keys: str = "repvgg"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"arch": dict | None, "classes": list | None, "training": dict, "layers": list | None, "keys": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is of type {type(getattr(self, name)).__name__}")
        if self.form not in ("training", "deploy"):
            raise ValueError(f"no form {self.form!r}: training or deploy")
        if not all(isinstance(name, str) for name in self.classes or []):
            raise TypeError("classes are names")
        if not _is_splitting(self.training.get("splitting")):
            raise ValueError("training: its splitting is no share and seed")
        arch, channels = self.arch or {}, self.preprocessing.input_size[0]
        if arch.get("in_chans", channels) != channels:
            raise ValueError(f"preprocessing for {channels} channels does not fit in_chans={arch['in_chans']}")
        if self.classes is not None and self.outputs not in (None, len(self.classes)):
            raise ValueError(f"{len(self.classes)} class names do not fit {self.outputs} outputs")
        _refuse_misfits(self.layers or [], self.preprocessing.input_size)

    @property
    def task(self) -> Task:
        """Return what the model gives for an image: labels, or masks. The one place where that is asked."""
        return task_of((self.arch or {}).get("name"))

    @property
    def outputs(self) -> int | None:
        """Return how many classes the model tells apart; None of a backbone."""
        return (self.arch or {}).get("num_classes") or (self.layers[-1].get("out_features") if self.layers else None)

    def to_json(self) -> str:
        """Return it as JSON, which has no NaN and no infinity: notes of the training that are such a number become null."""
        return json.dumps(json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote. Raises `FileError` for what is not a manifest that this version reads."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version!r}, this repvgg reads {FORMAT_VERSION}: upgrade repvgg")
            given = raw.pop("preprocessing")
            given.update({name: tuple(given[name]) for name in ("input_size", "mean", "std")})
            return cls(preprocessing=Preprocessing(**given), **raw)
        except Exception as error:  # JSON of a stranger: anything may be missing, or of another type
            raise FileError(f"its manifest cannot be used ({describe(error)})") from None


def _is_splitting(told: Any) -> bool:
    """Say whether it is the share that was held out and the seed of the draw (see data/listing.py), or nothing."""
    if told is None:
        return True
    pair = isinstance(told, list) and len(told) == 2 and isinstance(told[0], float) and type(told[1]) is int
    return pair and 0 < told[0] < 1


def _refuse_misfits(layers: list[dict[str, Any]], input_size: tuple[int, ...]) -> None:
    """Follow channels and sides of the feature map through a list of layers. Raises ValueError at the first that does not fit."""
    names = [spec[key] for spec in layers for key in ("weight", "bias", "path") if key in spec]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the list of layers names {twice[0]} twice")
    channels, sides = input_size[0], input_size[1:]
    for i, spec in enumerate(layers):
        op, before, pooled = spec["op"], channels, not sides
        if op == "conv2d":
            expects, channels = spec["in_channels"], spec["out_channels"]
            geometry = (spec[name] for name in ("kernel_size", "stride", "padding", "dilation"))
            sides = tuple(_side_after(*numbers) for numbers in zip(sides, *geometry, strict=True))
            _refuse_range(spec.get("largest_input"))
        elif op == "linear":
            expects, channels = spec["in_features"], spec["out_features"]
        else:
            expects = spec["channels"] if op == "squeeze_excite" else before
            sides = () if op == "global_avg_pool" else sides
        if expects != before or pooled != (op == "linear"):
            raise ValueError(f"layer {i} of the list, {op}, does not fit the layer before it")


def _refuse_range(largest: Any) -> None:
    if largest is not None and not (type(largest) in (int, float) and 1e-12 <= largest <= 1e12):
        raise ValueError(f"the list of layers has a convolution whose largest input cannot be ({largest!r})")


def _side_after(side: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return a side of the feature map after a convolution that reaches no farther than the map and makes it no larger."""
    numbers, reach = (kernel, stride, padding, dilation), dilation * (kernel - 1)
    sensible = all(type(n) is int and n < 2**31 for n in numbers) and min(kernel, stride, dilation) > 0
    if not (sensible and 0 <= 2 * padding <= reach < side + 2 * padding):
        raise ValueError(f"the list of layers has a convolution that cannot be (kernel, stride, padding, dilation: {numbers})")
    return (side + 2 * padding - reach - 1) // stride + 1
