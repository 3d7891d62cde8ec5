"""The recipe `auto`: chosen for the images, the model and the machine at hand, with a word on what was chosen and why.

    chosen = choose("repvgg_a0", open_source("photos"), minutes=10)
    chosen.recipe, chosen.init

Sets of photos are small, and a person waits: so epochs and image size are what `minutes` allow at the speed that a step is measured
to have here, and never more than the images call for. A large set gets the paper's recipe, whatever that takes. Trained weights are
gone on from wherever there are some. Between several processes nothing is measured, so that all of them choose alike.
"""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from repvgg.data import Source
from repvgg.data.images import ImageError
from repvgg.disk import FileError, Log
from repvgg.measure.timing import synchroniser
from repvgg.models import zoo
from repvgg.models.load import is_file
from repvgg.models.names import resolve_name
from repvgg.models.pretrained import RELEASED, REPO, pretrained_file
from repvgg.numerics import repeatable
from repvgg.train.augment import train_transform
from repvgg.train.finetune import finetuning, started_from
from repvgg.train.recipes import RECIPES, Recipe
from repvgg.train.tasks import task_of
from repvgg.train.trainer import Trainer

LARGE = 200_000  # images: what the paper's recipe is for
SMALL = 64  # pixels: images that are shifted, not cropped
SIZES = (224, 192, 160, 128, 112, 96)
LOOKED_AT = 16  # images
TRIAL = 16  # images of a step that is timed on a processor; so few leave a GPU waiting for Python
EVALUATION = 1 / 3  # time of an image in evaluation, of that in training
# Epochs for which smaller images are put up with, from new weights and from trained ones: few images must be seen often.
ENOUGH = {False: 60, True: 8}
# Images a step, by the least number of images to train on.
BATCHES = ((0, 32), (5_000, 64), (20_000, 128), (LARGE, 256))
# New weights: few steps, over most of which a moving average would lag behind. Muon was measured with many images alone.
FEW = replace(RECIPES["cifar"], optimizer="sgd", ema=0.0)


@dataclass(frozen=True)
class Choice:
    """A recipe, and the weights to start from ("" for none)."""

    recipe: Recipe
    init: str


@dataclass(frozen=True)
class Pace:
    """Seconds that an image takes: to be loaded, and in a training step at `size` pixels a side. Other sizes go by their pixels."""

    loading: float
    training: float
    size: int

    def epoch(self, source: Source, size: int) -> float:
        """Return the seconds of an epoch with its evaluation."""
        each = self.training * (size / self.size) ** 2
        return len(source.train) * (each + self.loading) + len(source.val) * (EVALUATION * each + self.loading)


def choose(
    arch: str,
    source: Source,
    *,
    init: str = "",
    image_size: int = 0,
    minutes: float = 10.0,
    device: str = "cpu",
    workers: int = 0,
    alone: bool = True,
    allow_deploy: bool = False,
    log: Log = print,
    **model_options: Any,
) -> Choice:
    """Return the recipe for these images, this model and this machine.

    init: weights to start from; "none" for new ones even where there are trained ones. image_size: if it is given already. minutes:
    what small sets are planned for. alone: no other processes train with this one. allow_deploy, model_options: as of `train`.
    Raises ValueError for an unknown model or one that does not fit the images, and what reading them raises.
    """
    if not minutes > 0:
        raise ValueError(f"--minutes {minutes:g}: above 0")
    init, why, lost = _weights(arch, source, init, model_options)
    sides, loading = _looked_at(source)
    native = round(statistics.median(sides))
    count, classes = len(source.train), len(source.classes)
    log(f"auto: {count:,} images to train on in {classes} classes, their short sides about {native} pixels; {why}")
    if lost and count < LARGE:
        log(f"auto: WITHOUT TRAINED WEIGHTS, which cost much accuracy where images are few: {lost}")
        there = REPO.format(name=resolve_name(arch))
        log(f"auto: better stop, and mend that, or fetch model.safetensors of {there} and say --init FILE")
    sizes = [image_size] if image_size else _sizes(native)
    tuned = finetuning(init) if init else None
    recipe = _recipe(count, tuned, sizes[0])
    if count >= LARGE or not alone:
        chosen = replace(recipe, image_size=sizes[0], precision="bf16" if "cuda" in device else "fp32")
        what = "several processes: nothing is measured"
        if count >= LARGE:
            what = "many images from trained weights" if init else "as many as the paper's recipe is for"
        log(f"auto: {what}: {_told(chosen)}")
        return Choice(chosen, init)
    model = _model(arch, init, source, sizes[0], allow_deploy, model_options)
    task_of(source).check(model, source)
    trial = recipe.batch_size if "cuda" in device else TRIAL
    speeds = {precision: _seconds(model, source, sizes[0], device, precision, trial) for precision in ("fp32", "bf16")}
    precision = min(speeds, key=lambda name: speeds[name])
    pace = Pace(loading / max(1, workers), speeds[precision] * recipe.work_left(SIZES[0], 0.0), sizes[0])
    figures = ", ".join(f"{1 / seconds:.0f} in {name}" for name, seconds in speeds.items())
    log(f"auto: a training step here takes so many images a second at {sizes[0]} pixels: {figures}")
    least = min(recipe.epochs, ENOUGH[bool(init)])
    size = next((s for s in sizes if pace.epoch(source, s) * least <= 60 * minutes), sizes[-1])
    epochs = max(min(5, least), min(recipe.epochs, int(60 * minutes / pace.epoch(source, size))))
    chosen = replace(_recipe(count, tuned, size), image_size=size, epochs=epochs, precision=precision)  # type: ignore[arg-type]
    chosen = replace(chosen, warmup_epochs=min(chosen.warmup_epochs, epochs / 5))
    cost = _minutes(epochs * pace.epoch(source, size))
    log(f"auto: {_told(chosen)}: about {cost}, where --minutes allows {minutes:g}")
    log(f"auto: {_alternatives(chosen, recipe.epochs, source, pace, fixed=bool(image_size))}")
    return Choice(chosen, init)


def _weights(arch: str, source: Source, init: str, model_options: dict[str, Any]) -> tuple[str, str, str]:
    """Return what to start from, why, and why trained weights that there are could not be had."""
    if init == "none":
        return "", "new weights, as --init none says", ""
    if init:
        return init, f"on from {init}", ""
    name = resolve_name(arch)
    if model_options:
        return "", f"new weights: there are no trained ones with another {', '.join(model_options)}", ""
    if source.preprocessing.input_size[0] != 3:
        return "", "new weights: trained ones are for images of three channels", ""
    try:
        pretrained_file(name)
    except (ValueError, FileError) as error:
        return "", f"new weights ({error})", str(error) if name in RELEASED else ""
    return name, f"on from {name}'s ImageNet weights (--init none for new ones)", ""


def _looked_at(source: Source) -> tuple[list[int], float]:
    """Return the short sides of some images, and the seconds that one takes to be loaded and augmented."""
    count = min(LOOKED_AT, len(source.train))
    transform = train_transform(Recipe(), source.preprocessing)
    sides, started = [], time.perf_counter()
    for i in range(count):
        try:
            image, _ = source.train[i * len(source.train) // count]
        except ImageError as error:  # training tells of it, or skips it, as it is asked to
            damaged = error
            continue
        sides.append(min(image.shape[-2:]))
        transform(image)
    if not sides:
        raise damaged
    return sides, (time.perf_counter() - started) / len(sides)


def _sizes(native: int) -> list[int]:
    """Return the sizes that images of this one can be trained at, the largest first."""
    if native <= SMALL:
        return [max(16, native)]
    return [size for size in SIZES if size <= 1.1 * native] or [native // 8 * 8]


def _recipe(count: int, tuned: Recipe | None, size: int) -> Recipe:
    """Return what suits so many images of this size, if time does not matter. tuned: what trained weights are gone on from with."""
    if count >= LARGE and not tuned:
        return RECIPES["light"]
    batch = max(size for least, size in BATCHES if count >= least)
    scale = (1000 / max(count, 1000)) ** 0.3  # the more images, the fewer times each must be seen
    crop = replace(RECIPES["cifar" if size <= SMALL else "light"], crop_area=0.35)
    if tuned:
        recipe = replace(tuned, epochs=max(6, round(30 * scale)), lr=0.02 * batch / 64)
    else:
        recipe = replace(FEW, epochs=max(40, round(200 * scale)), lr=0.2 * batch / 128, warmup_epochs=4)
        if size > SMALL:
            recipe = replace(recipe, whiten=False, bn_bias_lr=1.0)  # measured on small images alone
    return replace(recipe, batch_size=batch, crop=crop.crop, crop_area=crop.crop_area)


def _model(arch: str, init: str, source: Source, size: int, allow_deploy: bool, options: dict[str, Any]) -> nn.Module:
    """Return a network like the one that will be trained, with whatever weights."""
    if init and is_file(init):
        return started_from(init, arch, source, allow_deploy, log=lambda line: None)[0]
    name = resolve_name(arch or init)
    if size <= SMALL and zoo.takes(name, "small_input"):
        options = {"small_input": True, **options}
    return zoo.create_model(name, num_classes=len(source.classes), in_chans=source.preprocessing.input_size[0], **options)


def _seconds(model: nn.Module, source: Source, size: int, device: str, precision: str, count: int) -> float:
    """Return the seconds that one image of `count` takes in a step of training, which changes the model."""
    channels, classes = source.preprocessing.input_size[0], zoo.manifest_of(model).arch or {}
    with torch.random.fork_rng(), repeatable(device):
        recipe = replace(FEW, precision=precision)  # type: ignore[arg-type]
        trainer = Trainer(model, recipe, classes.get("num_classes", len(source.classes)), device=device)
        parts = [(torch.randn(count, channels, size, size, device=device), torch.zeros(count, dtype=torch.long, device=device))]
        trainer.train()
        wait, times = synchroniser(device), []
        for number in range(3):
            started = time.perf_counter()
            trainer.step(parts, 1e-6, number)
            wait()
            times.append(time.perf_counter() - started)
    return min(times[1:]) / count


def _told(recipe: Recipe) -> str:
    crop = f"random crops of at least {recipe.crop_area:.0%}" if recipe.crop == "random_resized" else "random shifts"
    return (
        f"{recipe.epochs} epochs in batches of {recipe.batch_size} at {recipe.image_size} pixels in {recipe.precision}, "
        f"learning rate {recipe.lr:g}, {crop}"
    )


def _alternatives(chosen: Recipe, most: int, source: Source, pace: Pace, fixed: bool) -> str:
    """Say what less, and more, would cost."""
    size, epochs = chosen.image_size, chosen.epochs
    options = [(f"--epochs {epochs // 2}", size, epochs // 2)] if epochs > 1 else []
    smaller = next((s for s in SIZES if s < size), None)
    if smaller and not fixed:
        options.append((f"--image-size {smaller} --epochs {epochs}", smaller, epochs))
    if epochs < most:
        options.append((f"--epochs {most}, as many as may still help", size, most))
    told = [f"{flags}: {_minutes(n * pace.epoch(source, side))}" for flags, side, n in options]
    return "instead: " + "; ".join(told)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
