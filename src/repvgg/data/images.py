"""Decode one image of a stranger's, or a mask of class ids, safely.

Odd but valid images work: 16 bits, floats, palette, CMYK, grey, alpha (on white), animated (the first frame), EXIF-rotated.
Whatever is truncated, hostile or no image becomes one `ImageError`.
"""

import errno
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from repvgg.data import DataError
from repvgg.disk import UNREAD, in_a_line
from repvgg.terminal import printable

MAX_PIXELS = 100_000_000  # 10,000 x 10,000: 300 MB once decoded, up to 9 bytes a pixel while it is
LONGEST = 32  # times as long as wide: resized by its short side, a longer image would fill the memory
STRIP = 4_000_000  # pixels that are converted at once
ORIENTATION = 0x0112  # EXIF's tag
# Pillow's names of these. It reads more, for one EPS, which it hands to Ghostscript: a program for a stranger to run.
FORMATS = ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", *["AVIF"] * bool(find_spec("PIL._avif"))]
OF_THE_MACHINE = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ENOTCONN}
_enough: ContextVar[int] = ContextVar("enough", default=0)


class ImageError(ValueError):
    """An image that cannot be used; the message names it, in one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@contextmanager
def enough(side: int) -> Iterator[None]:
    """Decode JPEGs whose sides are several times this long at a half, a quarter or an eighth of their size, with no side shorter.

    Their decoder then computes as many pixels less. 0: all at their size.
    """
    before = _enough.set(side)
    try:
        yield
    finally:
        _enough.reset(before)


def decode(source: str | os.PathLike[str] | bytes, channels: int = 3, name: str | None = None) -> Tensor:
    """Return an image of a file or of encoded bytes as a viewer would show it, uint8 [channels, H, W] (1: grey, 3: RGB).

    A pixel's channels lie side by side, as decoders write and resizing reads them. Raises `ImageError` for all that is no image,
    and ValueError for other numbers of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"images are decoded to 1 (grey) or 3 (RGB) channels, not {channels}")
    turned: tuple[Tensor, int] = _read(source, name, lambda image: _decoded(image, source, channels))
    return _upright(*turned)


def _decoded(image: Image.Image, source: str | os.PathLike[str] | bytes, channels: int) -> tuple[Tensor, int]:
    """Return the pixels as they are stored, and EXIF's word on how the camera was held."""
    pixels = None
    if image.format == "JPEG":
        if (least := _enough.get()) and (times := min(image.size) // least) > 1:
            image.draft(None, (image.width // times, image.height // times))
        elif image.mode == ("RGB" if channels == 3 else "L"):
            pixels = _from_jpeg(source, channels)
    if pixels is None:
        image.load()  # what is truncated fails here
        pixels = _in_strips(image, channels)
    return pixels, _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF does not make a whole image useless
        return 1


def _from_jpeg(source: str | os.PathLike[str] | bytes, channels: int) -> Tensor | None:
    """Read a JPEG by simplejpeg where that is installed, else by torchvision: both are faster than Pillow.

    Return None where they cannot: Pillow will say why.
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        return _by_simplejpeg(data, channels) if find_spec("simplejpeg") else _by_torchvision(data, channels)
    except (ImportError, OSError, RuntimeError, ValueError):
        return None


def _by_simplejpeg(data: bytes, channels: int) -> Tensor:
    from simplejpeg import decode_jpeg, decode_jpeg_header

    height, width, *_ = decode_jpeg_header(data)
    if height * width > MAX_PIXELS:  # of a damaged file that tells each reader another size
        raise ValueError
    return torch.from_numpy(decode_jpeg(data, "RGB" if channels == 3 else "GRAY")).permute(2, 0, 1)


def _by_torchvision(data: bytes, channels: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    return pixels


def _in_strips(image: Image.Image, channels: int) -> Tensor:
    """Convert an image piece by piece: conversions keep several copies of what they are given."""
    rows = max(1, STRIP // image.width)
    edges = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    white = None
    if image.mode.startswith(("I", "F")):
        white = _white(image.mode, max(float(_numbers(image.crop(edge)).max()) for edge in edges))
    pixels = torch.empty(image.height, image.width, channels, dtype=torch.uint8)
    for edge in edges:
        strip = np.array(_convert(image if len(edges) == 1 else image.crop(edge), "L" if channels == 1 else "RGB", white))
        pixels[edge[1] : edge[3]] = torch.from_numpy(strip).view(edge[3] - edge[1], image.width, channels)
    return pixels.permute(2, 0, 1)


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turn an image [C, H, W] as EXIF's tag says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    mirrored = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    turned = pixels.flip(mirrored) if mirrored else pixels
    return turned.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def decode_mask(source: str | os.PathLike[str]) -> Tensor:
    """Return the class ids of a grey or palette image, uint8 [H, W]; raises `ImageError` for one of colours."""

    def ids(image: Image.Image) -> Any:
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise ImageError(f"{source}: is a picture in {image.mode}, a mask has one class id a pixel (grey or palette)")
        image.load()
        array = np.array(image)
        if array.max() > 255 or array.min() < 0:
            raise ImageError(f"{source}: class id {array.max() if array.max() > 255 else array.min()}; ids are from 0 to 255")
        return array.astype(np.uint8)

    return torch.from_numpy(_read(source, None, ids))


def size_of(source: str | os.PathLike[str]) -> tuple[int, int]:
    """Return height and width, as a viewer would show it, from the file's header alone."""

    def size(image: Image.Image) -> tuple[int, int]:
        turned = _orientation(image) in (5, 6, 7, 8)
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size some versions of Pillow turn, and some do not
            width, height = image.tag_v2[256], image.tag_v2[257]
        return (width, height) if turned else (height, width)

    found: tuple[int, int] = _read(source, None, size)
    return found


def _read(source: str | os.PathLike[str] | bytes, name: str | None, convert: Callable[[Image.Image], Any]) -> Any:
    """Open an image and return what `convert` makes of it.

    Raises `ImageError`; `DataError` where it is the machine that fails: of the image that says nothing, and later it may be read.
    """
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
                return convert(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        kind = Path(name).suffix.lower()
        known = f"{kind[1:].upper()} is not read here: convert it to JPEG" if kind in UNREAD else "of a kind that is not known here"
        raise ImageError(f"{name}: not an image, or {known}") from None
    except (MemoryError, Image.DecompressionBombError):
        raise ImageError(f"{name}: too large to decode") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise DataError(f"{name}: cannot be read ({os.strerror(error.errno)})") from None
        reason = in_a_line(error)
        raise ImageError(f"{name}: not an image, or a damaged one ({reason})") from None


def _numbers(image: Any) -> Any:
    """Return the numbers of an image of 16 or 32 bits, as float32 without NaN and Inf."""
    return np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)


def _convert(image: Any, mode: str, white: float | None) -> Image.Image:
    """Convert an image to grey or RGB, on white. white: the value that becomes 255, where Pillow would clip and not scale."""
    if white is not None:
        image = Image.fromarray((_numbers(image) * (255 / white)).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    converted: Image.Image = image.convert(mode)
    return converted


def _white(mode: str, largest: float) -> float:
    """The value of white: 65535 in a mode of 16 bits; in one of 32 bits or floats, the end of the first usual range that fits."""
    usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(mode, (65535.0,))
    return next((white for white in usual if largest <= white), largest)
