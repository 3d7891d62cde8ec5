"""Open a model, or a file that was exported from one, as a callable on one of the engines; by default the fastest here.

e = load_engine("a0.safetensors")                # "auto" measures once, and remembers
logits = e(images)                               # NumPy or torch: float32 [N, C, H, W] -> float32 [N, classes]
e = load_engine("exported/a0.onnx")              # in the runtime that it was made for
"""

import os

from torch import nn

from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.deploy.exported import open_exported
from repvgg.deploy.fastest import fastest
from repvgg.deploy.formats import FORMATS, SUFFIXES, exported_file
from repvgg.deploy.runner import Runner
from repvgg.disk import Log
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.load import open_model as open_pytorch
from repvgg.models.load import tell_left_out
from repvgg.models.manifest import Manifest
from repvgg.models.plain import LARGEST_INPUT


def load_engine(
    model: nn.Module | str | os.PathLike[str],
    engine: str = "auto",
    precision: str = "fp32",
    *,
    batch_size: int = 1,
    input_size: tuple[int, int, int] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    log: Log = print,
) -> Runner:
    """Return what runs a model: a module, a model file or a name for its pretrained weights; an exported file, or its folder.

    The model is folded first. engine: a name, or "auto" for the fastest that computes the same (see `fastest`); an exported file
    has its own. batch_size: images at a time, which most engines are built for. input_size: by default the model's own.

    Raises ValueError for an engine that is unknown, missing or without that precision, or that cannot run the model; `FileError`
    for model files; `ReparamError` for a model in train mode.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: at least 1")
    if engine != "auto":
        engines.check(engine, precision, device)
    if not isinstance(model, nn.Module) and (file := exported_file(model)) is not None:
        return open_exported(file, engine, Options(batch_size=batch_size, precision=precision, threads=threads, device=device))
    network = model if isinstance(model, nn.Module) else _opened(os.fspath(model), log)
    manifest = zoo.manifest_of(network) if "manifest" in vars(network) else None
    channels, height, width = input_size or (manifest.preprocessing.input_size if manifest else Options().input_size)
    options = Options((channels, height, width), batch_size, precision, threads, device=device)
    deploy = reparameterize(network)
    if deploy.fold_report.left:  # type: ignore[union-attr, arg-type]
        log(str(deploy.fold_report))
    name = fastest(deploy, options, log) if engine == "auto" else engine
    return Runner(name, engines.build(name, deploy, options), options, manifest)


def open_model(model: nn.Module | str, engine: str, precision: str, batch_size: int, device: str, log: Log) -> nn.Module:
    """Return a model, or that of a name or path; or an engine, where one is asked for or the file is another runtime's.

    Raises ValueError for a precision without an engine, and for an engine that is asked to make masks.
    """
    named = model if isinstance(model, str) else "this model"
    exported = exported_file(model) if isinstance(model, str) else None
    if not engine and not exported and precision != "fp32":
        raise ValueError(f"--precision {precision} is an engine's: name one, such as --engine eager")
    found = exported or (_opened(model, log) if isinstance(model, str) else model)
    if isinstance(found, nn.Module) and not engine:
        if any(layer.get(LARGEST_INPUT) for layer in vars(found).get("manifest", Manifest(None)).layers or []):
            log(f"{named}: is calibrated for INT8, and runs in float32 here: --engine native --precision int8 for INT8")
        return found
    if isinstance(found, nn.Module) and zoo.manifest_of(found).task == "masks":
        raise ValueError(f"{named}: masks of images of any size are made by PyTorch: leave out --engine")
    runtime = FORMATS[SUFFIXES[exported.suffix]].engine if exported else engine
    if runtime in engines.ENGINES and not engines.precisions(runtime, device):
        log(f"the engine {runtime} knows no {device}: it runs on the CPU")
        device = "cpu"
    runner = load_engine(found, engine or "auto", precision, batch_size=batch_size, device=device, log=log)
    if exported and runner.manifest and runner.manifest.task == "masks":
        raise ValueError(f"{exported}: masks of images of any size are made by PyTorch: name the model file")
    return runner


def _opened(name_or_path: str, log: Log) -> nn.Module:
    model = open_pytorch(name_or_path)
    tell_left_out(model, log)
    return model
