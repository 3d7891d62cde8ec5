"""Use a model: evaluate it on a data set, predict images."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from repvgg.api.opening import device_named, open_data
from repvgg.disk import Log

if TYPE_CHECKING:
    from torch import nn

    from repvgg.api.opening import Data, Model
    from repvgg.models.views import Views
    from repvgg.predict.masks import MaskPrediction
    from repvgg.predict.prediction import Prediction
    from repvgg.train.tasks import Evaluation


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
    on_bad_image: Literal["stop", "skip"] = "stop",
    device: str = "",
    workers: int = 0,
    log: Log = print,
) -> "Evaluation":
    """Return how good a model is on a split of the data: an `Accuracy` for labels, an `Overlap` for masks.

    For data without splits of its own, it uses the images held out when the model was trained, or the share `val`.
    engine: "auto" or a name; "" for PyTorch. Classes named differently in model and data are matched by number, and
    this is logged. on_bad_image: "stop" raises `ImageError` for an image that cannot be read, "skip" leaves it out and logs it.
    Raises ValueError where model and data do not belong together.
    """
    from repvgg.data.transforms import BadImages
    from repvgg.models.views import WHOLE
    from repvgg.models.zoo import manifest_of
    from repvgg.train.evaluate import told_apart
    from repvgg.train.tasks import task_of

    where = device_named(device, workers)
    network = _answering(model, engine, precision, batch_size, where, log)
    source = open_data(data, val, limit, seed, model=network, log=log)
    task = task_of(source)
    task.check(network, source)
    training = manifest_of(network).training
    its_own = "splitting" in training and training.get("data", source.name) == source.name
    if split == "val" and val is None and source.splitting and not its_own:
        whole = len(source.split("all"))
        log(f"{source.name}: its {len(source.val):,} images that --val holds out; --split all takes all {whole:,}")
    if apart := told_apart(manifest_of(network), source):
        shown = [f"the model's {own!r} is {given!r}" for own, given in list(apart.values())[:3]]
        log(f"{source.name}: classes are taken by their numbers: {', '.join(shown)}{', ...' * (len(apart) > 3)}")
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "device": where, "views": views or WHOLE}
    with TemporaryDirectory() as folder:
        bad = BadImages(Path(folder) / "bad_images.txt", replace=False) if on_bad_image == "skip" else None
        found: Any = task.evaluate_model(network, source, split, **how, bad=bad)
        for line in bad.listed() if bad else ():
            log(f"left out: {line}")
    return replace(found, classes=tuple(source.classes))  # type: ignore[no-any-return]


def predict(
    model: "Model", images: "str | os.PathLike[str] | Sequence[str]", **options: Any
) -> "list[Prediction | MaskPrediction]":
    """Return the likeliest classes of each image, or its mask: `list(predictions(...))`, with the same options."""
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
    explain: str = "",
    device: str = "",
    log: Log = print,
) -> "Iterator[Prediction | MaskPrediction]":
    """Yield the likeliest classes of each image (`Prediction`), or its mask (`MaskPrediction`), in order.

    images: files, folders (all images below them) and globs. top: labels for each image. batch_size: images at a time. engine:
    "auto" or a name. views: in which a PSPNet sees a photo. explain: "cam" also writes a picture of the evidence. out: a folder for
    masks, or for those pictures. An image that cannot be read yields an answer with an `error`. The native engine runs up to 32
    images of a deploy form, without PyTorch, if nothing else is asked for and there is no NVIDIA GPU or `device` is
    "cpu". Raises `ImageError` if a pattern matches nothing.
    """
    patterns = [os.fspath(images)] if isinstance(images, (str, os.PathLike)) else list(images)
    if explain:
        if (engine, precision, views) != ("", "fp32", None):
            raise ValueError("--explain cam looks into the network: leave out --engine, --precision, --slide, --scales and --flip")
        from repvgg.predict import explain as explaining

        network = _answering(model, "", "fp32", batch_size, device_named(device), log)
        yield from explaining.explain(network, patterns, Path(out) if out else None, top, device_named(device))
        return
    if isinstance(model, (str, os.PathLike)) and views is None and not out and precision == "fp32" and batch_size > 0:
        from repvgg.predict.light import predict_lightly

        answers = predict_lightly(os.fspath(model), patterns, top, engine, device)
        if answers is not None:
            yield from answers
            return
    from repvgg.models.views import WHOLE
    from repvgg.models.zoo import manifest_of
    from repvgg.predict import labels, masks
    from repvgg.predict.paths import expand

    paths = expand(patterns)
    at_once = min(batch_size, len(paths)) if paths else batch_size
    where = device_named(device)
    network = _answering(model, engine, precision, at_once, where, log)
    if manifest_of(network).task == "labels" and views in (None, WHOLE) and not out:
        yield from labels.predict(network, patterns, batch_size, top, where)
        return
    made = masks.predict_masks(network, paths, where, views or WHOLE)
    yield from masks.write_masks(made, paths, Path(out), masks.class_names(network)) if out else made


def _answering(model: "Model", engine: str, precision: str, batch_size: int, device: str, log: Log) -> "nn.Module":
    """Return a model, or an engine of it. Raises ValueError for a backbone, which gives maps and neither labels nor masks."""
    from torch import nn

    from repvgg.deploy.load import open_model
    from repvgg.models.zoo import manifest_of

    given = model if isinstance(model, nn.Module) else os.fspath(model)
    network = open_model(given, engine, precision, batch_size, device, log)
    manifest = manifest_of(network)
    last = (manifest.layers or [{"op": "linear"}])[-1]["op"]
    if manifest.arch.get("num_classes") == 0 if manifest.arch else last != "linear":
        named = given if isinstance(given, str) else "this model"
        raise ValueError(f"{named}: a backbone, which gives no labels: train a head on it first (repvgg train --init {named} ...)")
    return network
