"""data/images.py: thousands of mutated images, in a process of their own."""

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forks import Forks
from pictures import chunk, encoded, noise
from PIL import Image

from repvgg.data import images
from repvgg.data.images import ImageError, decode

MUTANTS = 8_000


def test_mutated_images_give_an_image_or_an_image_error(forks: Forks, tmp_path: Path) -> None:
    """In a process of its own: a decoder that crashes or hangs is a failure too."""
    with forks.script(__file__, [], tmp_path) as process:
        done = process.wait()
    assert done.code == 0, done.err[-2000:]
    decoded, refused = map(int, done.out.split())
    assert decoded + refused == MUTANTS
    assert min(decoded, refused) > MUTANTS / 20  # mutations that neither all nor none survive


def fuzz() -> None:
    torch.set_num_threads(1)
    images.MAX_PIXELS = 1_000_000  # a mutated size shall cost no seconds
    decoded = refused = 0
    healthy = _healthy()
    for number in range(MUTANTS):
        draw = random.Random(number)
        kind, source = healthy[number % len(healthy)]
        mutant = _mutate(source, draw)
        if kind == "PNG" and draw.random() < 0.7:
            mutant = _with_right_checksums(mutant)  # or the reader would look no further
        try:
            image = decode(mutant, draw.choice((1, 3)))
        except ImageError as error:
            refused += "\n" not in str(error)
        else:
            assert image.dtype == torch.uint8, number
            assert image.shape[0] in (1, 3), number
            assert 0 < image[0].numel() <= images.MAX_PIXELS, number
            decoded += 1
    print(decoded, refused)


def _healthy() -> list[tuple[str, bytes]]:
    rgb, rgba, grey = Image.fromarray(noise(3)), Image.fromarray(noise(4)), Image.fromarray(noise())
    deep, real = Image.fromarray(noise(high=65536, dtype=np.uint16)), Image.fromarray(noise().astype(np.float32))
    palette, cmyk = rgb.quantize(16), Image.fromarray(noise(4), mode="CMYK")
    exif = Image.Exif()
    exif[274] = 6
    several: dict[str, Any] = {"save_all": True, "append_images": [rgba.convert("P")]}
    return [
        ("PNG", encoded(rgb, "PNG")),
        ("PNG", encoded(deep, "PNG")),
        ("PNG", encoded(palette, "PNG", transparency=0)),
        ("JPEG", encoded(rgb, "JPEG", exif=exif)),
        ("JPEG", encoded(rgb, "JPEG", progressive=True, quality=30)),
        ("JPEG", encoded(cmyk, "JPEG")),
        ("GIF", encoded(palette, "GIF", **several)),
        ("BMP", encoded(rgb, "BMP")),
        ("BMP", encoded(palette, "BMP")),
        ("TIFF", encoded(rgba, "TIFF", compression="tiff_lzw")),
        ("TIFF", encoded(real, "TIFF")),
        ("TIFF", encoded(grey.convert("1"), "TIFF", compression="group4")),
        ("WEBP", encoded(rgba, "WEBP", lossless=True)),
        ("WEBP", encoded(rgb, "WEBP", quality=50)),
        ("PPM", encoded(rgb, "PPM")),
        ("JPEG2000", encoded(rgb, "JPEG2000")),
    ]


def _mutate(source: bytes, draw: random.Random) -> bytes:
    mutant = bytearray(source)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(mutant)) if draw.random() < 0.5 else draw.randrange(min(64, len(mutant)))  # headers most of all
        match draw.randrange(6):
            case 0:
                mutant[at] ^= 1 << draw.randrange(8)
            case 1:
                mutant[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                mutant[at:at] = draw.randbytes(draw.randrange(1, 9))
            case 3:
                mutant[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x40\0"))
            case 4:
                del mutant[at : at + draw.randrange(1, 9)]
            case 5 if draw.random() < 0.2:
                del mutant[at:]
        mutant = mutant or bytearray(b"\0")
    return bytes(mutant)


def _with_right_checksums(source: bytes) -> bytes:
    out, at = source[:8], 8
    while at + 12 <= len(source):
        (length,) = struct.unpack(">I", source[at : at + 4])
        out += chunk(source[at + 4 : at + 8], source[at + 8 : at + 8 + length])
        at += 12 + length
    return out + source[at:]


if __name__ == "__main__":
    fuzz()
