"""Model files: safetensors whose metadata carries one JSON manifest (see manifest.py) under the key "repvgg".

Files of strangers are hostile: no pickle is executed, sizes are checked before memory is taken, and whatever is wrong becomes
one `FileError`. Files of ours are written whole or not at all.
"""

import io
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from repvgg.disk import FileError, atomically, describe, out_of_memory
from repvgg.models import keys
from repvgg.models.manifest import Manifest
from repvgg.models.pickles import ZIP, dictionaries, read_pickle

METADATA_KEY = "repvgg"
PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".tar"}
SHARED = 8  # times the size of a checkpoint: what its tensors may come to that share their numbers
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Manifest | None]:
    """Return the tensors and the manifest (None in a stranger's file) of a safetensors file or a PyTorch checkpoint.

    Of a checkpoint with several dictionaries ("model", "ema", "optimizer", ...) the tensors are those of the network. Raises
    `FileError`.
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder without a best.safetensors: name a run folder or a model file"
            raise FileError(f"{path}: {what if path.is_dir() else 'no such file'}")
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
    except MemoryError:
        raise
    except Exception as error:  # a hostile file may raise anything in the readers of torch and safetensors
        if out_of_memory(error):
            raise MemoryError(str(error)) from None
        raise FileError(f"{path}: not a model file, or a damaged one ({describe(error)})") from None
    return tensors, manifest


def is_pickle(start: bytes) -> bool:
    """Say by content, not by name, whether it is a zip archive or a bare pickle.

    A safetensors file may begin with the same byte as those, since it begins with its header's length; but then, after those 8
    bytes, comes the header.
    """
    return start.startswith((ZIP, b"\x80")) and start[8:9] != b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Manifest | None]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        text = (file.metadata() or {}).get(METADATA_KEY)
        # Cloned, because what it returns is the mapped file: at odd addresses, which are slow, and gone if the file is overwritten.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors, Manifest.from_json(text) if text is not None else None


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], Manifest | None]:
    """Read the state dict in a checkpoint: the one with a RepVGG's keys, and an average rather than the last."""
    holders = [(name, holder) for name, holder in dictionaries(read_pickle(path)) if any(map(_is_tensor, holder.values()))]
    found = [{name: t for name, t in holder.items() if _is_tensor(t) and isinstance(name, str)} for _, holder in holders]
    known = [i for i, tensors in enumerate(found) if keys.locate(tensors)] or [i for i, tensors in enumerate(found) if tensors]
    if not known:
        raise FileError("holds no dictionary of tensors: save model.state_dict()")
    best = min(known, key=lambda i: (not keys.AVERAGED.search(holders[i][0]), i))
    if sum(t.nbytes for t in found[best].values()) > SHARED * path.stat().st_size:
        raise FileError("claims more numbers than the file holds")
    text = getattr(holders[best][1], "attributes", {}).get(METADATA_KEY)
    return found[best], Manifest.from_json(text) if text is not None else None


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _refuse_damage(tensors: Mapping[str, Tensor]) -> None:
    """Raise `FileError` naming the first tensor that no trained network has."""
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
        if name.endswith("running_var") and bool((tensor < 0).any()):  # zero is a channel that never varied; eps stands beside it
            raise FileError(f"{name} has a negative variance: the checkpoint is damaged")


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

        data = _reproducible(save(tensors, {METADATA_KEY: manifest.to_json(), "format": "pt"}))
    atomically(path, lambda temporary: temporary.write_bytes(data))


def _reproducible(data: bytes) -> bytes:
    """Return a safetensors file with its metadata in alphabetical order, which the library leaves to chance."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
