"""Turn a model into other files: exported, in INT8, with fewer channels."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.api.opening import device_named, open_data, opened
from repvgg.api.training import settled
from repvgg.disk import Log
from repvgg.train.recipes import GENTLE, Keeping, Recipe

if TYPE_CHECKING:
    from repvgg.api.opening import Data, Model
    from repvgg.deploy.prune import PruningReport
    from repvgg.deploy.quantize import Quantization, QuantizationReport


@dataclass(frozen=True)
class Exported:
    """An exported file. format: as given to `export`; max_rel_err: of its outputs, against PyTorch in float64; report: all of the
    .json beside it."""

    path: Path
    format: str
    max_rel_err: float
    report: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path}: {self.format}, largest relative error {self.max_rel_err:.1e}"


def stem_of(model: "Model") -> str:
    """Return a name for files made of a model: its file's without the suffix, its run folder's, or its own."""
    from torch import nn

    from repvgg.models.checkpoint import PICKLE_SUFFIXES

    if isinstance(model, nn.Module):
        return "model"
    path = Path(os.fspath(model))
    return path.stem if path.suffix in {".safetensors", *PICKLE_SUFFIXES} else path.resolve().name


def export(
    model: "Model",
    to: str | Sequence[str] = "onnx",
    out: str | os.PathLike[str] = "exported",
    *,
    name: str = "",
    batch_size: int = 0,
    any_size: bool = False,
    pixels: bool = False,
    image_size: tuple[int, int] | None = None,
    data: str = "",
    images: int = 8,
    log: Log = print,
) -> list[Exported]:
    """Write a model as files of other runtimes, each compared with PyTorch before it is kept; return them.

    to: onnx, openvino, ncnn, mnn, pt2, aotinductor, web (a folder with a page), or several of them. batch_size: images a run, 0 for
    any number. pixels: take uint8 pixels; image_size: and resize them too. data, images: compare on so many images of its
    validation split instead of random ones. Raises ValueError if a format is unknown, not installed or cannot hold the graph,
    `ReparamError` for what cannot be folded.
    """
    from repvgg.deploy.export import Shape, real_images
    from repvgg.deploy.export import export as write
    from repvgg.deploy.formats import report_of
    from repvgg.deploy.web_folder import write_web

    kinds = [to] if isinstance(to, str) else list(to)
    if data and kinds == ["web"]:
        raise ValueError("--data is not for web, which is compared on random images: leave it out")
    network = opened(model)
    shape = Shape(batch_size or None, any_size, pixels, image_size)
    compared = real_images(network, data, images, shape) if data else None
    stem = name or stem_of(model)
    found = []
    for kind in kinds:
        path = write_web(network, out, shape, log) if kind == "web" else write(network, kind, out, stem, shape, compared, log)
        report = json.loads(report_of(path).read_text())
        found.append(Exported(path, kind, float(report["parity"]["error"]["relative"]), report))
    return found


def quantize(
    model: "Model",
    data: "Data",
    to: str = "openvino",
    out: str | os.PathLike[str] = "int8",
    *,
    settings: "Quantization | None" = None,
    name: str = "",
    val: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "",
    log: Log = print,
) -> "QuantizationReport":
    """Write a model in INT8, calibrated on the training split; return the accuracy and speed of both.

    to: openvino, onnx, or native: a model file for the native engine. Raises ValueError for data that do not fit or a loss
    of accuracy that `settings` do not allow.
    """
    from repvgg.deploy.quantize import Quantization
    from repvgg.deploy.quantize import quantize as write

    network, where = opened(model), device_named(device)
    source = open_data(data, val, limit, seed, model=network, log=log)
    stem = name or stem_of(model)
    return write(network, source, to, out, stem, settings or Quantization(), where, log)


def prune(
    model: "Model",
    data: "Data",
    out: str | os.PathLike[str],
    keep: float = 0.5,
    *,
    recipe: "str | os.PathLike[str] | Recipe" = "",
    engine: str = "eager",
    val: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "",
    workers: int = 0,
    keeping: Keeping = Keeping(),  # noqa: B008 - frozen
    log: Log = print,
    **changes: Any,
) -> "PruningReport":
    """Remove channels from a RepVGG, train the rest into the run folder `out`; return accuracy, cost and speed before and
    after.

    keep: the share of each layer's channels that stays. recipe, changes: as for `train`; photos get `finetune` by default.
    """
    from repvgg.deploy.prune import prune as work

    network, where = opened(model), device_named(device, workers)
    source = open_data(data, val, limit, seed, model=network, log=log)
    plain = settled(recipe, source, "finetune", changes, log)
    if not recipe:  # what suits the source suits a new network
        plain = replace(plain, **{name: value for name, value in GENTLE.items() if name not in changes})
    how: dict[str, Any] = {"seed": seed, "device": where, "workers": workers, "keeping": keeping, "log": log}
    return work(network, source, Path(out), keep, plain, engine=engine, **how)
