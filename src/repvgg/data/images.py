"""Decode one image of a stranger's, or a mask of class ids, safely.

Odd but valid images work: 16 bits, floats, palette, CMYK, grey, alpha (on white), animated (the first frame), EXIF-rotated.
Whatever is truncated, hostile or no image becomes one `ImageError`.
"""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 100_000_000  # 10,000 x 10,000: some 300 MB once decoded
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
ORIENTATION = 0x0112  # EXIF's tag
# Pillow's names of these. It reads more, for one EPS, which it hands to Ghostscript: a program for a stranger to run.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000")


class ImageError(ValueError):
    """An image that cannot be used; the message names it."""


def is_image(path: Path) -> bool:
    """By its name alone: a suffix of `SUFFIXES`, and not hidden (macOS leaves a `._name` beside every file it copies)."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def decode(source: str | os.PathLike[str] | bytes, channels: int = 3, name: str | None = None) -> Tensor:
    """uint8 tensor [channels, H, W] (1: grey, 3: RGB) of a file or of encoded bytes, as a viewer would show it."""
    if channels not in (1, 3):
        raise ValueError(f"images are decoded to 1 (grey) or 3 (RGB) channels, not {channels}")
    mode = "L" if channels == 1 else "RGB"
    array = _read(source, name, lambda image: np.array(_convert(_upright(image), mode)))
    tensor = torch.from_numpy(array)
    return tensor.unsqueeze(0) if channels == 1 else tensor.permute(2, 0, 1).contiguous()


def decode_mask(source: str | os.PathLike[str]) -> Tensor:
    """uint8 tensor [H, W] of the class ids of a grey or palette image; raises `ImageError` for one of colours."""

    def ids(image: Image.Image) -> Any:
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise ImageError(f"{source}: is a picture in {image.mode}, a mask has one class id a pixel (grey or palette)")
        array = np.array(image)
        if array.max() > 255 or array.min() < 0:
            raise ImageError(f"{source}: class id {array.max() if array.max() > 255 else array.min()}; ids are from 0 to 255")
        return array.astype(np.uint8)

    return torch.from_numpy(_read(source, None, ids))


def size_of(source: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width, as a viewer would show it, from the file's header alone."""

    def size(image: Image.Image) -> tuple[int, int]:
        turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return image.size if turned else (image.height, image.width)

    found: tuple[int, int] = _read(source, None, size, load=False)
    return found


def _read(
    source: str | os.PathLike[str] | bytes, name: str | None, convert: Callable[[Image.Image], Any], load: bool = True
) -> Any:
    """What `convert` makes of an image. Raises `ImageError` and nothing else."""
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        if not isinstance(source, bytes) and not Path(source).is_file():  # opening a pipe would wait for ever
            raise ImageError(f"{name}: {'is not a file' if Path(source).exists() else 'no such file'}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; errors are errors below
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source), formats=FORMATS) as image:
                width, height = image.size
                if not 0 < width * height <= MAX_PIXELS:
                    raise ImageError(f"{name}: {width} x {height} pixels; between 1 and {MAX_PIXELS:,} can be decoded")
                if load:
                    image.load()  # what is truncated fails here
                return convert(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image, or of a kind that is not known here") from None
    except (MemoryError, Image.DecompressionBombError):
        raise ImageError(f"{name}: too large to decode") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ImageError(f"{name}: not an image, or a damaged one ({reason})") from None


def _upright(image: Image.Image) -> Image.Image:
    """As EXIF says the camera was held. Damaged EXIF does not make a whole image useless."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _convert(image: Any, mode: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits: Pillow would clip them to 255, not scale them
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        image = Image.fromarray((values * (255 / _white(image.mode, values))).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    converted: Image.Image = image.convert(mode)
    return converted


def _white(mode: str, values: Any) -> float:
    """The value of white: 65535 in a mode of 16 bits; in one of 32 bits or floats, the end of the first usual range that fits."""
    largest = float(values.max())
    usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(mode, (65535.0,))
    return next((white for white in usual if largest <= white), largest)
