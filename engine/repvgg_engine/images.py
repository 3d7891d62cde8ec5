"""Image files as the engine takes them: uint8, resized and cropped as the model file says. Needs Pillow."""

import ctypes
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine.files import Preprocessing
from repvgg_engine.library import LIBRARY, DescriptionStruct, EngineError, Message

MAX_PIXELS = 100_000_000
# Pillow's names of these. It reads more, for one EPS, which it hands to Ghostscript: a program for a stranger to run.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000")


def read_image(source: Path | bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return an image file, or its bytes, as uint8 [H, W, C] of the model's input size. Raises `EngineError` for what is no image,
    or a damaged one."""
    path = "image" if isinstance(source, bytes) else source
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise EngineError("reading images needs Pillow: pip install pillow") from None
    if not isinstance(source, bytes) and not source.is_file():
        raise EngineError(f"{path}: {'is not a file' if source.exists() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as opened:
                if not 0 < opened.width * opened.height <= MAX_PIXELS:
                    raise EngineError(f"{path}: {opened.width} x {opened.height} pixels; up to {MAX_PIXELS:,} can be decoded")
                image = on_white(ImageOps.exif_transpose(opened), "L" if len(preprocessing.mean) == 1 else "RGB")
        pixels = np.array(image, np.uint8)  # decodes what is left
    except EngineError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise EngineError(f"{path}: not an image, or a damaged one ({str(error)[:120]})") from None
    return prepare(pixels.reshape(*pixels.shape[:2], -1), preprocessing)


def on_white(image: Any, mode: str) -> Any:
    """Return an image in grey or RGB as `repvgg predict` shows it to a model: on white where it is transparent, and one of 16 or 32
    bits, which Pillow would clip, scaled to 8."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        numbers = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
        usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
        largest = float(numbers.max())
        white = next((white for white in usual if largest <= white), largest)
        image = Image.fromarray((numbers * (255 / white)).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def prepare(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the resized centre of an image [H, W, C], of the model's input size. Raises `EngineError`."""
    p, message, (height, width, channels) = preprocessing, Message(), pixels.shape
    about = DescriptionStruct(ctypes.sizeof(DescriptionStruct), channels=channels, height=p.height, width=p.width)
    about.resize, about.interpolation = p.resize, p.interpolation.encode()
    out = np.empty((p.height, p.width, channels), np.uint8)
    pixels = np.ascontiguousarray(pixels)
    message.check(LIBRARY.repvgg_prepare(about, pixels.ctypes.data, height, width, out.ctypes.data, *message.room))
    return out
