"""Training: SGD on a recipe, evaluated every epoch, with the best and the last model kept; it goes on where it was stopped.

    train("repvgg_a0", open_source("digits"), get_recipe("demo"), out="runs/digits")

A run folder holds best.safetensors and last.safetensors (training form), recipe.json, metrics.jsonl (a line every `LOG_EVERY`
steps and one for each evaluation), state/ (see state.py), TensorBoard's events; and in the end summary.json, with the
machine and the time, and curve.png.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.data import Source
from repvgg.data.transforms import BadImages, normalise
from repvgg.disk import FileError, Log, atomically
from repvgg.measure.machine import write_record
from repvgg.models import zoo
from repvgg.models.load import save
from repvgg.train.batches import Feed
from repvgg.train.distributed import joined
from repvgg.train.finetune import started_from
from repvgg.train.logs import Logs, NoLogs, draw_curve, read_lines
from repvgg.train.progress import Progress
from repvgg.train.recipes import Keeping, Recipe
from repvgg.train.signals import StoppedError, StopRequests
from repvgg.train.state import State, Store
from repvgg.train.tasks import Evaluation, Task, task_of
from repvgg.train.trainer import Trainer

LOG_EVERY = 20  # steps
KEEPING = Keeping()


@dataclass(frozen=True)
class Run:
    """What a finished run leaves: the model in training form, eval mode; its last and its best evaluation; and the time it took."""

    model: nn.Module
    last: Any
    best: Any
    seconds: float
    history: list[dict[str, Any]]


@dataclass
class Course:
    """How far a run has come."""

    step: int = 0
    epochs: int = 0
    """Epochs that have ended in an evaluation."""
    seconds: float = 0.0
    last: Evaluation | None = None
    best: Evaluation | None = None
    saved: float = field(default_factory=time.perf_counter)


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
    if len(source.classes) < 2:
        raise ValueError(f"{source.name}: has one class, {source.classes[0]!r}; there is nothing to tell apart")
    with joined(device) as world:
        log = log if world.main else _silent
        task = task_of(source)
        source = task.prepared(source, recipe)
        torch.manual_seed(seed)
        if init:
            if model_options:
                raise ValueError(f"--init: the model is what the file says; it takes no {', '.join(model_options)}")
            model, source = started_from(init, arch, source, keeping.allow_deploy, log)
        else:
            model = new_model(arch, source, log=log, **model_options)
        task.check(model, source)
        out = Path(out)
        bad = out / "bad_images.txt" if keeping.on_bad_image == "skip" else None
        feed = Feed(source, recipe, seed, workers, world, bad)
        trainer = Trainer(model, recipe, len(source.classes), task=task, world=world, device=device, seed=seed)
        settings = {
            "arch": arch,
            "data": source.name,
            "images": len(source.train),
            "classes": len(source.classes),
            "seed": seed,
            "init": init if isinstance(init, str) else type(init).__name__,
            **model_options,
            **asdict(recipe),
        }
        return _Session(trainer, feed, source, settings, out, keeping, log).run()


class _Session:
    """One process's work on a run, from where it was to its end."""

    def __init__(
        self, trainer: Trainer, feed: Feed, source: Source, settings: dict[str, Any], out: Path, keeping: Keeping, log: Log
    ) -> None:
        self.trainer, self.feed, self.source, self.out, self.keeping, self.log = trainer, feed, source, out, keeping, log
        self.recipe, self.task, self.world = trainer.recipe, trainer.task, trainer.world
        self.settings = settings
        self.store = Store(out / "state", log)
        if self.recipe.lr_per:
            r = self.recipe
            log(f"learning rate {r.lr:g} per {r.lr_per} images, {r.peak_lr:g} for {r.batch_size}")

    def run(self) -> Run:
        course = self._take_up()
        self.started = time.perf_counter() - course.seconds
        if course.epochs < self.recipe.epochs:
            with (
                StopRequests() as stop,
                self._logs(course) as logs,
                self._progress(course) as progress,
            ):
                for epoch in range(course.epochs, self.recipe.epochs):
                    self._train(epoch, course, stop, logs, progress)
                    self._evaluate(epoch, course, logs, progress)
                    self._leave_if_asked(stop, course)
        lines = read_lines(self.out / "metrics.jsonl")
        self._finish(course, lines)
        assert course.last is not None
        assert course.best is not None
        self.trainer.model._compiled_call_impl = None
        return Run(self.trainer.best_model.eval(), course.last, course.best, course.seconds, lines)

    def _train(self, epoch: int, course: Course, stop: StopRequests, logs: Logs | NoLogs, progress: Progress) -> None:
        """The steps of an epoch that are left."""
        steps, images = self.feed.steps, self.feed.images
        self.trainer.train()
        for waited, parts in _in_parts(self.feed.epoch(epoch, course.step - epoch * steps), self.recipe.accumulate):
            lr = self.recipe.lr_at(course.step / (self.recipe.epochs * steps))
            inputs = [(self._normalised(x), y.to(self.trainer.device)) for x, y in parts]
            loss, share = self.trainer.step(inputs, lr, course.step)
            course.step += 1
            progress.step(epoch, loss, share, lr, waited, images.images_per_second * self.world.size)
            if course.step % LOG_EVERY == 0:
                logs.write(step=course.step, epoch=epoch, **progress.averages())
            self._save_if_due(course)
            self._leave_if_asked(stop, course)

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        return normalise(x.to(self.trainer.device, non_blocking=True), self.source.preprocessing)

    def _evaluate(self, epoch: int, course: Course, logs: Logs | NoLogs, progress: Progress) -> None:
        """At the end of an epoch: the figures, the models, the state."""
        self.trainer.settle()
        world = self.world
        bad = BadImages(self.out / "bad_images.txt", replace=False) if self.keeping.on_bad_image == "skip" else None
        data = self.task.batches(
            self.source.val, self.source.preprocessing, self.feed.part, self.feed.workers, str(self.trainer.device), bad, world
        )
        course.last = self.task.evaluate(self.trainer.predict, data, len(self.source.classes), world)
        course.epochs += 1
        better = course.best is None or course.last.score > course.best.score
        if better:
            course.best = course.last
        if world.main:
            for name in ("best", "last") if better else ("last",):
                self._save_model(name, course)
        last = course.last
        progress.evaluated(epoch, last)
        logs.write(step=course.step, epoch=epoch, **{f"val_{name}": value for name, value in last.figures.items()})
        self._save(course)

    def _save_model(self, name: str, course: Course) -> None:
        assert course.last is not None
        score = {f"val_{course.last.measure}": course.last.score}
        training = {"data": self.source.name, "epoch": course.epochs, **score, "seed": self.settings["seed"]}
        save(
            self.trainer.best_model,
            self.out / f"{name}.safetensors",
            classes=self.source.classes,
            preprocessing=self.source.preprocessing,
            training={**training, "recipe": asdict(self.recipe)},
        )

    # ------------------------------------------------------------------------------------------------------- stop and go on

    def _take_up(self) -> Course:
        """Where the run in the folder is; its beginning if there is none. Raises ValueError if it is another run."""
        _make_folder(self.out)
        state = None if self.keeping.resume == "never" else self.store.latest()
        step = state.step if state else 0
        everywhere = self.world.total(torch.tensor([step], device=self.world.device))  # all have looked before the first one writes
        if int(everywhere) != step * self.world.size:
            raise ValueError(f"{self.out}: the processes find different states in it; it must be a folder that all of them share")
        if state is None:
            return self._begin()
        allowed = set(filter(None, self.keeping.allow_change.split(",")))
        if unknown := sorted(allowed - self.settings.keys()):
            raise ValueError(f"--allow-change {unknown[0]}: there are {', '.join(self.settings)}")
        before = state.facts["settings"]
        for name, value in self.settings.items():
            if before.get(name) != value and name not in allowed:
                raise ValueError(
                    f"{self.out}: holds a run with {name} {before.get(name)!r}, not {value!r}: "
                    f"another --out, or --allow-change {name}, or --resume never"
                )
        last, best = (_evaluation(self.task, state, name) for name in ("last", "best"))
        if state.facts["steps"] != self.feed.steps:
            raise ValueError(
                f"{self.out}: an epoch had {state.facts['steps']} steps, now it has {self.feed.steps}: a run cannot change that"
            )
        try:
            self.trainer.load(state.tensors, state.facts["scaler"])
        except (RuntimeError, KeyError):  # what was allowed to change has changed the network
            raise FileError(f"{self.out}: the state in it is of another network: another --out, or --resume never") from None
        course = Course(state.step, state.facts["epochs"], state.facts["seconds"], last, best)
        if course.epochs >= self.recipe.epochs:
            self.log(f"{self.out}: has had its {course.epochs} epochs already")
        else:
            self.log(f"{self.out}: goes on after step {course.step} of {self.recipe.epochs * self.feed.steps}")
            if self.world.main:
                (self.out / "summary.json").unlink(missing_ok=True)  # of a shorter run
        return course

    def _begin(self) -> Course:
        models = [name for name in ("best.safetensors", "last.safetensors") if (self.out / name).exists()]
        killed_early = (self.out / "state").exists()
        if models and not killed_early and self.keeping.resume == "auto":
            raise FileError(f"{self.out}: holds {models[0]} but no state to go on from: another --out, or --resume never")
        self.world.wait()
        if self.world.main:
            (self.out / "summary.json").unlink(missing_ok=True)  # of the run before
            self.store.clear()
            text = json.dumps(asdict(self.recipe), indent=2) + "\n"
            atomically(self.out / "recipe.json", lambda path: path.write_text(text))
            self.store.folder.mkdir(exist_ok=True)
        return Course()

    def _save(self, course: Course) -> None:
        course.saved, course.seconds = time.perf_counter(), time.perf_counter() - self.started
        if not self.world.main:
            return
        facts: dict[str, Any] = {
            "epochs": course.epochs,
            "steps": self.feed.steps,
            "seconds": course.seconds,
            "settings": self.settings,
        }
        tensors = self.trainer.tensors()
        for name, evaluation in (("last", course.last), ("best", course.best)):
            if evaluation is not None:
                tensors[f"{name}.confusion"] = evaluation.confusion.clone()
                facts[name] = {key: value for key, value in vars(evaluation).items() if key != "confusion"}
        self.store.save(State(course.step, tensors, {**facts, "scaler": self.trainer.scaler.state_dict()}))

    def _save_if_due(self, course: Course) -> None:
        by_steps = self.keeping.save_steps and course.step % self.keeping.save_steps == 0
        if by_steps or time.perf_counter() - course.saved > 60 * self.keeping.save_minutes:
            self._save(course)

    def _leave_if_asked(self, stop: StopRequests, course: Course) -> None:
        """All processes at the same step, although a signal finds each at another."""
        asked = (
            int(self.world.total(torch.tensor([stop.signal], device=self.world.device)).max())
            if self.world.size > 1
            else stop.signal
        )
        if asked:
            self._save(course)
            self.world.wait()
            raise StoppedError(f"stopped after step {course.step}, and saved: the same command goes on", stop.signal or 15)

    def _progress(self, course: Course) -> Progress:
        return Progress(self.recipe.epochs, self.feed.steps, self.feed.batch_size, self.log, course.step, self.task.share)

    def _logs(self, course: Course) -> Logs | NoLogs:
        return Logs(self.out, course.step, self.keeping.wandb, self.settings, self.log) if self.world.main else NoLogs()

    def _finish(self, course: Course, lines: list[dict[str, Any]]) -> None:
        if not self.world.main or (self.out / "summary.json").exists():
            return
        assert course.last is not None
        assert course.best is not None
        bad = BadImages(self.out / "bad_images.txt", replace=False).listed() if self.keeping.on_bad_image == "skip" else []
        if bad:
            self.log(f"{len(bad)} images could not be read: {self.out / 'bad_images.txt'}")
        summary = {
            "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "repvgg"), *sys.argv[1:]]),
            "seconds": course.seconds,
            f"best_{course.best.measure}": course.best.score,
            f"last_{course.last.measure}": course.last.score,
            **{name: self.settings[name] for name in ("arch", "data", "seed")},
            "processes": self.world.size,
            "bad_images": len(bad),
        }
        draw_curve(lines, self.out / "curve.png")
        write_record(self.out / "summary.json", summary)


def new_model(arch: str, source: Source, log: Log = print, **options: Any) -> nn.Module:
    """`create_model` for this source: its classes, its channels, and `small_input` for small images."""
    channels, height, width = source.preprocessing.input_size
    if "small_input" not in options and max(height, width) <= 64 and zoo.takes(arch, "small_input"):
        log(f"images of {height} x {width} pixels: small_input is on (stem and first stage at stride 1)")
        options["small_input"] = True
    model = zoo.create_model(arch, num_classes=len(source.classes), in_chans=channels, **options)
    zoo.remember(model, replace(zoo.manifest_of(model), classes=source.classes, preprocessing=source.preprocessing))
    return model


def _in_parts(data: Iterator[Any], count: int) -> Iterator[tuple[float, Sequence[Any]]]:
    """The parts of each step, and the seconds that they were waited for."""
    while True:
        started = time.perf_counter()
        parts = list(islice(data, count))
        if not parts:
            return
        yield time.perf_counter() - started, parts


def _evaluation(task: Task, state: State, name: str) -> Evaluation | None:
    found = state.facts.get(name)
    return task.restored(**found, confusion=state.tensors.pop(f"{name}.confusion")) if found else None


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{out}: cannot be a run folder ({error.strerror})") from None


def _silent(line: str) -> None:
    pass
