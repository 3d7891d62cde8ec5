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

import json
import os
import pickle
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


class FileError(ValueError):
    """A model file that is missing, damaged, of another kind or hostile; the message names it and the remedy."""


@dataclass(frozen=True)
class Preprocessing:
    """From image to input: resize the short side, crop the centre to input_size, scale to 0..1, subtract mean, divide by std."""

    input_size: tuple[int, int, int] = (3, 224, 224)
    resize: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        channels, height, width = self.input_size
        if not (channels == len(self.mean) == len(self.std) and min(self.std) > 0):
            raise ValueError("preprocessing: mean and std need one number for each channel, and std is positive")
        if min(height, width, self.resize) < 1 or max(height, width, self.resize) > 8192:
            raise ValueError("preprocessing: sizes are between 1 and 8192 pixels")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"preprocessing: no interpolation {self.interpolation!r}: nearest, bilinear or bicubic")


@dataclass(frozen=True)
class Manifest:
    """What a model file says of its model. `arch`: the arguments of `create_model`, or None for a net known by its layers alone."""

    arch: dict[str, Any] | None
    form: str = "training"
    classes: list[str] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    training: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] | None = None
    keys: str = "repvgg"
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError, TypeError or KeyError for what is not a manifest."""
        raw = json.loads(text)
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this repvgg reads {FORMAT_VERSION}: upgrade repvgg")
        if raw["form"] not in ("training", "deploy"):
            raise ValueError(f"no form {raw['form']!r}")
        p = raw.pop("preprocessing")
        p.update({name: tuple(p[name]) for name in ("input_size", "mean", "std")})
        manifest = cls(preprocessing=Preprocessing(**p), **raw)
        if not isinstance(manifest.arch, dict | None) or not isinstance(manifest.layers, list | None):
            raise TypeError("arch is a table and layers is a list")
        return manifest


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Manifest | None]:
    """Tensors and manifest (None in a stranger's file) of a safetensors file or a PyTorch checkpoint.

    Wrapping dictionaries ("state_dict", "model", ...) and prefixes ("module.", "_orig_mod.") are taken off. Raises `FileError`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: {'is a folder, not a model file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise FileError(f"{path}: is empty (zero bytes): copy or download it again")
    with path.open("rb") as file:
        start = file.read(16)
    # By content, not by name: a zip archive or a bare pickle is a PyTorch checkpoint.
    is_pickle = start.startswith(b"PK\x03\x04") or start[:1] == b"\x80"
    tensors, manifest = (_read_pickle if is_pickle else _read_safetensors)(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FileError(f"{path}: {name} holds NaN or Inf: the checkpoint is damaged, or training diverged")
        if name.endswith("running_var") and bool((tensor <= 0).any()):
            raise FileError(f"{path}: {name} has a zero or negative variance: the checkpoint is damaged")
    return tensors, manifest


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Manifest | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise FileError(f"{path}: not a model file, or a damaged one ({_first_line(error)})") from None
    if METADATA_KEY not in metadata:
        return _strip_prefixes(tensors), None
    try:
        return tensors, Manifest.from_json(metadata[METADATA_KEY])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: its manifest cannot be used ({_first_line(error)})") from None


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], None]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FileError(
            f"{path}: would run code when opened (it holds more than tensors), so it is refused: save its state_dict()"
        ) from None
    except Exception as error:  # a hostile file may raise anything in torch's reader
        raise FileError(f"{path}: not a PyTorch checkpoint, or a damaged one ({_first_line(error)})") from None
    while isinstance(loaded, Mapping) and (
        inner := next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
    ):
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(k, str) for k in loaded):
        raise FileError(f"{path}: holds no dictionary of tensors: save model.state_dict()")
    return _strip_prefixes({name: t for name, t in loaded.items() if isinstance(t, Tensor)}), None


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return tensors


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Write a model file whole or not at all: safetensors, or by its suffix (.pth, .pt, .bin) a bare PyTorch state dict.

    Raises `FileError` if the folder is missing, read-only or full.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix in PICKLE_SUFFIXES:
        atomically(path, lambda temporary: torch.save(tensors, temporary))
        return
    from safetensors.torch import save_file

    metadata = {METADATA_KEY: manifest.to_json(), "format": "pt"}
    atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def atomically(path: str | os.PathLike[str], write_to: Callable[[Path], Any]) -> None:
    """Call `write_to` with a temporary name in the same folder, flush it to disk, rename: whoever reads sees all or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        with suppress(OSError):
            temporary.unlink()
        if path.parent.is_dir() and not isinstance(error, OSError) and "os error" not in str(error).lower():
            raise
        reason = _first_line(error) if path.parent.is_dir() else f"there is no folder {path.parent}"
        raise FileError(f"{path}: cannot be written ({reason})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
