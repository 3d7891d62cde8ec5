"""A run folder, read: what was trained, how, how it went and how good it became. The images are not needed."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from repvgg.data import Source, open_source
from repvgg.data.listing import reopened
from repvgg.disk import FileError, Log, read_text
from repvgg.models.header import read_header
from repvgg.models.manifest import Manifest
from repvgg.train.logs import read_lines
from repvgg.train.recipes import Recipe
from repvgg.train.session import evaluation_in
from repvgg.train.state import Store
from repvgg.train.tasks import Evaluation, Task, task_of_model

NAMES = {"top1": "top-1", "mean_iou": "mean IoU"}


@dataclass(frozen=True)
class RunFolder:
    """Hold what a run has left behind.

    settings: all that it was started with, the recipe's fields too. lines: of metrics.jsonl. best: its evaluation, None where the
    state is gone. seconds, machine: None where it was killed. finished: it has come to its end.
    """

    path: Path
    manifest: Manifest
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    best: Evaluation | None
    seconds: float | None
    machine: dict[str, Any] | None
    finished: bool

    @property
    def task(self) -> Task:
        return task_of_model(self.manifest)

    @property
    def recipe(self) -> Recipe:
        return Recipe(**{f.name: self.settings[f.name] for f in fields(Recipe) if f.name in self.settings})

    @property
    def measure(self) -> str:
        """The figure that the best model is chosen by, as metrics.jsonl names it."""
        return "top1" if self.task.kind == "labels" else "mean_iou"

    @property
    def title(self) -> str:
        name = (self.manifest.arch or {}).get("name", "a model")
        return f"{name} on {self.settings.get('data', 'images')}"

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines that end an epoch."""
        return [line for line in self.lines if "val_loss" in line]

    @property
    def best_line(self) -> dict[str, Any] | None:
        return max(self.evaluations, key=lambda line: line[f"val_{self.measure}"], default=None)

    def curve(self, name: str, scale: float = 1) -> list[tuple[float, float]]:
        """Return a figure by epoch, counted from 1: of each epoch's end, or of what was logged within epochs."""
        per_epoch = max((line["step"] / (line["epoch"] + 1) for line in self.evaluations), default=0)
        points = ((line["epoch"] + 1 if "val_loss" in line else line["step"] / max(1, per_epoch), line) for line in self.lines)
        return [(epoch, scale * line[name]) for epoch, line in points if name in line]

    def source(self, data: str, log: Log) -> Source | None:
        """Open the images that it was trained on; None, with a word, where they are not there.

        data: where they are now, by default where they were.
        """
        spec = data or str(self.settings.get("data", ""))
        try:
            source = reopened(open_source(spec), self.path)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if data:
                raise
            log(f"{self.path}: without pictures, as the images are not to be had ({error}): --data says where they are")
            return None
        if source.classes != self.manifest.classes:
            raise ValueError(f"--data {spec}: has other classes than the model in {self.path}")
        images = self.settings.get("images", len(source.train))
        return source.limited(images, self.settings["seed"]) if images < len(source.train) else source

    def as_trained(self, source: Source) -> Source:
        """Return the source with the size of images that the model was trained with."""
        return replace(source, preprocessing=self.manifest.preprocessing)


def open_run(path: Path) -> RunFolder:
    """Read a run folder. Raises `FileError` for a folder that holds no run, or one of which no epoch has ended."""
    if not (path / "metrics.jsonl").is_file():
        raise FileError(f"{path}: no run folder, it has no metrics.jsonl (repvgg train --out makes one)")
    header = read_header(path / "best.safetensors")
    if header is None:
        raise FileError(f"{path}: no epoch of this run has ended, there is nothing to report yet")
    manifest = header.manifest
    task = task_of_model(manifest)
    state = Store(path / "state", log=lambda line: None).latest()
    recipe, summary = (_json(path / f"{name}.json") for name in ("recipe", "summary"))
    settings = state.facts["settings"] if state else {**manifest.training, **recipe}
    best = evaluation_in(state, "best", task) if state else None
    seconds = summary.get("seconds", state.facts.get("seconds") if state else None)
    lines = read_lines(path / "metrics.jsonl")
    machine, finished = summary.get("machine"), bool(summary.get("finished"))
    return RunFolder(path, manifest, settings, lines, best, seconds, machine, finished)


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found
