"""Look at a run's best model and its images: the worst mistakes, the first batch, costs and speeds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from repvgg.data import Source, drawn
from repvgg.data.masks import IGNORED
from repvgg.data.transforms import BadImages, normalise
from repvgg.disk import Log
from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.costs import Cost, cost
from repvgg.measure.timing import Ratio, Times, interleave, ratio, synchroniser
from repvgg.models.manifest import Preprocessing
from repvgg.models.views import placed, segment
from repvgg.models.zoo import manifest_of
from repvgg.predict.masks import colours, overlay
from repvgg.train.augment import mixing
from repvgg.train.batches import Feed
from repvgg.train.recipes import Recipe
from repvgg.train.tasks import task_of

LOOKED_AT = {"labels": 1000, "masks": 40}  # images of the validation split, drawn; for all of them there is `repvgg eval`
WORST = {"labels": 24, "masks": 6}
SHOWN = 64  # images of the first batch
TIMED = {"labels": 8, "masks": 1}  # images at a time
ROUNDS = 9

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mistake:
    """An image as the network saw it, what it is, what it was taken for and how surely; of masks, the share that is wrong."""

    picture: Image.Image
    true: str
    taken: str
    surely: float


@dataclass(frozen=True)
class Mistakes:
    """The worst of those among `images` images."""

    images: int
    worst: list[Mistake]


@dataclass(frozen=True)
class Speeds:
    """Both forms' costs for one image and times of a batch; of what does not fold, the training form's alone."""

    size: tuple[int, ...]
    batch: int
    device: str
    costs: dict[str, Cost]
    times: dict[str, Times]
    gain: Ratio | None


def forms(model: nn.Module, log: Log) -> dict[str, nn.Module]:
    """Return the training form and, where it folds, the deploy form."""
    found = {"training form": model.eval()}
    try:
        found["deploy form"] = reparameterize(model)
    except ReparamError as error:
        log(f"without a deploy form: {error}")
    return found


# ------------------------------------------------------------------------------------------------------------------- mistakes


def mistakes(network: nn.Module, source: Source, device: str = "cpu", bad: Path | None = None) -> Mistakes:
    """Return the worst mistakes among at most `LOOKED_AT` images of the validation split, drawn; the worst first.

    bad: list images that cannot be read there, and leave them out, instead of raising `ImageError`.
    """
    kind = "masks" if source.masks else "labels"
    images = drawn(source.val, LOOKED_AT[kind], 0) if len(source.val) > LOOKED_AT[kind] else source.val
    wrong = _wrong_masks if source.masks else _wrong_labels
    worst: list[tuple[float, Mistake]] = []
    unread = BadImages(bad, replace=False) if bad else None
    for found in wrong(placed(network, device), replace(source, val=images), device, unread):
        worst = sorted([*worst, found], key=lambda pair: -pair[0])[: WORST[kind]]
    return Mistakes(len(images), [mistake for _, mistake in worst])


@torch.inference_mode()
def _wrong_labels(network: Network, source: Source, device: str, bad: BadImages | None) -> Iterator[tuple[float, Mistake]]:
    """Yield what is labelled wrongly with its loss."""
    for x, y in task_of(source).batches(source.val, source.preprocessing, 32, 0, device, bad):
        logits = network(x)
        losses = F.cross_entropy(logits, y.clamp(min=0), reduction="none")
        sure, taken = logits.softmax(1).max(1)
        for i in ((taken != y) & (y >= 0)).nonzero().flatten().tolist():
            true, found = (source.classes[int(k)] for k in (y[i], taken[i]))
            yield float(losses[i]), Mistake(picture(x[i], source.preprocessing), true, found, float(sure[i]))


@torch.inference_mode()
def _wrong_masks(network: Network, source: Source, device: str, bad: BadImages | None) -> Iterator[tuple[float, Mistake]]:
    """Yield photos beside their true and predicted masks, with the share of labelled pixels that is wrong."""
    palette = np.concatenate([colours(source.classes), np.zeros((256 - len(source.classes), 3), np.uint8)])
    for x, masks in task_of(source).batches(source.val, source.preprocessing, 1, 0, device, bad):
        true = masks[0].long()
        found = segment(network, x, (true.shape[0], true.shape[1]), ())[0].argmax(0)
        labelled = true != IGNORED
        missed = (found != true) & labelled
        if not bool(missed.any()):
            continue
        share = float(missed.sum() / labelled.sum())
        photo = F.interpolate(_pixels(x, source.preprocessing).float(), true.shape)[0].to(torch.uint8).expand(3, -1, -1).cpu()
        sides = [overlay(photo, mask.to(torch.uint8).cpu(), palette) for mask in (true, found)]
        confused = torch.bincount(true[missed] * len(source.classes) + found[missed]).argmax()
        most, instead = (source.classes[i] for i in divmod(int(confused), len(source.classes)))
        yield share, Mistake(beside(sides), most, instead, share)


# ----------------------------------------------------------------------------------------------------------------- first batch


def first_batch(source: Source, recipe: Recipe, seed: int, bad: Path | None = None) -> Image.Image:
    """Return the first images of the first training batch as one picture: augmented, as the network saw them.

    bad: list images that cannot be read there, and show the next one instead, as training did.
    """
    feed = Feed(source, replace(recipe, accumulate=1), seed, bad=bad)
    x, y = next(iter(feed.epoch(0)))
    if y.dim() == 1:
        x, _ = _mixed(normalise(x, source.preprocessing), y, recipe, len(source.classes), seed)
        x = _pixels(x, source.preprocessing)
    return mosaic([_image(pixels) for pixels in x[:SHOWN]])


def _mixed(x: Tensor, y: Tensor, recipe: Recipe, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mix images as the first step of a run does."""
    mix = mixing(recipe, num_classes)
    if mix is None:
        return x, y
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash((seed, 0, 0)) % 2**63)  # as Trainer.step
        x, y = mix(x, y)
    return x, y


# ------------------------------------------------------------------------------------------------------------- costs and speeds


def speeds(both: dict[str, nn.Module], device: str = "cpu") -> Speeds:
    """Count what both forms cost, and time them in turns."""
    manifest = manifest_of(both["training form"])
    size, batch = manifest.preprocessing.input_size, TIMED[manifest.task]
    costs = {name: cost(form, size) for name, form in both.items()}
    x = torch.randn(batch, *size).to(device, memory_format=torch.channels_last)
    networks = {name: placed(form, device) for name, form in both.items()}
    with torch.inference_mode():
        calls = {name: _call(network, x) for name, network in networks.items()}
        times = interleave(calls, rounds=ROUNDS, batches=1, warmup=2, synchronise=synchroniser(device))
    gain = ratio(times["training form"], times["deploy form"]) if "deploy form" in times else None
    return Speeds(size, batch, device, costs, times, gain)


def _call(network: Network, x: Tensor) -> Any:
    return lambda: network(x)


# ------------------------------------------------------------------------------------------------------------------- pictures


def picture(x: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """Return a normalised image [C, H, W] as a picture."""
    return _image(_pixels(x.unsqueeze(0), preprocessing)[0])


def mosaic(pictures: list[Image.Image], cell: int = 112, gap: int = 4) -> Image.Image:
    """Return pictures in rows, each in a square; small ones are enlarged pixel by pixel."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (cell + gap) - gap, rows * (cell + gap) - gap), "#8a93a0")
    for number, image in enumerate(pictures):
        scale = cell / max(image.size)
        way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), way)
        row, column = divmod(number, columns)
        left, top = column * (cell + gap) + (cell - fitted.width) // 2, row * (cell + gap) + (cell - fitted.height) // 2
        sheet.paste(fitted, (left, top))
    return sheet


def beside(pictures: list[Image.Image], gap: int = 6) -> Image.Image:
    """Return pictures of one height side by side."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    sheet, left = Image.new("RGB", (width, pictures[0].height), "#8a93a0"), 0
    for p in pictures:
        sheet.paste(p, (left, 0))
        left += p.width + gap
    return sheet


def _pixels(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Undo `normalise`."""
    mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _image(pixels: Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
