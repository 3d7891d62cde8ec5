"""Train by a recipe, evaluated every epoch, with the best and the last model kept; it goes on where it was stopped.

    train("repvgg_a0", open_source("digits"), get_recipe("demo"), out="runs/digits")

A run folder holds best.safetensors and last.safetensors (training form), recipe.json, metrics.jsonl (a line every `LOG_EVERY`
steps and one for each evaluation), state/ (see state.py), split.csv where the data had no splits of its own, TensorBoard's
events; and in the end, or when it is stopped, summary.json, with the machine and the time, and curve.png.
"""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.data import Source
from repvgg.data.transforms import normalise
from repvgg.disk import FileError, Log
from repvgg.models import zoo
from repvgg.numerics import repeatable
from repvgg.train.batches import Feed
from repvgg.train.distributed import joined
from repvgg.train.finetune import started_from
from repvgg.train.heap import kept_heap
from repvgg.train.recipes import Keeping, Recipe
from repvgg.train.session import Run, Session
from repvgg.train.state import Store
from repvgg.train.tasks import task_of
from repvgg.train.trainer import Trainer
from repvgg.train.whiten import whiten

__all__ = ["KEEPING", "Run", "new_model", "train"]

KEEPING = Keeping()
OURS = ("best.safetensors", "last.safetensors")  # one of which, or states, is in every run folder
REPLACED = ("summary.json", "settings.json", "recipe.json", "split.csv", "metrics.jsonl")  # by a new run


def train(
    arch: str,
    source: Source,
    recipe: Recipe,
    out: str | Path,
    *,
    init: str | nn.Module = "",
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    keeping: Keeping = KEEPING,
    log: Log = print,
    **model_options: Any,
) -> Run:
    """Train a model of `arch` on a source, into the folder `out`; or go on with the run that is there.

    init: a model file, a name or a model of ours, to start from its weights instead of new ones. model_options: more arguments of
    `create_model` (width, block, ...); `small_input` is on for inputs of at most 64 pixels unless it is given. Under torchrun all
    processes call this alike. Raises ValueError before any work if the settings do not fit, FloatingPointError if the loss is no
    number, `StoppedError` when a signal asked for the end and the state is saved.
    """
    refuse(source, Path(out))
    with joined(device) as world, repeatable(device), kept_heap():
        log = log if world.main else (lambda line: None)
        task = task_of(source)
        source = task.prepared(source, recipe)
        torch.manual_seed(seed)
        if init:
            if model_options:
                raise ValueError(f"--init: the model is what the file says; it takes no {', '.join(model_options)}")
            model, source = started_from(init, arch, source, keeping.allow_deploy, log)
            source = task.prepared(source, recipe)  # once more: it has the model's own preprocessing now
            zoo.remember(model, replace(zoo.manifest_of(model), preprocessing=source.preprocessing))
        else:
            model = new_model(arch, source, log=log, **model_options)
        task.check(model, source)
        if source.splitting:  # so that it is not evaluated on what it was trained on
            zoo.remember(model, replace(zoo.manifest_of(model), training={"splitting": list(source.splitting)}))
        out = Path(out)
        bad = out / "bad_images.txt" if keeping.on_bad_image == "skip" else None
        feed = Feed(source, recipe, seed, workers, world, bad, device)
        if recipe.whiten and not init:
            whiten(model, (normalise(x, source.preprocessing) for x, _ in feed.epoch(0)))
        trainer = Trainer(model, recipe, len(source.classes), task=task, world=world, device=device, seed=seed)
        settings = {
            "arch": arch,
            "data": source.name,
            "images": len(source.train),
            "classes": len(source.classes),
            "seed": seed,
            **({"splitting": list(source.splitting)} if source.splitting else {}),
            "init": init if isinstance(init, str) else f"{type(init).__name__} {_kernels(init)}",
            **model_options,
            **asdict(recipe),
        }
        return Session(trainer, feed, source, settings, out, keeping, log).run()


def refuse(source: Source, out: Path) -> None:
    """Raise ValueError for images, or a run folder, of which no training can come."""
    if len(source.classes) < 2:
        raise ValueError(f"{source.name}: has one class, {source.classes[0]!r}; there is nothing to tell apart")
    if out.exists() and not out.is_dir():
        raise FileError(f"{out}: cannot be a run folder (it is a file)")
    holds = [name for name in sorted(REPLACED) if (out / name).exists()]
    if holds and not Store(out / "state").ours() and not any((out / name).exists() for name in OURS):
        raise FileError(f"{out}: holds a {holds[0]} of something else, which would be lost: name a folder of its own")
    if len(first := next(iter(Path(out).parts), "")) > 2 and first.endswith(":"):
        raise ValueError(f"--out {out}: a run is in a folder, which --mirror copies to an object store")


def new_model(arch: str, source: Source, log: Log = print, **options: Any) -> nn.Module:
    """Return a new network for this source: with its classes and channels, and `small_input` for small images."""
    channels, height, width = source.preprocessing.input_size
    if "small_input" not in options and max(height, width) <= 64 and zoo.takes(arch, "small_input"):
        log(f"images of {height} x {width} pixels: small_input is on (stem and first stage at stride 1)")
        options["small_input"] = True
    model = zoo.create_model(arch, num_classes=len(source.classes), in_chans=channels, **options)
    zoo.remember(model, replace(zoo.manifest_of(model), classes=source.classes, preprocessing=source.preprocessing))
    return model


def _kernels(model: nn.Module) -> str:
    """Return a digest of a model's kernels. (The statistics of batch norms may differ by a rounding from machine to machine.)"""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
