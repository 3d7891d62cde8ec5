"""Engines: what runs a network, one file each, behind one small protocol.

    engine = build("openvino", model, Options(input_size=(3, 224, 224), precision="bf16"))
    logits = engine(images)                       # float32 [N, C, H, W] -> float32 [N, classes]

A file of this folder has a function `build(model, options) -> Engine`. `model` is in eval mode, is run as it is (fold it first),
and is not changed. One whose runtime has files of its own has `write(model, signature, path, metadata)` and
`open_file(path, options) -> Engine` too, `operators(path)`, and `metadata(path)` where they can hold any (see export.py).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.disk import Log

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Options:
    """What an engine is built for. precision: of weights and activations (tf32: fp32 with TF32 products, on CUDA).

    threads: of the CPU, None for the engine's own choice. channels_last: memory format of the PyTorch engines.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    batch_size: int = 1
    precision: str = "fp32"
    threads: int | None = None
    channels_last: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class Engine:
    """`prepare` puts float32 images [N, C, H, W] in the engine's own form; `run` computes; `finish` gives float32 logits back.

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
        """Logits of any number of images, `at_most` at a time; an engine of one batch size has its last turn filled with zeros."""
        turns = []
        for part in images.split(self.batch_size or at_most):
            missing = max(self.batch_size or 1, len(part)) - len(part)
            filled = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            turns.append(self(filled)[: len(part)])
        return torch.cat(turns)


@dataclass(frozen=True)
class Known:
    """An engine's file, what it needs beside PyTorch and how to get it, and its precisions on the CPU and on CUDA."""

    module: str
    packages: tuple[str, ...]
    on_cpu: tuple[str, ...]
    on_cuda: tuple[str, ...]
    remedy: str = "pip install 'repvgg[deploy]'"


ENGINES = {
    "eager": Known("eager", (), ("fp32", "bf16", "fp16"), ("fp32", "tf32", "bf16", "fp16")),
    "compile": Known("compiled", (), ("fp32", "bf16", "fp16"), ("fp32", "tf32", "bf16", "fp16")),
    "aotinductor": Known("aotinductor", (), ("fp32", "bf16"), ()),
    "onnxruntime": Known("onnxruntime", ("onnx", "onnxscript", "onnxruntime"), ("fp32",), ()),
    "ncnn": Known("ncnn", ("ncnn",), ("fp32",), ()),
    "mnn": Known("mnn", ("onnx", "onnxscript", "MNN"), ("fp32",), ()),
    "openvino": Known("openvino", ("onnx", "onnxscript", "openvino"), ("fp32", "bf16"), ()),
    "native": Known("native", ("repvgg_engine",), ("fp32", "bf16"), (), "pip install ./engine, with a C++ compiler"),
}


@dataclass(frozen=True)
class Operator:
    """One of a graph, by its format's own name. kernel: height and width, of a convolution; note: whatever else is worth a word."""

    name: str
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    note: str = ""


def build(name: str, model: nn.Module, options: Options) -> Engine:
    """An engine for `model`. Raises ValueError for an unknown or missing engine, or a precision that it does not have."""
    check(name, options.precision, options.device)
    module = importlib.import_module(f"repvgg.deploy.engines.{ENGINES[name].module}")
    engine: Engine = module.build(model, options)
    return engine


def check(name: str, precision: str, device: str = "cpu") -> None:
    """Raises ValueError where `build` would: unknown, not installed (with the line that installs it), or without that precision."""
    has = precisions(name, device)
    if missing := [package for package in ENGINES[name].packages if find_spec(package) is None]:
        raise ValueError(f"the engine {name} needs {', '.join(missing)}: {ENGINES[name].remedy}")
    if precision not in has:
        raise ValueError(f"the engine {name} has no {precision} on {device}" + (f": it has {', '.join(has)}" if has else ""))


def installed(precision: str, device: str = "cpu", log: Log = print) -> list[str]:
    """Names of the engines that are here and have this precision; a word on each that is not here."""
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
    """Those that an engine has on a device. Raises ValueError for an unknown engine."""
    if name not in ENGINES:
        raise ValueError(f"no engine {name!r}: there are {', '.join(ENGINES)}")
    return ENGINES[name].on_cuda if torch.device(device).type == "cuda" else ENGINES[name].on_cpu
