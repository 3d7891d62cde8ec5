"""Image files as the engine takes them: uint8, resized and cropped as the model file says. Needs Pillow."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine.files import Preprocessing
from repvgg_engine.library import EngineError

MAX_PIXELS = 100_000_000
LONGEST = 32  # times the short side: resized by that side, a longer image would fill the memory
# Pillow's names of these. It reads more, for one EPS, which it hands to Ghostscript: a program for a stranger to run.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000")


def read_image(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """uint8 [H, W, C] of the model's input size. Raises `EngineError` for what is no image, or a damaged one."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise EngineError("reading images needs Pillow: pip install pillow") from None
    if not path.is_file():
        raise EngineError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    kinds = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    if preprocessing.interpolation not in kinds:
        raise EngineError(f"no interpolation {preprocessing.interpolation!r}: {', '.join(kinds)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            with Image.open(path, formats=FORMATS) as opened:
                if not 0 < opened.width * opened.height <= MAX_PIXELS:
                    raise EngineError(f"{path}: {opened.width} x {opened.height} pixels; up to {MAX_PIXELS:,} can be decoded")
                image: Any = ImageOps.exif_transpose(opened).convert("L" if len(preprocessing.mean) == 1 else "RGB")
        image = _crop(image, min(image.width, LONGEST * image.height), min(image.height, LONGEST * image.width))
        scale = preprocessing.resize / min(image.size)
        size = [max(preprocessing.resize, int(side * scale)) for side in image.size]
        image = _crop(image.resize(size, kinds[preprocessing.interpolation]), preprocessing.width, preprocessing.height)
    except EngineError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise EngineError(f"{path}: not an image, or a damaged one ({str(error)[:120]})") from None
    return np.asarray(image, np.uint8).reshape(preprocessing.height, preprocessing.width, -1)


def _crop(image: Any, width: int, height: int) -> Any:
    """The centre; black where the image is smaller."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
