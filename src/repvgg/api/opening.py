"""Data, models and devices that the verbs are given, opened."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg.disk import Log

if TYPE_CHECKING:
    from torch import nn

    from repvgg.data import Source

    Model = nn.Module | str | os.PathLike[str]
    Data = Source | str | os.PathLike[str]


def open_data(
    data: "Data",
    val: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    run: Path | None = None,
    model: "nn.Module | None" = None,
    log: Log = print,
) -> "Source":
    """Open data, split as when the model was trained or the run in a folder begun, and draw from it."""
    from repvgg.data import Source, open_source
    from repvgg.models.zoo import manifest_of

    if isinstance(data, Source):
        if val is not None:
            raise ValueError("val divides data that are named, not a Source, which is divided already")
        return data.limited(limit, seed)
    spec = os.fspath(data)
    told = manifest_of(model).training.get("splitting") if model is not None else None
    source = open_source(spec, val, seed if model is None else 0)
    if source.splitting and told and val in (None, float(told[0])):
        source = open_source(spec, float(told[0]), int(told[1]))
    elif source.splitting and told:
        log(f"{spec}: --val {val:g} is not how the model's images were divided ({told[0]:g}): it has seen some of these")
    if run is not None:
        from repvgg.data.listing import reopened

        source = reopened(source, run, val)
    return source.limited(limit, seed)


def device_named(device: str, workers: int = 0) -> str:
    """Return the device of that name, by default the first one. Raises ValueError for one that is not here."""
    from repvgg.measure.machine import choose_device

    if workers < 0:
        raise ValueError(f"--workers {workers}: at least 0")
    return choose_device(device)


def opened(model: "Model") -> "nn.Module":
    from torch import nn

    from repvgg.models.load import open_model

    return model if isinstance(model, nn.Module) else open_model(os.fspath(model))
