"""Decode one image of a stranger's, safely.

Odd but valid images work: 16 bits, palette, CMYK, grey, alpha, animated (the first frame), EXIF-rotated. Whatever is truncated,
hostile or no image becomes one `ImageError`.
"""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 100_000_000  # 10,000 x 10,000: some 300 MB once decoded
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}


class ImageError(ValueError):
    """An image that cannot be used; the message names it."""


def decode(source: str | os.PathLike[str] | bytes, channels: int = 3, name: str | None = None) -> Tensor:
    """uint8 tensor [channels, H, W] (1: grey, 3: RGB) of a file or of encoded bytes, as a viewer would show it."""
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; errors are errors below
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}: make it smaller")
                array = np.array(_convert(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB"))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (MemoryError, Image.DecompressionBombError):
        raise ImageError(f"{name}: too large to decode") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ImageError(f"{name}: not an image, or a damaged one ({reason})") from None
    tensor = torch.from_numpy(array)
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.permute(2, 0, 1).contiguous()


def _convert(image: Any, mode: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits: Pillow would clip them to 255, not scale them
        values = np.asarray(image, dtype=np.float64)
        # A mode of 16 bits has that range; one of 32 bits or floats is told by its largest value.
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    converted: Image.Image = image.convert(mode)
    return converted
