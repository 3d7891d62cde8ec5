"""Masks of images: whole or in overlapping windows, at one scale or several, as they are or mirrored too.

    for answer in predict_masks(model, ["street/*.jpg"], views=Views(slide=True, scales=(0.75, 1.0, 1.25), flip=True)):
        print(answer.path, answer.shares)

What an image is shown as is a `Views`; the class probabilities of all views are averaged. One view is not averaged with anything.
"""

import colorsys
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from repvgg.data.images import ImageError, decode
from repvgg.data.masks import ToNetwork
from repvgg.data.transforms import normalise
from repvgg.disk import FileError, atomically, write_text
from repvgg.models.finite import finite
from repvgg.models.views import WHOLE, Views, likeliest, placed, seen
from repvgg.models.zoo import dtype_of, manifest_of
from repvgg.predict.paths import LISTING, Made, expand, masks_in, targets

# The usual colours of Cityscapes; CamVid's names are here as well. Other classes get colours of their own.
COLOURS = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "pavement": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "tree": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "pedestrian": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
    "bicyclist": (119, 11, 32),
}


# ------------------------------------------------------------------------------------------------------------ image files


@dataclass(frozen=True)
class MaskPrediction:
    """The mask of one image, or why it could not be read. image: uint8 [3, H, W]; mask: class ids, uint8 [H, W]; shares: of
    the pixels, by class, the largest first."""

    path: str
    image: Tensor | None = None
    mask: Tensor | None = None
    shares: dict[str, float] | None = None
    error: str | None = None


class Masker:
    """A PSPNet and what it takes to make masks of decoded images.

    Raises ValueError for a model that gives no masks, or more classes than a mask can hold.
    """

    def __init__(self, model: nn.Module, device: str = "cpu", views: Views = WHOLE) -> None:
        if manifest_of(model).task != "masks":
            raise ValueError("this model gives labels, not masks: --out, --slide, --scales and --flip are for a PSPNet")
        if (classes := len(class_names(model))) > 255:
            raise ValueError(f"{classes} classes: a mask holds 255")
        self.model, self.preprocessing, self.device, self.views = model, manifest_of(model).preprocessing, device, views
        self.to_network, self.network = ToNetwork(self.preprocessing), placed(model, device)

    @torch.inference_mode()
    def __call__(self, small: Tensor, size: tuple[int, int]) -> Tensor:
        """Return class ids, uint8 [*size], of a photo [C, H, W] that `to_network` has resized."""
        x = normalise(small.unsqueeze(0).to(self.device), self.preprocessing)
        maps = seen(self.network, x, self.preprocessing.input_size[1:], self.views)
        if not all(bool(torch.isfinite(m).all()) for m in maps):
            finite(self.model, x.to(dtype_of(self.model)))  # which says where
        return likeliest(maps, size, self.views)


def predict_masks(model: nn.Module, patterns: Sequence[str], device: str = "cpu", views: Views = WHOLE) -> Iterator[MaskPrediction]:
    """Yield masks for files, folders (all images below them) and globs, in order, at each image's own size.

    An image that cannot be read yields a MaskPrediction with an error; the others go on. Raises `ImageError` where a pattern fits
    nothing, ValueError as `Masker` does.
    """
    if not patterns:
        raise ValueError("no images: name files, folders or globs")
    masker, names = Masker(model, device, views), class_names(model)
    for path in expand(patterns):
        try:
            image = decode(path, masker.preprocessing.input_size[0])
            small = masker.to_network(image)
        except ImageError as error:
            yield MaskPrediction(path, error=str(error) if str(error).startswith(path) else f"{path}: {error}")
            continue
        mask = masker(small, (image.shape[1], image.shape[2]))
        yield MaskPrediction(path, image.expand(3, -1, -1), mask, _shares(mask, names))


def class_names(model: nn.Module) -> list[str]:
    """Return the names of a model's classes, or numbers where it has none."""
    return manifest_of(model).classes or [str(i) for i in range(int(model.num_classes))]  # type: ignore[arg-type]


def _shares(mask: Tensor, names: Sequence[str]) -> dict[str, float]:
    counts = mask.flatten().bincount(minlength=len(names)).tolist()
    order = sorted(range(len(names)), key=lambda i: -counts[i])
    return {names[i]: counts[i] / mask.numel() for i in order if counts[i]}


def write_masks(
    answers: Iterable[MaskPrediction], paths: Sequence[str], out: Path, names: Sequence[str]
) -> Iterator[MaskPrediction]:
    """Write NAME.png (class ids, with colours for viewers) and NAME_overlay.jpg of each into a folder, and masks.json.

    paths: of all images. Yields what it has written. Raises, before anything is written, ValueError for two images of one name and
    for the folder of an image, which its mask might overwrite; `FileError` where a file of somebody else's would be overwritten.
    """
    if out.resolve() in {folder.resolve() for folder in {Path(path).parent for path in paths}}:
        raise ValueError(f"--out {out}: the images lie there, and masks would overwrite them: name another folder")
    planned = {
        path: {"path": path, "mask": f"{target.name}.png", "overlay": f"{target.name}_overlay.jpg"}
        for path, target in targets(paths, out).items()
    }
    classes, listed = masks_in(out)
    if listed and classes != list(names):
        raise FileError(f"{out}: holds masks of other classes: name another --out")
    ours = {LISTING} if classes else set()
    ours |= {made[kind] for made in listed for kind in ("mask", "overlay")}
    mine = {LISTING, *(made[kind] for made in planned.values() for kind in ("mask", "overlay"))}
    if strange := next((name for name in sorted(mine - ours) if (out / name).exists()), None):
        raise FileError(f"{out / strange}: was not made by repvgg predict, and would be overwritten: name another --out")
    out.mkdir(parents=True, exist_ok=True)
    before = {made["mask"]: made for made in listed if (out / made["mask"]).exists()}
    _list(out, names, {**before, **{made["mask"]: made for made in planned.values()}})  # first: after a kill it says whose they are
    palette = colours(names)
    for answer in answers:
        if answer.image is not None and answer.mask is not None:
            made = planned[answer.path]
            _save(png(answer.mask, palette), out / made["mask"], format="PNG")
            _save(overlay(answer.image, answer.mask, palette), out / made["overlay"], format="JPEG", quality=90)
            before[made["mask"]] = {**made, "shares": answer.shares}
        yield answer
    _list(out, names, before)


def _list(out: Path, names: Sequence[str], made: dict[str, Made]) -> None:
    write_text(out / LISTING, json.dumps({"classes": list(names), "images": list(made.values())}, indent=1) + "\n")


def colours(names: Sequence[str]) -> Any:
    """Return a palette, uint8 [classes, 3]: the usual colours of what is in a street, other classes' hues far apart."""
    rows = [
        COLOURS.get(name.lower()) or tuple(round(255 * x) for x in colorsys.hsv_to_rgb(i * 0.618 % 1, 0.75, 0.9))
        for i, name in enumerate(names)
    ]
    return np.array(rows, dtype=np.uint8)


def overlay(image: Tensor, mask: Tensor, palette: Any) -> Image.Image:
    """Return the photo, half covered by its mask's colours."""
    photo, colour = image.permute(1, 2, 0).numpy(), palette[mask.numpy()]
    return Image.fromarray((photo & colour) + ((photo ^ colour) >> 1))  # their mean, without a wider type


def png(mask: Tensor, palette: Any) -> Image.Image:
    """Return class ids, uint8 [H, W], as an image with colours for viewers."""
    image = Image.fromarray(mask.numpy())
    image.putpalette(palette.tobytes())
    return image


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    data = io.BytesIO()
    image.save(data, **options)
    atomically(path, lambda temporary: temporary.write_bytes(data.getvalue()))
