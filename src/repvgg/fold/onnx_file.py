"""Open and write ONNX files of strangers: checked before anything is believed, large tensors beside the graph included."""

import glob
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, checker, external_data_helper, helper, numpy_helper

from repvgg.disk import FileError, atomically, describe, in_a_line

LARGEST = 2_000_000_000  # bytes: a protobuf holds 2 GiB at most
BESIDE = 1024  # bytes from which on a tensor goes beside the graph, if any does
ALIGNED = 4096


class OnnxFile:
    """An ONNX model, and the tensors that lie in files beside it. Raises `FileError` for what is damaged or reaches elsewhere."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.model: ModelProto = onnx.load(str(self.path), load_external_data=False)
        except FileNotFoundError:
            raise FileError(f"{path}: there is no such file") from None
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({error.strerror})") from None
        except (DecodeError, ValueError, TypeError, RuntimeError) as error:
            raise FileError(f"{path}: is damaged, or is no ONNX file ({describe(error)})") from None
        if not self.model.graph.node:
            raise FileError(f"{path}: is damaged, or is no ONNX file (it holds no graph)")
        for tensor in tensors_of(self.model):
            self._check(tensor)
        try:
            checker.check_model(str(self.path))
        except (checker.ValidationError, ValueError, RuntimeError) as error:
            raise FileError(f"{path}: is not a valid ONNX model ({in_a_line(error)})") from None

    @property
    def has_files_beside(self) -> bool:
        return any(external_data_helper.uses_external_data(t) for t in tensors_of(self.model))

    def array(self, tensor: TensorProto) -> np.ndarray[Any, Any]:
        """Return the numbers of a tensor, wherever they lie; those beside the graph are read as they are used."""
        if not external_data_helper.uses_external_data(tensor):
            held: np.ndarray[Any, Any] = numpy_helper.to_array(tensor)
            return held
        file, offset, size = self._beside(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if not size:
            return np.zeros(tuple(tensor.dims), dtype)
        return np.memmap(file, dtype.newbyteorder("<"), "r", offset, tuple(tensor.dims))

    def _check(self, tensor: TensorProto) -> None:
        """Sizes are compared before anything is allocated."""
        name = tensor.name or "a tensor"
        if any(d < 0 for d in tensor.dims):
            raise FileError(f"{self.path}: {name} has a negative size")
        if external_data_helper.uses_external_data(tensor):
            self._beside(tensor)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != size_of(tensor):
            raise FileError(f"{self.path}: {name} says {size_of(tensor)} bytes and holds {len(tensor.raw_data)}")
        elif not tensor.HasField("raw_data") and math.prod(tensor.dims) > max(1, 2 * tensor.ByteSize()):
            raise FileError(f"{self.path}: {name} says {math.prod(tensor.dims)} numbers and holds fewer")

    def _beside(self, tensor: TensorProto) -> tuple[Path, int, int]:
        """File, offset and bytes of a tensor beside the graph: in the same folder, a plain file, and large enough."""
        entries = {e.key: e.value for e in tensor.external_data}
        place = entries.get("location", "")
        file, folder = self.path.parent / place, self.path.parent.resolve()
        if not place or Path(place).is_absolute() or not file.resolve().is_relative_to(folder) or file.is_symlink():
            raise FileError(f"{self.path}: {tensor.name} lies in {place!r}, outside of the model's folder")
        if not file.is_file():
            raise FileError(f"{self.path}: the file of its tensors, {place}, is not beside it")
        try:
            offset = int(entries.get("offset", 0))
            size = int(entries.get("length", size_of(tensor)))
        except ValueError:
            raise FileError(f"{self.path}: {tensor.name} lies at no number in {place}") from None
        if offset < 0 or size != size_of(tensor) or offset + size > file.stat().st_size:
            raise FileError(f"{self.path}: {tensor.name} says {size_of(tensor)} bytes, which {place} does not hold there")
        return file, offset, size

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the model as it is now, whole or not at all; beside it what was beside it, or is too large to be inside."""
        path = Path(path)
        at = [i for i, t in enumerate(tensors_of(self.model)) if size_of(t) >= BESIDE or external_data_helper.uses_external_data(t)]
        if not self.has_files_beside and self.model.ByteSize() < LARGEST:
            atomically(path, lambda to: to.write_bytes(self.model.SerializeToString()))
            return
        # The file beside is named after what is in it: while one is written, the old model still finds the old one.
        digest = hashlib.sha256()
        tensors = list(tensors_of(self.model))
        for i in at:
            digest.update(np.ascontiguousarray(self.array(tensors[i])).tobytes())
        beside = path.with_name(f"{path.name}.{digest.hexdigest()[:12]}.data")
        model = ModelProto()
        model.CopyFrom(self.model)
        copies = list(tensors_of(model))
        atomically(beside, lambda to: self._write_beside(to, beside.name, [(tensors[i], copies[i]) for i in at]))
        atomically(path, lambda to: to.write_bytes(model.SerializeToString()))
        for old in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 12}.data"):
            if old != beside:
                with suppress(OSError):
                    old.unlink()

    def _write_beside(self, to: Path, name: str, tensors: list[tuple[TensorProto, TensorProto]]) -> None:
        """Each tensor, and the copy that shall say where it lies now."""
        with to.open("wb") as file:
            for tensor, copy in tensors:
                array = np.ascontiguousarray(self.array(tensor))
                offset = _aligned(file)
                file.write(array.data.cast("B") if array.size else b"")
                copy.ClearField("raw_data")
                for typed in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                    copy.ClearField(typed)  # type: ignore[arg-type]
                del copy.external_data[:]
                copy.data_location = TensorProto.EXTERNAL
                for key, value in (("location", name), ("offset", offset), ("length", array.nbytes)):
                    entry = copy.external_data.add()
                    entry.key, entry.value = key, str(value)


def _aligned(file: IO[bytes]) -> int:
    file.write(b"\0" * (-file.tell() % ALIGNED))
    return file.tell()


def size_of(tensor: TensorProto) -> int:
    """Bytes that its shape and type ask for."""
    if tensor.data_type == TensorProto.STRING:
        return 0
    try:
        bits: int = BITS.get(tensor.data_type) or helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    except KeyError:
        raise FileError(f"{tensor.name}: is of an unknown type {tensor.data_type}") from None
    count: int = math.prod(tensor.dims)
    return (count * bits + 7) // 8


BITS = {getattr(TensorProto, name): 4 for name in ("INT4", "UINT4", "FLOAT4E2M1") if hasattr(TensorProto, name)}


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Return every tensor of a model, those in the bodies of its branches and loops and in attributes too."""
    for graph in (model.graph, *model.functions):
        yield from _tensors_of(graph)


def _tensors_of(graph: Any) -> Iterator[TensorProto]:
    yield from getattr(graph, "initializer", ())
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _tensors_of(inner)
