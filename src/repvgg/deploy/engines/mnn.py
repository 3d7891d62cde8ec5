"""MNN on the CPU."""

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.deploy.engines import Engine, Options, Signature, not_loaded
from repvgg.deploy.engines.graph import to_onnx
from repvgg.disk import full

# The converter's module itself: importing MNN.tools, which wraps it, would pip-install a library of Aliyun's and report home.
# In a process of its own, because it ends the process when it fails.
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"

# The largest tiles of Winograd's algorithm, level 3, err by 1e-4 of A0's logits; those of level 2 are as fast and err by 2e-6.
WINOGRAD_MEMORY_LEVEL, EXACT = 3, 2  # the hint's number, its value


def build(model: nn.Module, options: Options) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mnn"
        write(model, Signature(options.input_size), path)
        return open_file(path, options)


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    """Write an .mnn file. Raises ValueError for a network that MNN cannot convert."""
    with tempfile.TemporaryDirectory() as folder:
        onnx, converted = Path(folder) / "model.onnx", Path(folder) / "model.mnn"
        onnx.write_bytes(to_onnx(model, signature))
        words = ["-f", "ONNX", "--modelFile", str(onnx), "--MNNModel", str(converted), "--bizCode", "repvgg"]
        done = subprocess.run([sys.executable, "-c", CONVERT, *words], capture_output=True, text=True)  # noqa: S603
        if full(folder):  # the converter does not look, and reading what is truncated ends the process
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not done.returncode and converted.is_file():
            shutil.copyfile(converted, path)
            return
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
    raise ValueError(f"MNN cannot convert {type(model).__name__} ({''.join(reason)[:200]})")


def open_file(path: Path, options: Options) -> Engine:
    """Return an engine for an .mnn file. Raises ValueError for one that MNN cannot read, and where MNN cannot be loaded."""
    with _quietly():
        try:
            import MNN
        except ImportError as error:
            raise not_loaded("mnn", error) from None
        how = {"backend": "CPU", "precision": "high", "numThread": options.threads or torch.get_num_threads()}
        runtime = MNN.nn.create_runtime_manager((how,))
        runtime.set_hint(WINOGRAD_MEMORY_LEVEL, EXACT)
        try:
            net = MNN.nn.load_module_from_file(str(path), ["images"], ["logits"], runtime_manager=runtime)
        except Exception as error:
            raise ValueError(f"MNN cannot read it ({error})") from None

    def prepare(images: torch.Tensor) -> Any:
        array = images.float().contiguous().cpu().numpy()
        variable = MNN.expr.placeholder(list(array.shape), MNN.expr.data_format.NCHW)
        variable.write(array)
        return variable

    def run(images: Any) -> Any:
        logits = net.forward([images])[0]
        return logits.read()  # which is when it computes

    return Engine(prepare, run, lambda logits: torch.from_numpy(logits.copy()))


def metadata(path: Path) -> None:
    """Return None: these files have no place for it."""


def operators(path: Path) -> None:
    """Return None: MNN does not tell."""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence what MNN prints about the processor on stdout, which is for results."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).fflush(None)  # what C has buffered
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
