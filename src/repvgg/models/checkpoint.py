"""Model files: safetensors whose metadata carries one JSON manifest (see manifest.py) under the key "repvgg".

Files of strangers are hostile: no pickle is executed, sizes are checked before memory is taken, and whatever is wrong becomes
one `FileError`. Files of ours are written whole or not at all.
"""

import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from repvgg.disk import FileError, atomically, describe
from repvgg.models.manifest import Manifest

METADATA_KEY = "repvgg"
PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".tar"}
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")
ZIP = b"PK\x03\x04"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
