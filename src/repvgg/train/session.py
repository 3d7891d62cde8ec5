"""One process's work on a run: its epochs, what it saves, where it stops and where it goes on."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate

from repvgg.data import Source
from repvgg.data.listing import SPLIT, write_table
from repvgg.data.transforms import BadImages, normalise
from repvgg.disk import FileError, Log, atomically, hold, make_folder, out_of_memory, write_text
from repvgg.measure.machine import write_record
from repvgg.models.load import save
from repvgg.train.batches import Feed
from repvgg.train.distributed import LostError
from repvgg.train.logs import Logs, draw_curve, read_lines
from repvgg.train.mirror import Mirror
from repvgg.train.progress import Progress
from repvgg.train.recipes import FIELDS, Keeping, Recipe
from repvgg.train.signals import StoppedError, StopRequests
from repvgg.train.state import State, Store, shared
from repvgg.train.tasks import Evaluation, Task
from repvgg.train.trainer import Trainer

LOG_EVERY = 20  # steps; so late, at most, a loss that is no number is noticed; before anything is saved always
EARLY = 100  # steps of the run, in which running statistics of batch norms lag behind the weights
RENEWING = 10  # batches that they are then taken from anew, before an evaluation
TROUBLE = 1000  # what processes agree on where one cannot read its images; no signal has this number


@dataclass(frozen=True)
class Run:
    """The result of a run: the model in training form, eval mode; its last and its best evaluation, each an `Accuracy` or, of
    masks, an `Overlap`; the time it took; the lines of metrics.jsonl."""

    model: nn.Module
    last: Any
    best: Any
    seconds: float
    history: list[dict[str, Any]]
    out: Path

    def __str__(self) -> str:
        best, last = (f"{x.score:.2%}" for x in (self.best, self.last))
        name = {"top1": "top-1", "mean_iou": "mean IoU"}[self.best.measure]
        return f"best val {name} {best}, last {last}, in {self.seconds / 60:.1f} min: {self.out}"


@dataclass
class Course:
    """The place that a run has come to."""

    step: int = 0
    epochs: int = 0
    """Epochs that have ended in an evaluation."""
    seconds: float = 0.0
    last: Evaluation | None = None
    best: Evaluation | None = None
    best_epoch: int = 0
    """Counted from 1."""
    saved: float = field(default_factory=time.perf_counter)


class Session:
    """One process's work on a run, from where it was to its end."""

    def __init__(
        self, trainer: Trainer, feed: Feed, source: Source, settings: dict[str, Any], out: Path, keeping: Keeping, log: Log
    ) -> None:
        self.trainer, self.feed, self.source, self.out, self.keeping, self.log = trainer, feed, source, out, keeping, log
        self.recipe, self.task, self.world = trainer.recipe, trainer.task, trainer.world
        self.settings = settings
        self.mirror = Mirror(keeping.mirror if self.world.main else "", out, log)
        self.store = Store(out / "state", log, self.mirror)
        if (r := self.recipe).lr_per:
            log(f"learning rate {r.lr:g} per {r.lr_per} images, {r.peak_lr:g} for {r.batch_size}")

    def run(self) -> Run:
        """Train what is left. Raises ValueError where memory does not suffice, and what `train` raises."""
        make_folder(self.out, "a run folder")
        with hold(self.out) if self.world.main else nullcontext():
            try:
                return self._run()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                parts = 2 * self.recipe.accumulate
                raise ValueError(
                    f"out of memory on {self.trainer.device} with {self.feed.part} images at a time: --accumulate {parts} takes "
                    "half as many, or a smaller --batch-size. All saved files are intact"
                ) from None
            finally:
                self.store.wait()

    def _run(self) -> Run:
        course = self._take_up()
        self.started = time.perf_counter() - course.seconds
        if not self._ended(course):
            try:
                self._go_on(course)
            except (StoppedError, FloatingPointError):
                with suppress(OSError, FileError):  # what stopped it is what must be told
                    self._finish(course, read_lines(self.out / "metrics.jsonl"))
                raise
        self.store.wait()
        lines = read_lines(self.out / "metrics.jsonl")
        self._finish(course, lines)
        assert course.last is not None
        assert course.best is not None
        return Run(self.trainer.best_model.eval(), course.last, course.best, course.seconds, lines, self.out)

    def _go_on(self, course: Course) -> None:
        """Train epoch after epoch."""
        with StopRequests() as stop, self._logs(course) as logs, self._progress(course) as progress:
            while not self._ended(course):
                epoch = course.epochs
                self._train(epoch, course, stop, logs, progress)
                self._evaluate(epoch, course, logs, progress)

    def _ended(self, course: Course) -> bool:
        """Tell whether all epochs are over, or as many without a better one as are waited for."""
        patience = self.recipe.early_stop
        return course.epochs >= self.recipe.epochs or bool(patience and course.epochs - course.best_epoch >= patience)

    def _train(self, epoch: int, course: Course, stop: StopRequests, logs: Logs, progress: Progress) -> None:
        """Take the steps of an epoch that are left."""
        steps = self.feed.steps
        self.trainer.train()
        for waited, parts in self._parts(epoch, course, stop):
            progress_made = course.step / (self.recipe.epochs * steps)
            lr = self.recipe.lr_at(progress_made)
            inputs = [(self._input(x, progress_made), y.to(self.trainer.device, non_blocking=True)) for x, y in parts]
            self.trainer.step(inputs, lr, course.step, self.feed.batch_size)
            course.step += 1
            progress.step(epoch, lr, waited, self.feed.images_per_second * self.world.size)
            if course.step % LOG_EVERY == 0:
                progress.seen(*self.trainer.means())
                logs.write(step=course.step, epoch=epoch, **progress.averages())
            self._save_if_due(course)

    def _parts(self, epoch: int, course: Course, stop: StopRequests) -> Iterator[tuple[float, Sequence[Any]]]:
        """Yield the parts of each step, and the seconds that they were waited for.

        Before each step all processes agree to go on. Where one is asked to stop, or cannot read an image, the state is saved and
        all of them leave.
        """
        data = self.feed.epoch(epoch, course.step - epoch * self.feed.steps)
        while True:
            started, trouble = time.perf_counter(), None
            parts: Sequence[Any] = ()
            try:
                parts = list(islice(data, self.recipe.accumulate))
            except ValueError as error:
                trouble = error
            asked = self.world.agree(TROUBLE if trouble else stop.signal)
            if asked:
                self._save(course)
                self.store.wait()
                self.world.wait()
                if trouble:
                    raise trouble
                if asked == TROUBLE:
                    raise LostError("another process could not read its images; the state is saved")
                raise StoppedError(f"stopped after step {course.step}, and saved: the same command goes on", asked)
            if not parts:
                return
            yield time.perf_counter() - started, parts

    def _input(self, x: torch.Tensor, progress: float) -> torch.Tensor:
        """Return images on the device, normalised, of the size that they have after that share of the run."""
        x = normalise(x.to(self.trainer.device, non_blocking=True), self.source.preprocessing)
        size = [self.recipe.side_at(side, progress) for side in x.shape[-2:]]
        return x if size == [*x.shape[-2:]] else interpolate(x, size, mode="bilinear", antialias=True)

    def _evaluate(self, epoch: int, course: Course, logs: Logs, progress: Progress) -> None:
        """Evaluate at the end of an epoch, and save the models and the state."""
        trained = self.trainer.epoch_means()
        if course.step <= EARLY:
            some = islice(self.feed.epoch(epoch), RENEWING * self.recipe.accumulate)
            self.trainer.renew_statistics(self._input(x, 1) for x, _ in some)
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
            course.best, course.best_epoch = course.last, course.epochs
        if world.main:
            for name in ("best", "last") if better else ("last",):
                self._save_model(name, course)
        last = course.last
        progress.evaluated(epoch, last, trained)
        seconds = round(time.perf_counter() - self.started, 1)
        means = dict(zip(("train_loss", f"train_{self.task.share}"), trained, strict=True))
        figures = {f"val_{name}": value for name, value in last.figures.items()}
        logs.write(step=course.step, epoch=epoch, seconds=seconds, **means, **figures)
        if self._ended(course) and course.epochs < self.recipe.epochs:
            progress.say(f"no better epoch than {course.best_epoch} in the last {self.recipe.early_stop}: it ends here")
        self._save(course)

    def _save_model(self, name: str, course: Course) -> None:
        assert course.last is not None
        score = {f"val_{course.last.measure}": course.last.score}
        training = {"data": self.source.name, "epoch": course.epochs, **score, "seed": self.settings["seed"]}
        if self.source.splitting:
            training["splitting"] = list(self.source.splitting)
        save(
            self.trainer.best_model,
            self.out / f"{name}.safetensors",
            classes=self.source.classes,
            preprocessing=self.source.preprocessing,
            training={**training, "recipe": asdict(self.recipe)},
        )

    # ------------------------------------------------------------------------------------------------------- stop and go on

    def _take_up(self) -> Course:
        """Find where the run in the folder is; its beginning if there is none. Raises ValueError if it is another run."""
        found = self.store.latest() if self.world.main and self.keeping.resume != "never" else None
        state = shared(self.world, found)
        if state is None:
            return self._begin()
        allowed = set(filter(None, self.keeping.allow_change.split(",")))
        if unknown := sorted(allowed - self.settings.keys()):
            raise ValueError(f"--allow-change {unknown[0]}: there are {', '.join(self.settings)}")
        before = {**asdict(Recipe()), "splitting": self.settings.get("splitting"), **state.facts["settings"]}  # asked for since
        for name, value in self.settings.items():
            if before.get(name) != value and name not in allowed:
                raise ValueError(
                    f"{self.out}: holds a run with {name} {before.get(name)!r}, not {value!r}: "
                    f"another --out, or --allow-change {name}, or --resume never"
                )
        names = zip(state.facts.get("class_names", ()), self.source.classes, strict=False)  # of older states none
        if "classes" not in allowed and (other := next(((a, b) for a, b in names if a != b), None)):
            remedy = "another --out, or --allow-change classes, or --resume never"
            raise ValueError(f"{self.out}: holds a run with a class {other[0]!r}, which is {other[1]!r} now: {remedy}")
        last, best = (evaluation_in(state, name, self.task) for name in ("last", "best"))
        if state.facts["steps"] != self.feed.steps:
            raise ValueError(
                f"{self.out}: an epoch had {state.facts['steps']} steps, now it has {self.feed.steps}: a run cannot change that"
            )
        try:
            self.trainer.load(state.tensors, state.facts["scaler"])
        except (RuntimeError, KeyError):  # what was allowed to change has changed the network
            raise FileError(f"{self.out}: the state in it is of another network: another --out, or --resume never") from None
        course = Course(state.step, state.facts["epochs"], state.facts["seconds"], last, best, state.facts.get("best_epoch", 0))
        if self._ended(course):
            self.log(f"{self.out}: has had its {course.epochs} epochs already")
        else:
            self.log(f"{self.out}: goes on after step {course.step} of {self.recipe.epochs * self.feed.steps}")
            if self.world.main:
                self._describe()  # with what was allowed to change
                (self.out / "summary.json").unlink(missing_ok=True)  # of a shorter run
        return course

    def _begin(self) -> Course:
        if self.world.main:
            models = [name for name in ("best.safetensors", "last.safetensors") if (self.out / name).exists()]
            killed_early = (self.out / "state").exists() and not (self.out / "summary.json").exists()
            if models and not killed_early and self.keeping.resume == "auto":
                raise FileError(f"{self.out}: holds {models[0]} but no state to go on from: another --out, or --resume never")
            self.mirror.begin()
            for of_the_run_before in ("summary.json", *(["bad_images.txt"] if self.store.ours() else [])):
                (self.out / of_the_run_before).unlink(missing_ok=True)
            self.store.clear()
            self.store.folder.mkdir(exist_ok=True)  # first: it says whose the other files are
            self._describe()
            if (rows := self.source.rows) is not None:
                atomically(self.out / SPLIT, lambda path: write_table(path, rows()))
        return Course()

    def _describe(self) -> None:
        """Write what the run was asked for: recipe.json and settings.json."""
        others = {name: value for name, value in self.settings.items() if name not in FIELDS}
        for name, facts in (("recipe.json", asdict(self.recipe)), ("settings.json", others)):
            write_text(self.out / name, json.dumps(facts, indent=2) + "\n")

    def _save(self, course: Course) -> None:
        course.saved, course.seconds = time.perf_counter(), time.perf_counter() - self.started
        if not self.world.main:
            return
        facts: dict[str, Any] = {
            "epochs": course.epochs,
            "best_epoch": course.best_epoch,
            "steps": self.feed.steps,
            "seconds": course.seconds,
            "settings": self.settings,
            "class_names": self.source.classes,
        }
        tensors = self.trainer.tensors()
        for name, evaluation in (("last", course.last), ("best", course.best)):
            if evaluation is not None:
                tensors[f"{name}.confusion"] = evaluation.confusion.clone()
                facts[name] = {key: value for key, value in vars(evaluation).items() if key not in ("confusion", "classes")}
        self.store.save_soon(State(course.step, tensors, {**facts, "scaler": self.trainer.scaler.state_dict()}))

    def _save_if_due(self, course: Course) -> None:
        by_steps = self.keeping.save_steps and course.step % self.keeping.save_steps == 0
        if by_steps or time.perf_counter() - course.saved > 60 * self.keeping.save_minutes:
            self._save(course)

    def _progress(self, course: Course) -> Progress:
        left = partial(self.recipe.work_left, self.source.preprocessing.input_size[1])
        return Progress(self.recipe.epochs, self.feed.steps, self.feed.batch_size, self.log, course.step, self.task.share, left)

    def _logs(self, course: Course) -> Logs:
        return Logs(self.out if self.world.main else None, course.step, self.keeping.wandb, self.settings, self.log)

    def _finish(self, course: Course, lines: list[dict[str, Any]]) -> None:
        if not self.world.main or (self.out / "summary.json").exists():
            return
        bad = BadImages(self.out / "bad_images.txt", replace=False).listed() if self.keeping.on_bad_image == "skip" else []
        if bad:
            self.log(f"{len(bad)} images could not be read: {self.out / 'bad_images.txt'}")
        summary = {
            "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "repvgg"), *sys.argv[1:]]),
            "seconds": course.seconds,
            "epochs": course.epochs,
            "best_epoch": course.best_epoch,
            "finished": self._ended(course),
            **{f"{name}_{e.measure}": e.score for name, e in (("best", course.best), ("last", course.last)) if e is not None},
            **{name: self.settings[name] for name in ("arch", "data", "seed")},
            "processes": self.world.size,
            "bad_images": len(bad),
        }
        draw_curve(lines, self.out / "curve.png")
        write_record(self.out / "summary.json", summary, str(self.trainer.device))
        self.mirror.send()


def evaluation_in(state: State, name: str, task: Task) -> Evaluation | None:
    """Return the evaluation that a run's state keeps as "best" or "last"."""
    found = state.facts.get(name)
    return task.restored(**found, confusion=state.tensors.pop(f"{name}.confusion")) if found else None
