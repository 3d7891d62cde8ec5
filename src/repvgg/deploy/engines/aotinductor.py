"""AOTInductor: PyTorch's compiler, ahead of time. Its file is machine code for this kind of processor."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, Options, Signature
from repvgg.deploy.engines.eager import in_precision, place
from repvgg.deploy.engines.graph import trace
from repvgg.disk import in_a_line, out_of_memory
from repvgg.models.checkpoint import METADATA_KEY


def build(model: nn.Module, options: Options) -> Engine:
    network, prepare = place(model, options)
    example = prepare(torch.zeros(options.batch_size, *options.input_size))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        with torch.no_grad():
            _compile(torch.export.export(network, (example,)), path)
        at = torch.device(options.device).index
        compiled = torch._inductor.aoti_load_package(
            str(path), device_index=-1 if at is None else at
        )  # unpacks it: the file may go
    return Engine(prepare, in_precision(compiled, options), lambda logits: logits.float().cpu(), options.batch_size)


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    _compile(trace(model, signature), path, {"aot_inductor.metadata": {METADATA_KEY: metadata}})


def open_file(path: Path, options: Options) -> Engine:
    """Open a file that this process has just written, and no other: it is machine code, and a stranger's may do anything."""
    compiled = torch._inductor.aoti_load_package(str(path))

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = compiled(images)
        return logits

    return Engine(lambda images: images.contiguous().cpu(), run, lambda logits: logits.float())


def metadata(path: Path) -> None:
    """Return None: such a file is a program, and is not opened to be asked."""


def operators(path: Path) -> None:
    """Return None, for the same reason."""


def _compile(program: torch.export.ExportedProgram, path: Path, settings: dict[str, Any] | None = None) -> None:
    """Compile a graph into a file. Raises ValueError if it cannot be compiled (there is no C++ compiler, for one)."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = in_a_line(error)
        raise ValueError(f"AOTInductor cannot compile this ({reason})") from None
