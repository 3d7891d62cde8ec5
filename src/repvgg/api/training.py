"""Train: on any data, by a recipe that is named, written in a file, or chosen."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.api.opening import device_named, open_data
from repvgg.disk import Log, read_text
from repvgg.train.recipes import Keeping, Recipe, resolve

if TYPE_CHECKING:
    from torch import nn

    from repvgg.api.opening import Data
    from repvgg.data import Source
    from repvgg.train.session import Run


def train(
    arch: str,
    data: "Data",
    out: str | os.PathLike[str],
    *,
    recipe: "str | os.PathLike[str] | Recipe" = "",
    init: "nn.Module | str" = "",
    minutes: float | None = None,
    val: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "",
    workers: int = 0,
    block: str = "",
    width: float = 1.0,
    small_input: bool | None = None,
    keeping: Keeping = Keeping(),  # noqa: B008 - frozen
    report: bool = True,
    log: Log = print,
    **changes: Any,
) -> "Run":
    """Train a model on images into the folder `out`, or resume the run that is there; return its last and best evaluation.

    recipe: a name, a file (.json), a `Recipe`, or "auto" (see train/auto.py), which is the default for photos; changes: fields of
    it to set, such as epochs=20 or image_size=160. init: a model to start from (`arch` may then be empty); "none" for new weights
    where auto would use trained ones. minutes: what auto plans for, by default 10. val: the share held out where the data has
    no splits of its own.

    Raises ValueError before any work if something does not fit, FloatingPointError if training diverges, `StoppedError` (a
    KeyboardInterrupt) after a signal asked it to stop and the state is saved.
    """
    from repvgg.data.cache import found_by
    from repvgg.train import loop
    from repvgg.train.distributed import joined, local_device
    from repvgg.train.mirror import Mirror

    new = isinstance(init, str) and init in ("", "none")
    if not arch and new:
        raise ValueError("which model? --arch NAME for a new one (see repvgg info), or --init FILE to start from trained weights")
    given: dict[str, Any] = {"block": block or None, "width": width if width != 1 else None, "small_input": small_input}
    options = {name: value for name, value in given.items() if value is not None}
    where = local_device(device_named(device, workers))
    with joined(where) as world:
        log = log if world.main else (lambda line: None)
        if keeping.mirror and keeping.resume == "auto" and world.main:
            Mirror(keeping.mirror, Path(out), log).fetch()  # the run that is there has a recipe and a division of its own
        with found_by(world.once):
            source = open_data(data, val, limit, seed, run=Path(out) if keeping.resume == "auto" else None)
        loop.refuse(source, Path(out))
        _refuse_as_a_class(data, Path(out))
        plain, start = resolved(recipe, source, "" if new else init, changes, log), init
        if plain is not None and minutes is not None:
            raise ValueError(f"--minutes {minutes:g} is for --recipe auto only: leave it out, or say --recipe auto")
        if plain is None:
            how: dict[str, Any] = {"device": where, "workers": workers, "allow_deploy": keeping.allow_deploy, "log": log, **options}
            how |= {} if minutes is None else {"minutes": minutes}
            plain, start = _chosen(arch, source, Path(out), init, keeping.resume == "auto", changes, how)
        if isinstance(start, str) and start == "none":
            start = ""
        settings: dict[str, Any] = {"seed": seed, "device": where, "workers": workers, "keeping": keeping, "log": log, **options}
        run = loop.train(arch, source, plain, Path(out), init=start, **settings)
    if report and os.environ.get("RANK", "0") == "0":
        report_at_the_end(Path(out), source, where, log)
    return run


def _refuse_as_a_class(data: "Data", out: Path) -> None:
    """Raise ValueError for a run folder among class folders, whose pictures would be a class the next time."""
    from repvgg.data import is_files
    from repvgg.data.folder import is_split

    if isinstance(data, (str, os.PathLike)) and is_files(os.fspath(data)) and Path(data).is_dir():
        listed = Path(data) / "train" if is_split(Path(data) / "train") else Path(data)
        if out.resolve().is_relative_to(listed.resolve()) and not (out / "state").exists():
            raise ValueError(f"--out {out}: lies among the class folders of {listed}, and would be a class: name one elsewhere")


def report_at_the_end(folder: Path, source: "Source", device: str, log: Log) -> None:
    """Write the page of a run that has just ended; a failure is only logged, in a line, because the run is safe."""
    try:
        from repvgg.web.report import write_report

        log(f"{write_report(folder, source, device=device, log=log)}: curves, confusion, mistakes, costs")
    except ModuleNotFoundError as error:
        needed = str(error.name).partition(".")[0]
        log(f"{folder}: without a page, which needs {needed}: pip install {needed}, then repvgg report {folder}")
    except Exception as error:  # whatever drawing and evaluating once more raise
        log(f"{folder}: without a page ({error}); repvgg report {folder} makes it")


def resolved(
    recipe: "str | os.PathLike[str] | Recipe", source: "Source", init: "nn.Module | str", changes: dict[str, Any], log: Log
) -> Recipe | None:
    """Return the recipe that is meant; by default one for the source, or for what training starts from, and log it. None: `auto`
    has to choose one."""
    from repvgg.train.finetune import finetuning

    stream = hasattr(source.train, "shuffled")
    if recipe in ("", "auto"):
        if not source.masks and not stream and (recipe == "auto" or source.recipe == "light"):
            return None
        if recipe == "auto":
            raise ValueError(f"{source.name}: --recipe auto is for labelled images that can be looked at beforehand")
        tuned = init and not source.masks
        log(f"recipe: {'finetune' if tuned else source.recipe}")
        recipe = finetuning(init) if tuned else source.recipe
    return resolve(recipe, **changes)


def settled(
    recipe: "str | os.PathLike[str] | Recipe", source: "Source", otherwise: str, changes: dict[str, Any], log: Log
) -> Recipe:
    """Return the recipe that is meant, by default `otherwise` for photos, and SGD. Raises ValueError for `auto`, which plans a
    training."""
    if recipe == "auto":
        raise ValueError("--recipe auto is for train alone: name a recipe (repvgg recipe lists them), or a file")
    found = resolved(recipe, source, "", changes, log)
    if found is None:
        log(f"recipe: {otherwise}")
        return resolve(otherwise, **changes)
    if recipe or "optimizer" in changes or found.optimizer != "muon":
        return found
    log("by SGD (--optimizer muon for Muon)")  # Muon moves kernels of some blocks only, and trained ones as far as new ones
    return replace(found, optimizer="sgd")


def _chosen(
    arch: str, source: "Source", out: Path, init: "nn.Module | str", resume: bool, changes: dict[str, Any], how: dict[str, Any]
) -> "tuple[Recipe, nn.Module | str]":
    """Return the recipe `auto` and what to start from: those of the run that is in the folder, else chosen now."""
    from repvgg.train.finetune import finetuning

    resolve("light", **changes)  # which refuses what is no field, before anything is measured
    settings = out / "settings.json"
    if resume and settings.exists():
        how["log"](f"recipe: {out} has one already")
        return resolve(out / "recipe.json", **changes), init or json.loads(read_text(settings))["init"]
    if not isinstance(init, str):
        return resolve(finetuning(init), **changes), init
    from repvgg.train.auto import choose

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    choice = choose(arch, source, init=init, image_size=changes.get("image_size", 0), alone=alone, **how)
    given = ", ".join(f"{name} {value}" for name, value in changes.items() if getattr(choice.recipe, name) != value)
    if given:
        how["log"](f"auto: but as given, {given}")
    return resolve(choice.recipe, **changes), choice.init
