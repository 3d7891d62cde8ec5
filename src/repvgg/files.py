"""Model files: safetensors whose metadata carries one JSON manifest under the key "repvgg".

The manifest says how to build the model, in which form it is, what its classes are called and how images are prepared; for a
deploy form it also lists the layers one by one, so that an engine without PyTorch, or a pruned net, needs nothing else:

    {"op": "conv2d", "in_channels": 3, "out_channels": 48, "kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1],
     "dilation": [1, 1], "groups": 1, "activation": "relu", "weight": "stem.block.weight", "bias": "stem.block.bias"}
    {"op": "squeeze_excite", "channels": 160, "activation": "relu", "path": "stages.0.0.se"}
    {"op": "global_avg_pool"}
    {"op": "linear", "in_features": 1280, "out_features": 1000, "weight": "head.weight", "bias": "head.bias"}

Files of strangers are hostile: no pickle is executed, sizes are checked before memory is taken, and whatever is wrong becomes
one `FileError`. Files of ours are written whole or not at all.
"""

import io
import json
import math
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT_VERSION = 1
METADATA_KEY = "repvgg"
PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".tar"}
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")
ZIP = b"PK\x03\x04"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FileError(ValueError):
    """A model file that is missing, damaged, of another kind or hostile; the message names it and the remedy."""

    def __init__(self, message: str) -> None:
        # It quotes names from the file, which are a stranger's words: keep it to one printable line.
        printable = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(" ".join(printable.split())[:500])


@dataclass(frozen=True)
class Preprocessing:
    """From image to input: resize the short side, crop the centre to input_size, scale to 0..1, subtract mean, divide by std."""

    input_size: tuple[int, int, int] = (3, 224, 224)
    resize: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or not all(type(n) is int and 1 <= n <= 8192 for n in (*self.input_size, self.resize)):
            raise ValueError("preprocessing: input_size is channels, height, width; sizes are between 1 and 8192 pixels")
        if not self.input_size[0] == len(self.mean) == len(self.std) or not all(map(math.isfinite, self.mean)):
            raise ValueError("preprocessing: mean and std need one number for each channel")
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError("preprocessing: std is positive")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"preprocessing: no interpolation {self.interpolation!r}: nearest, bilinear or bicubic")


@dataclass(frozen=True)
class Manifest:
    """What a model file says of its model. `arch`: the arguments of `create_model`, or None for a net known by its layers alone.

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
        arch, channels = self.arch or {}, self.preprocessing.input_size[0]
        if arch.get("in_chans", channels) != channels:
            raise ValueError(f"preprocessing for {channels} channels does not fit in_chans={arch['in_chans']}")
        outputs = arch.get("num_classes") or (self.layers[-1].get("out_features") if self.layers else None)
        if self.classes is not None and outputs not in (None, len(self.classes)):
            raise ValueError(f"{len(self.classes)} class names do not fit {outputs} outputs")
        _refuse_misfits(self.layers or [], self.preprocessing.input_size)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises `FileError` for what is not a manifest that this version reads."""
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


def _refuse_misfits(layers: list[dict[str, Any]], input_size: tuple[int, ...]) -> None:
    """Follows channels and sides of the feature map through a list of layers. Raises ValueError at the first that does not fit."""
    channels, sides = input_size[0], input_size[1:]
    for i, spec in enumerate(layers):
        op, before, pooled = spec["op"], channels, not sides
        if op == "conv2d":
            expects, channels = spec["in_channels"], spec["out_channels"]
            geometry = (spec[name] for name in ("kernel_size", "stride", "padding", "dilation"))
            sides = tuple(_side_after(*numbers) for numbers in zip(sides, *geometry, strict=True))
        elif op == "linear":
            expects, channels = spec["in_features"], spec["out_features"]
        else:
            expects = spec["channels"] if op == "squeeze_excite" else before
            sides = () if op == "global_avg_pool" else sides
        if expects != before or pooled != (op == "linear"):
            raise ValueError(f"layer {i} of the list, {op}, does not fit the layer before it")


def _side_after(side: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Of a feature map, after a convolution that reaches no farther than the map and makes it no larger."""
    numbers, reach = (kernel, stride, padding, dilation), dilation * (kernel - 1)
    sensible = all(type(n) is int and n < 2**31 for n in numbers) and min(kernel, stride, dilation) > 0
    if not (sensible and 0 <= 2 * padding <= reach < side + 2 * padding):
        raise ValueError(f"the list of layers has a convolution that cannot be (kernel, stride, padding, dilation: {numbers})")
    return (side + 2 * padding - reach - 1) // stride + 1


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Manifest | None]:
    """Tensors and manifest (None in a stranger's file) of a safetensors file or a PyTorch checkpoint.

    Wrapping dictionaries ("state_dict", "model", ...) and prefixes ("module.", "_orig_mod.") are taken off. Raises `FileError`.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FileError(f"{path}: {'is a folder, not a model file' if path.is_dir() else 'no such file'}")
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    if not start:
        raise FileError(f"{path}: is empty (zero bytes): copy or download it again")
    try:
        tensors, manifest = (_read_pickle if is_pickle(start) else _read_safetensors)(path)
        _refuse_damage(tensors)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    except Exception as error:  # a hostile file may raise anything in the readers of torch and safetensors
        raise FileError(f"{path}: not a model file, or a damaged one ({describe(error)})") from None
    return (tensors if manifest else _strip_prefixes(tensors)), manifest


def is_pickle(start: bytes) -> bool:
    """By content, not by name: a zip archive, or a bare pickle. A safetensors file may begin with the same byte as those, since
    it begins with its header's length; but then, after those 8 bytes, comes the header."""
    return start.startswith((ZIP, b"\x80")) and start[8:9] != b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Manifest | None]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        text = (file.metadata() or {}).get(METADATA_KEY)
        # Cloned, because what it returns is the mapped file: at odd addresses, which are slow, and gone if the file is overwritten.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors, Manifest.from_json(text) if text is not None else None


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], Manifest | None]:
    with path.open("rb") as file, warnings.catch_warnings():
        entries = zipfile.ZipFile(file).infolist() if file.read(4) == ZIP else []
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise FileError("unpacks to more than its own size, which no checkpoint of PyTorch does")
        file.seek(0)
        warnings.simplefilter("ignore")  # of TorchScript, which it goes on to refuse
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise FileError(
                "is refused: it holds more than tensors and could run code when opened, or it is damaged; save model.state_dict()"
            ) from None
    for _ in range(3):  # a wrapper may hold itself
        loaded = next((loaded[k] for k in WRAPPERS if isinstance(loaded, Mapping) and isinstance(loaded.get(k), Mapping)), loaded)
    tensors = {name: t for name, t in loaded.items() if isinstance(t, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise FileError("holds no dictionary of tensors: save model.state_dict()")
    text = getattr(loaded, METADATA_KEY, None)
    return tensors, Manifest.from_json(text) if text is not None else None


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return tensors


def _refuse_damage(tensors: Mapping[str, Tensor]) -> None:
    """Raises `FileError` naming the first tensor that no trained network has."""
    for name, tensor in tensors.items():
        dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not dense or tensor.dtype not in (*FLOATS, torch.int64):
            raise FileError(
                f"{name} is {tensor.dtype}, {tensor.layout}: only dense float16, bfloat16, float32 and float64 are read"
            )
        if tensor.untyped_storage().nbytes() < tensor.nbytes:  # a stride of zero makes terabytes of a few bytes
            raise FileError(f"{name} claims more numbers than the file holds")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FileError(f"{name} holds NaN or Inf: the checkpoint is damaged, or training diverged")
        if name.endswith("running_var") and bool((tensor <= 0).any()):
            raise FileError(f"{name} has a zero or negative variance: the checkpoint is damaged")


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Write a model file whole or not at all: safetensors, or by its suffix (.pth, .pt, .bin) a bare PyTorch state dict.

    That state dict is a dictionary of tensors like any other; the manifest is an attribute of it, as torch's own `_metadata` is.
    Raises `FileError` if the folder is missing, read-only or full, or for tensors that `read` would refuse.
    """
    path = Path(path)
    # Cloned, because a view would drag the whole of its storage along.
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    try:
        _refuse_damage(tensors)
    except FileError as error:
        raise FileError(f"{path}: is not written, {error}") from None
    if path.suffix in PICKLE_SUFFIXES:
        state = OrderedDict(tensors)
        vars(state)[METADATA_KEY] = manifest.to_json()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
    else:
        from safetensors.torch import save

        data = save(tensors, {METADATA_KEY: manifest.to_json(), "format": "pt"})
    atomically(path, lambda temporary: temporary.write_bytes(data))


def atomically(path: str | os.PathLike[str], write_to: Callable[[Path], Any]) -> None:
    """Call `write_to` with a temporary name in the same folder, flush it to disk, then rename: whoever reads sees all or nothing.

    Raises `FileError` for an OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = f"there is no folder {path.parent}" if missing else error.strerror
        raise FileError(f"{path}: cannot be written ({reason})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def describe(error: BaseException) -> str:
    """An error of somebody else's code in a few words."""
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)[:200] or type(error).__name__
