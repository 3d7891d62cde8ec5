"""The network as a graph (torch.export): what the files of other runtimes are made from, and what the pt2 format holds."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repvgg.deploy.engines import Engine, Options, Signature
from repvgg.disk import in_a_line
from repvgg.models.checkpoint import METADATA_KEY


def example(signature: Signature) -> Tensor:
    """Return images to trace with: a dimension that may vary is neither 1 nor so small that a feature map shrinks to one pixel."""
    channels, height, width = signature.size
    if signature.any_size:
        height, width = 2 * height, 2 * width
    return torch.zeros(signature.batch or 2, channels, height, width, dtype=signature.dtype)


def dynamic_shapes(signature: Signature) -> dict[int, Any]:
    """Return the dimensions of the images that may vary, as torch.export takes them."""
    shapes: dict[int, Any] = {} if signature.batch else {0: Dim("batch")}
    return shapes | ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if signature.any_size else {})


def trace(model: nn.Module, signature: Signature) -> ExportedProgram:
    """Return a copy of the model in float32 on the CPU as a graph. Raises ValueError if it cannot be traced."""
    with _quietly(), _one_line(model):
        network = copy.deepcopy(model).cpu().float()
        return torch.export.export(network, (example(signature),), dynamic_shapes=(dynamic_shapes(signature),))


def to_onnx(model: nn.Module, signature: Signature, metadata: str = "", merge_norms: bool = True) -> bytes:
    """Return the bytes of an ONNX file, which keeps `metadata`. merge_norms: put batch norms into the convolutions before them.

    Raises ValueError if the model cannot be exported.
    """
    proto = _proto(model, signature, merge_norms)
    if metadata:
        proto.metadata_props.add(key=METADATA_KEY, value=metadata)
    serialised: bytes = proto.SerializeToString()
    return serialised


def _proto(model: nn.Module, signature: Signature, merge_norms: bool) -> Any:
    """Return the `onnx.ModelProto`."""
    program = trace(model, signature)
    with _quietly(), _one_line(model):
        exported = torch.onnx.export(
            program, (), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False, optimize=merge_norms
        )
        assert exported is not None
        if not merge_norms:
            from onnxscript import optimizer

            optimizer.fold_constants_ir(exported.model)
            optimizer.remove_unused_nodes(exported.model)
        return exported.model_proto


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    """Write a pt2 file: the graph, its weights, and `metadata` as an extra file."""
    data = io.BytesIO()  # its writer of files ends the process where the disk is full
    with _quietly():
        torch.export.save(trace(model, signature), data, extra_files={METADATA_KEY: metadata})
    path.write_bytes(data.getbuffer())


def open_file(path: Path, options: Options) -> Engine:
    """Open a file that this process has just written, and no other: opening a stranger's may run code."""
    with _quietly():
        network = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = network(images)
        return logits

    return Engine(lambda images: images.cpu(), run, lambda logits: logits.float())


def metadata(path: Path) -> None:
    """Return None: a pt2 file is a program, and is not opened to be asked."""


def operators(path: Path) -> None:
    """Return None, for the same reason."""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' remarks on their own deprecations."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _one_line(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # the exporters raise many types
        reason = in_a_line(error)
        raise ValueError(f"{type(model).__name__} cannot be exported as a graph ({reason})") from None
