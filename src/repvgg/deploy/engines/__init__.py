"""Engines: what runs a network, one file each, behind the protocols `Builder`, `Runtime` and `Int8Runtime`.

    engine = build("openvino", model, Options(input_size=(3, 224, 224), precision="bf16"))
    logits = engine(images)                       # float32 [N, C, H, W] -> float32 [N, classes]

The files of this folder are such builders and runtimes: modules whose functions are the protocol's.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from repvgg.disk import Log, describe

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "int16", "int8")


class DeviceError(ValueError):
    """The device that is asked for cannot be used; nothing else is used in its place."""


@dataclass(frozen=True)
class Options:
    """Settings that an engine is built for. precision: of weights and activations (tf32: fp32 with TF32 products, on CUDA;
    int16: fp32 with products of 14 to 16 bits, in the engine native, without calibration; int8: in the engine native,
    of a model that `repvgg quantize --to native` calibrated).

    threads: of the CPU, None for the engine's own choice. channels_last: memory format of the PyTorch engines.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    batch_size: int = 1
    precision: str = "fp32"
    threads: int | None = None
    channels_last: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class Signature:
    """Images that a file's graph takes: [batch, *size].

    batch: None for any number; any_size: any height and width; dtype: float32, or uint8 where normalisation is a part of the graph.
    """

    size: tuple[int, int, int]
    batch: int | None = None
    any_size: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Engine:
    """A network that is ready to run, in three steps.

    `prepare` puts float32 images [N, C, H, W] in the engine's own form; `run` computes; `finish` gives float32 logits back.
    They are apart so that `run` can be timed alone. Not safe to call from several threads at once.
    """

    prepare: Callable[[Tensor], Any]
    run: Callable[[Any], Any]
    finish: Callable[[Any], Tensor]
    batch_size: int | None = None  # the only one that it runs; None: any

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) != (self.batch_size or len(images)):  # some would end the process, others compile again
            raise ValueError(f"this engine was built for batches of {self.batch_size}, not {len(images)}")
        return self.finish(self.run(self.prepare(images)))

    def in_turns(self, images: Tensor, at_most: int) -> Tensor:
        """Return the logits of any number of images, run `at_most` at a time; a fixed batch is filled up with zeros."""
        turns = []
        for part in images.split(self.batch_size or at_most):
            missing = max(self.batch_size or 1, len(part)) - len(part)
            filled = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            turns.append(self(filled)[: len(part)])
        return torch.cat(turns)


@dataclass(frozen=True)
class Known:
    """An engine's file, what it needs beside PyTorch, its precisions on the CPU and on CUDA, and how to get it if not by pip."""

    module: str
    packages: tuple[str, ...]
    on_cpu: tuple[str, ...]
    on_cuda: tuple[str, ...]
    source: str = ""

    @property
    def remedy(self) -> str:
        """Return the line that installs it."""
        return self.source or f"pip install {' '.join(self.packages)}"


ENGINES = {
    "eager": Known("eager", (), ("fp32", "bf16", "fp16"), ("fp32", "tf32", "bf16", "fp16")),
    "compile": Known("compiled", (), ("fp32", "bf16", "fp16"), ("fp32", "tf32", "bf16", "fp16")),
    "compile-max": Known("compiled_max", (), (), ("fp32", "tf32", "bf16", "fp16")),
    "cudagraphs": Known("cudagraphs", (), (), ("fp32", "tf32", "bf16", "fp16")),
    "aotinductor": Known("aotinductor", (), ("fp32", "bf16"), ("fp32", "tf32", "bf16", "fp16")),
    "onnxruntime": Known("onnxruntime", ("onnx", "onnxscript", "onnxruntime"), ("fp32",), ("fp32", "tf32", "fp16")),
    "ncnn": Known("ncnn", ("ncnn",), ("fp32",), ()),
    "mnn": Known("mnn", ("onnx", "onnxscript", "MNN"), ("fp32",), ()),
    "openvino": Known("openvino", ("onnx", "onnxscript", "openvino"), ("fp32", "bf16"), ()),
    "native": Known(
        "native", ("repvgg_engine",), ("fp32", "bf16", "int16", "int8"), (), "pip install ./engine, with a C++ compiler"
    ),
}


@dataclass(frozen=True)
class ListedOperator:
    """One operator of a graph, by its format's own name.

    kernel: height and width, of a convolution; note: whatever else is worth a word.
    """

    name: str
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    note: str = ""


class Builder(Protocol):
    """Functions that every engine's file has."""

    def build(self, model: nn.Module, options: Options, /) -> Engine:
        """Return an engine for a model in eval mode, which is run as it is (fold it first) and not changed.

        Raises ValueError for a network that this engine cannot run.
        """


class Runtime(Protocol):
    """Functions of a runtime that has files of its own."""

    def write(self, model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
        """Write the model's graph, and `metadata` where the format has a place for it.

        Raises ValueError for a network that it cannot hold, OSError where the file cannot be written.
        """

    def open_file(self, path: Path, options: Options, /) -> Engine:
        """Return an engine for a file. May raise anything for a damaged one."""

    def metadata(self, path: Path) -> str | None:
        """Return what `write` was given; None where the format has no place for it. May raise anything for a damaged file."""

    def operators(self, path: Path) -> list[ListedOperator] | None:
        """Return the graph's operators in order; None where the format does not tell. May raise anything for a damaged file."""


class Int8Runtime(Runtime, Protocol):
    """Functions of a runtime that NNCF can quantise for; a network is its own object for a graph."""

    def read(self, file: Path | bytes) -> Any:
        """Return the network of a file, or of the bytes of an ONNX file."""

    def save(self, network: Any, path: Path, metadata: str) -> None:
        """Write a network with its `metadata`."""

    def layers(self, network: Any) -> list[str]:
        """Return the names of the convolutions and the classifier, in order."""

    def activations(self, path: Path, images: Any) -> list[Any]:
        """Return what comes out of each ReLU of a file, in order; images: NumPy, float32 [N, C, H, W]."""


def runtime(module: str) -> Runtime:
    """Return the runtime in a file of this folder; see deploy/formats.py for which."""
    return cast(Runtime, _loaded(module))


def build(name: str, model: nn.Module, options: Options) -> Engine:
    """Return an engine for `model`. Raises ValueError for an unknown or missing engine, or a precision that it does not have."""
    check(name, options.precision, options.device)
    return cast(Builder, _loaded(ENGINES[name].module)).build(model, options)


def _loaded(module: str) -> Any:
    try:
        return importlib.import_module(f"repvgg.deploy.engines.{module}")
    except ImportError as error:
        raise not_loaded(module, error) from None


def not_loaded(name: str, error: ImportError) -> ValueError:
    """Return what to raise for a package that was built for another Python, NumPy or system, say."""
    return ValueError(f"the engine {name} is installed, but cannot be loaded ({describe(error)})")


def check(name: str, precision: str, device: str = "cpu") -> None:
    """Raise ValueError where `build` would: unknown, not installed (with the line that installs it), or without that precision."""
    has = precisions(name, device)
    if missing := [package for package in ENGINES[name].packages if find_spec(package) is None]:
        raise ValueError(f"the engine {name} needs {', '.join(missing)}: {ENGINES[name].remedy}")
    if precision not in has:
        raise ValueError(f"the engine {name} has no {precision} on {device}" + (f": it has {', '.join(has)}" if has else ""))


def installed(precision: str, device: str = "cpu", log: Log = print) -> list[str]:
    """Return the names of the engines that are here and have this precision; `log` hears of each that is not here."""
    found = []
    for name in ENGINES:
        if precision in precisions(name, device):
            try:
                check(name, precision, device)
                found.append(name)
            except ValueError as error:
                log(f"left out: {error}")
    return found


def precisions(name: str, device: str = "cpu") -> tuple[str, ...]:
    """Return the precisions that an engine has on a device. Raises ValueError for an unknown engine."""
    if name not in ENGINES:
        raise ValueError(f"no engine {name!r}: there are {', '.join(ENGINES)}")
    return ENGINES[name].on_cuda if torch.device(device).type == "cuda" else ENGINES[name].on_cpu
