"""Every verb of the command line as a function: train, evaluate, predict, export, quantize, prune.

    run = repvgg.train("repvgg_a0", "photos", "runs/photos", epochs=20)
    repvgg.evaluate(run.model, "photos").per_class
    repvgg.predict("runs/photos", "cat.jpg")[0].labels
    repvgg.export("runs/photos", "onnx", "exported")[0].path

What is called `model` is a module of ours, a model file, a run folder, hf:USER/NAME, or a name for its pretrained weights; `data`
is a string as for `repvgg train --data`, or a `Source`. The command line calls these functions and prints what they return.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.disk import Log
from repvgg.train.recipes import Keeping, Recipe, resolve

if TYPE_CHECKING:
    from torch import nn

    from repvgg.data import Source
    from repvgg.deploy.prune import PruningReport
    from repvgg.deploy.quantize import Quantization, QuantizationReport
    from repvgg.models.views import Views
    from repvgg.predict.masks import MaskPrediction
    from repvgg.predict.prediction import Prediction
    from repvgg.train.session import Run
    from repvgg.train.tasks import Evaluation

    Model = nn.Module | str | os.PathLike[str]
    Data = Source | str | os.PathLike[str]


def train(
    arch: str,
    data: "Data",
    out: str | os.PathLike[str],
    *,
    recipe: "str | os.PathLike[str] | Recipe" = "",
    init: "nn.Module | str" = "",
    minutes: float = 10.0,
    val: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "",
    workers: int = 0,
    block: str = "",
    width: float = 1.0,
    small_input: bool | None = None,
    keeping: Keeping = Keeping(),  # noqa: B008 - frozen
    log: Log = print,
    **changes: Any,
) -> "Run":
    """Train a model on images into the folder `out`, or go on with the run that is there; return its last and best evaluation.

    recipe: a name, a file (.json), a `Recipe`, or "auto" (see train/auto.py), which is the default for photos; changes: fields of
    it to set, such as epochs=20 or image_size=160. init: a model to start from; "none" for new weights where auto would take
    trained ones; `arch` may then be empty. minutes: what auto plans for. val: the share held out where the data has no splits of
    its own.

    Raises ValueError before any work if something does not fit, FloatingPointError if training diverges, `StoppedError` (a
    KeyboardInterrupt) when a signal asked for the end and the state is saved.
    """
    from repvgg.train import loop
    from repvgg.train.distributed import local_device

    if not arch and not init:
        raise ValueError("which model? --arch NAME for a new one (see repvgg info), or --init FILE to start from trained weights")
    source = _source(data, val, limit, seed, kept=_kept(Path(out)) if keeping.resume == "auto" else None)
    given: dict[str, Any] = {"block": block or None, "width": width if width != 1 else None, "small_input": small_input}
    options = {name: value for name, value in given.items() if value is not None}
    where = local_device(_place(device, workers))
    plain, start = resolved(recipe, source, bool(init), changes), init
    if plain is None:
        how: dict[str, Any] = {"minutes": minutes, "device": where, "workers": workers, "log": log, **options}
        plain, start = _chosen(arch, source, Path(out), init, keeping.resume == "auto", changes, how)
    if isinstance(start, str) and start == "none":
        start = ""
    settings: dict[str, Any] = {"seed": seed, "device": where, "workers": workers, "keeping": keeping, "log": log, **options}
    return loop.train(arch, source, plain, Path(out), init=start, **settings)


def resolved(recipe: "str | os.PathLike[str] | Recipe", source: "Source", trained: bool, changes: dict[str, Any]) -> Recipe | None:
    """Return the recipe that is meant, by default what suits the source; None for the one that has to be chosen by `auto`."""
    stream = hasattr(source.train, "order")
    if recipe in ("", "auto"):
        if not source.masks and not stream and (recipe == "auto" or source.recipe == "light"):
            return None
        if recipe == "auto":
            raise ValueError(f"{source.name}: --recipe auto is for labelled images that can be looked at beforehand")
        recipe = "finetune" if trained and not source.masks else source.recipe
    return resolve(recipe, **changes)


def _chosen(
    arch: str, source: "Source", out: Path, init: "nn.Module | str", resume: bool, changes: dict[str, Any], how: dict[str, Any]
) -> "tuple[Recipe, nn.Module | str]":
    """Return the recipe `auto` and what to start from: those of the run that is in the folder, else chosen now."""
    resolve("light", **changes)  # which refuses what is no field, before anything is measured
    settings = out / "settings.json"
    if resume and settings.exists():
        how["log"](f"recipe: {out} has one already")
        return resolve(out / "recipe.json", **changes), init or json.loads(settings.read_text())["init"]
    if not isinstance(init, str):
        return resolve("finetune", **changes), init
    from repvgg.train.auto import choose

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    choice = choose(arch, source, init=init, image_size=changes.get("image_size", 0), alone=alone, **how)
    given = ", ".join(f"{name} {value}" for name, value in changes.items() if getattr(choice.recipe, name) != value)
    if given:
        how["log"](f"auto: but as given, {given}")
    return resolve(choice.recipe, **changes), choice.init


def _kept(out: Path) -> Path | None:
    """Return the division of images that the run in a folder goes by, if there is one."""
    path = out / "split.csv"
    return path if path.exists() else None


def _source(
    data: "Data",
    val: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    kept: Path | None = None,
    model: "nn.Module | None" = None,
) -> "Source":
    """Open data, divided as it was when the model was trained or the run in a folder begun, and draw from it."""
    from repvgg.data import Source, open_source
    from repvgg.models.zoo import manifest_of

    if isinstance(data, Source):
        return data.limited(limit, seed)
    spec = os.fspath(data)
    told = manifest_of(model).training.get("splitting") if model is not None and val is None else None
    source = open_source(spec, val, seed if model is None else 0)
    if source.splitting and told:
        source = open_source(spec, float(told[0]), int(told[1]))
    if source.splitting and kept:
        from repvgg.data.listing import open_table

        root = Path(spec).parent if spec.endswith(".csv") else Path(spec)
        source = replace(open_table(kept, root=root, name=source.name), splitting=source.splitting)
    return source.limited(limit, seed)


def _place(device: str, workers: int = 0) -> str:
    """Return the device of that name, by default the first one. Raises ValueError for one that is not here."""
    from repvgg.measure.machine import choose_device

    if workers < 0:
        raise ValueError(f"--workers {workers}: at least 0")
    return choose_device(device)


def _opened(model: "Model") -> "nn.Module":
    from torch import nn

    from repvgg.models.load import open_model

    return model if isinstance(model, nn.Module) else open_model(os.fspath(model))


def evaluate(
    model: "Model",
    data: "Data",
    *,
    split: str = "val",
    val: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    engine: str = "",
    precision: str = "fp32",
    views: "Views | None" = None,
    device: str = "",
    workers: int = 0,
    log: Log = print,
) -> "Evaluation":
    """Return how good a model is on a split of the data: an `Accuracy` for labels, an `Overlap` for masks.

    Of data without splits of its own, the images are those that were held out when the model was trained, or the share `val`.
    engine: "auto" or a name; "" for PyTorch. Raises ValueError where model and data do not belong together.
    """
    from repvgg.models.views import WHOLE
    from repvgg.train.tasks import task_of

    where = _place(device, workers)
    network = _answering(model, engine, precision, batch_size, where, log)
    source = _source(data, val, limit, seed, model=network)
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "device": where, "views": views or WHOLE}
    found: Any = task_of(source).evaluate_model(network, source, split, **how)
    return replace(found, classes=tuple(source.classes))  # type: ignore[no-any-return]


def predict(
    model: "Model", images: "str | os.PathLike[str] | Sequence[str]", **options: Any
) -> "list[Prediction | MaskPrediction]":
    """Return the likeliest classes of each image, or its mask: `list(predictions(...))`, which see for the options."""
    return list(predictions(model, images, **options))


def predictions(
    model: "Model",
    images: "str | os.PathLike[str] | Sequence[str]",
    *,
    top: int = 5,
    out: str | os.PathLike[str] = "",
    batch_size: int = 32,
    engine: str = "",
    precision: str = "fp32",
    views: "Views | None" = None,
    device: str = "",
    log: Log = print,
) -> "Iterator[Prediction | MaskPrediction]":
    """Yield the likeliest classes of each image (`Prediction`), or its mask (`MaskPrediction`), in order.

    images: files, folders (all images below them) and globs. out: a folder to write masks into. An image that cannot be read yields
    an answer with an `error`. A deploy form is run by the native engine, without PyTorch, where that can be. Raises `ImageError`
    where a pattern fits nothing.
    """
    patterns = [os.fspath(images)] if isinstance(images, (str, os.PathLike)) else list(images)
    if isinstance(model, (str, os.PathLike)) and views is None and not out and precision == "fp32" and batch_size > 0:
        from repvgg.predict.light import predict_lightly

        answers = predict_lightly(os.fspath(model), patterns, top, engine) if device in ("", "cpu") else None
        if answers is not None:
            yield from answers
            return
    from repvgg.models.views import WHOLE
    from repvgg.models.zoo import manifest_of
    from repvgg.predict import labels, masks

    at_once = min(batch_size, len(labels.expand(patterns))) if patterns else batch_size
    where = _place(device)
    network = _answering(model, engine, precision, at_once, where, log)
    if manifest_of(network).task == "labels" and views in (None, WHOLE) and not out:
        yield from labels.predict(network, patterns, batch_size, top, where)
        return
    made = masks.predict_masks(network, patterns, where, views or WHOLE)
    yield from masks.write_masks(made, Path(out), masks.class_names(network)) if out else made


def _answering(model: "Model", engine: str, precision: str, batch_size: int, device: str, log: Log) -> "nn.Module":
    """Return a model, or an engine of it. Raises ValueError for a backbone, which gives maps and neither labels nor masks."""
    from torch import nn

    from repvgg.deploy import load
    from repvgg.models.zoo import manifest_of

    if isinstance(model, nn.Module):
        named, network = "this model", model if not engine else load.load_engine(model, engine, precision, batch_size=batch_size)
    else:
        named = os.fspath(model)
        network = load.open_model(named, engine, precision, batch_size, device, log)
    manifest = manifest_of(network)
    last = (manifest.layers or [{"op": "linear"}])[-1]["op"]
    if manifest.arch["num_classes"] == 0 if manifest.arch else last != "linear":
        raise ValueError(f"{named}: a backbone, which gives no labels: train a head on it first (repvgg train --init {named} ...)")
    return network


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

    to: onnx, openvino, ncnn, mnn, pt2, aotinductor, or several of them. batch_size: images a run, 0 for any number. pixels: take
    uint8 pixels; image_size: and resize them too. data, images: compare on so many images of its validation split instead of random
    ones. Raises ValueError for a format that is unknown, missing or cannot hold such a graph, `ReparamError` for what cannot be
    folded.
    """
    from repvgg.deploy.export import Shape, real_images
    from repvgg.deploy.export import export as write
    from repvgg.deploy.formats import report_of

    network = _opened(model)
    shape = Shape(batch_size or None, any_size, pixels, image_size)
    compared = real_images(network, data, images, shape) if data else None
    stem = name or ("model" if network is model else Path(os.fspath(model)).stem)  # type: ignore[arg-type]
    found = []
    for kind in [to] if isinstance(to, str) else to:
        path = write(network, kind, out, stem, shape, compared, log)
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
    """Write a model in INT8 for OpenVINO or ONNX Runtime, calibrated on the training split; return the accuracy and speed of both.

    Raises ValueError for data that do not fit or a loss of accuracy that `settings` do not allow.
    """
    from repvgg.deploy.quantize import Quantization
    from repvgg.deploy.quantize import quantize as write

    network, where = _opened(model), _place(device)
    source = _source(data, val, limit, seed, model=network)
    stem = name or ("model" if network is model else Path(os.fspath(model)).stem)  # type: ignore[arg-type]
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
    """Take channels out of a RepVGG, train what is left into the run folder `out`; return accuracy, cost and speed before and
    after.

    keep: the share of each layer's channels that stays. recipe, changes: as for `train`; photos get `finetune` by default.
    """
    from repvgg.deploy.prune import prune as work

    network, where = _opened(model), _place(device, workers)
    source = _source(data, val, limit, seed, model=network)
    plain = resolved(recipe, source, False, changes) or resolve("finetune", **changes)
    how: dict[str, Any] = {"seed": seed, "device": where, "workers": workers, "keeping": keeping, "log": log}
    return work(network, source, Path(out), keep, plain, engine=engine, **how)
