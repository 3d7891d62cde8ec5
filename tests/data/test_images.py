"""data/images.py: right pixels from every kind of image, one ImageError from everything else."""

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import HEIGHT, WIDTH, Array, encoded, noise, png
from PIL import Image, features
from torch import Tensor

from repvgg.data import DataError
from repvgg.data.images import ImageError, decode, size_of
from repvgg.disk import is_image
from repvgg.terminal import printable


def pixels(image: Tensor) -> Array:
    """[H, W, C] of a decoded image, after a look at its type."""
    assert image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous()
    return image.permute(1, 2, 0).numpy()


def luma(rgb: Array) -> Array:
    """ITU-R 601."""
    grey: Array = rgb @ np.array([0.299, 0.587, 0.114])
    return grey[..., None]


def assert_decodes(source: bytes, rgb: Array, tolerance: float = 0) -> None:
    """To this RGB, and to its luma; both are rounded once, so a unit is within reach."""
    assert np.abs(pixels(decode(source)) - rgb.astype(float)).max() <= tolerance
    assert pixels(decode(source, 1)).shape == (*rgb.shape[:2], 1)
    assert np.abs(pixels(decode(source, 1)) - luma(rgb.astype(float))).max() <= tolerance + 0.51


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_rgb(kind: str, options: dict[str, Any]) -> None:
    rgb = noise(3)
    assert_decodes(encoded(Image.fromarray(rgb), kind, **options), rgb)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "PPM"])
def test_grey_and_one_bit(kind: str) -> None:
    grey = noise()
    assert_decodes(encoded(Image.fromarray(grey), kind), np.repeat(grey[..., None], 3, 2))
    bits = noise(high=2) * 255
    assert_decodes(encoded(Image.fromarray(bits).convert("1"), kind), np.repeat(bits[..., None], 3, 2))


def test_jpeg() -> None:
    rgb = np.full((16, 24, 3), (200, 100, 30), np.uint8)
    assert_decodes(encoded(Image.fromarray(rgb), "JPEG", quality=95), rgb, tolerance=3)


def test_palette() -> None:
    indices, palette = noise(high=7), np.random.default_rng(1).integers(0, 256, (7, 3)).astype(np.uint8)
    image = Image.fromarray(indices, mode="P")
    image.putpalette(palette.tobytes())
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert_decodes(encoded(image, kind), palette[indices])


def test_transparency_is_on_white() -> None:
    indices, palette = noise(high=4), np.random.default_rng(1).integers(0, 256, (4, 3)).astype(np.uint8)
    image = Image.fromarray(indices, mode="P")
    image.putpalette(palette.tobytes())
    alpha = np.array([0, 255, 100, 200], np.uint8)
    assert_decodes(encoded(image, "PNG", transparency=alpha.tobytes()), _on_white(palette[indices], alpha[indices]), tolerance=1)
    rgba = noise(4)
    assert_decodes(encoded(Image.fromarray(rgba), "PNG"), _on_white(rgba[..., :3], rgba[..., 3]), tolerance=1)
    assert_decodes(encoded(Image.fromarray(rgba), "TIFF"), _on_white(rgba[..., :3], rgba[..., 3]), tolerance=1)
    la = noise(2)
    assert_decodes(encoded(Image.fromarray(la), "PNG"), _on_white(np.repeat(la[..., :1], 3, 2), la[..., 1]), tolerance=1)
    rgb = noise(3)
    rgb[0, 0] = 1, 2, 3
    clear = np.where((rgb == (1, 2, 3)).all(2), 0, 255)
    assert_decodes(encoded(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3)), _on_white(rgb, clear))


def _on_white(rgb: Array, alpha: Array) -> Array:
    share = alpha[..., None].astype(float) / 255
    return rgb * share + 255 * (1 - share)


def test_cmyk() -> None:
    cmyk = noise(4)
    rgb = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    assert_decodes(encoded(Image.fromarray(cmyk, mode="CMYK"), "TIFF"), rgb, tolerance=1)
    flat = np.full((16, 16, 4), (10, 150, 200, 30), np.uint8)
    rgb = (255.0 - flat[..., :3]) * (255.0 - flat[..., 3:]) / 255
    assert_decodes(encoded(Image.fromarray(flat, mode="CMYK"), "JPEG", quality=95), rgb, tolerance=3)


def test_sixteen_bits_are_scaled() -> None:
    deep = noise(high=65536, dtype=np.uint16)
    grey = np.repeat((deep / 257).round()[..., None], 3, 2)
    assert_decodes(encoded(Image.fromarray(deep), "PNG"), grey)
    assert_decodes(encoded(Image.fromarray(deep), "TIFF"), grey)
    big_endian = Image.frombytes("I;16B", (WIDTH, HEIGHT), deep.astype(">u2").tobytes())
    assert_decodes(encoded(big_endian, "TIFF"), grey)
    dark = np.minimum(deep, 255)  # a dark image of 16 bits stays dark
    assert_decodes(encoded(Image.fromarray(dark), "PNG"), np.repeat((dark / 257).round()[..., None], 3, 2))
    rgb = noise(3, high=65536, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    assert_decodes(png(WIDTH, HEIGHT, 16, 2, rows), rgb // 256, tolerance=1)


@pytest.mark.parametrize("white", [1.0, 255, 65535, 2**24])
def test_thirty_two_bits_and_floats_are_scaled(white: float) -> None:
    share = np.random.default_rng(2).random((HEIGHT, WIDTH))
    share[0, 0] = 1
    grey = np.repeat((share * 255)[..., None], 3, 2)
    assert_decodes(encoded(Image.fromarray((share * white).astype(np.float32)), "TIFF"), grey, tolerance=0.51)
    if white > 1:
        assert_decodes(encoded(Image.fromarray((share * white).round().astype(np.int32)), "TIFF"), grey, tolerance=1.01)


def test_floats_that_are_no_numbers() -> None:
    values = np.array([[0.0, 0.5, 1.0, np.nan, np.inf, -np.inf, -3.0]], np.float32)
    expected = np.array([[0, 128, 255, 0, 0, 0, 0]], np.uint8)
    assert_decodes(encoded(Image.fromarray(values), "TIFF"), np.repeat(expected[..., None], 3, 2))


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        source = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
        assert_decodes(source, np.full((8, 8, 3), (255, 0, 0)))


UPRIGHT: dict[int, Callable[[Array], Array]] = {  # what a viewer does to the stored image (EXIF 2.3, tag 274)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation: int) -> None:
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8], stored[:8, 8:16], stored[8:, :8] = 250, 160, 80  # no two views of it are the same
    exif = Image.Exif()
    exif[274] = orientation
    source = encoded(Image.fromarray(stored), "JPEG", quality=95, exif=exif)
    assert_decodes(source, UPRIGHT[orientation](stored), tolerance=4)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_size_is_that_of_the_upright_image(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a.img"
    path.write_bytes(encoded(Image.new("RGB", (24, 16)), kind, exif=exif))
    assert size_of(path) == decode(path).shape[1:] == ((16, 24) if orientation == 1 else (24, 16))


def test_damaged_exif_spoils_no_image() -> None:
    rgb = np.full((16, 24, 3), (200, 100, 30), np.uint8)
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", b"Exif\0\0"):
        assert_decodes(encoded(Image.fromarray(rgb), "JPEG", quality=95, exif=exif), rgb, tolerance=3)


def test_from_a_file_and_from_bytes(tmp_path: Path) -> None:
    source = encoded(Image.fromarray(noise(3)), "PNG")
    path = tmp_path / "wrongly named.jpg"
    path.write_bytes(source)
    assert torch.equal(decode(path), decode(source))
    assert torch.equal(decode(str(path)), decode(source))


def test_which_files_are_taken_for_images() -> None:
    assert [name for name in ("a.jpg", "a.JPEG", "b.tif", "c.txt", "._a.jpg", ".jpg", "jpg") if is_image(Path(name))] == [
        "a.jpg",
        "a.JPEG",
        "b.tif",
    ]


def hostile() -> dict[str, bytes]:
    image = Image.fromarray(noise(3))
    files = {f"truncated.{kind.lower()}": encoded(image, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")}
    exif = Image.Exif()
    exif[274] = 6
    files["truncated and turned.jpeg"] = encoded(image.resize((200, 200)), "JPEG", exif=exif)
    files = {name: content[: len(content) // 2] for name, content in files.items()}
    return {
        **files,
        "header bomb.png": png(60_000, 60_000, 8, 2, b"\0" * 100),
        "header bomb.bmp": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 154, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 100, 0, 0, 0, 0)
        + b"\0" * 100,
        "bomb.png": png(12_000, 12_000, 1, 0, b"\0" * 12_000 * 1501),
        "zero bytes.png": b"",
        "text.jpg": b"This is not an image.\n" * 50,
        "no pixels.ppm": b"P6 0 0 255\n",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "nul.png": b"\0" * 1000,
    }


@pytest.mark.parametrize("name", hostile())
def test_what_is_no_image_is_one_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(hostile()[name])
    _assert_refused(path)


def test_what_is_no_file_is_one_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("missing.png", "folder.png", "pipe.png", "nul\0.png", "x" * 300 + ".png"):
        _assert_refused(tmp_path / name)


def _assert_refused(path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        decode(path)
    assert type(caught.value) is ImageError
    assert str(caught.value).startswith(printable(str(path)))
    assert "\n" not in str(caught.value)


def test_postscript_is_not_handed_to_ghostscript() -> None:
    with pytest.raises(ImageError, match="of a kind that is not known here"):
        decode(hostile()["postscript.jpg"])


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="not 4"):
        decode(encoded(Image.fromarray(noise(3)), "PNG"), 4)


def test_a_machine_that_fails_says_nothing_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later it may be read: it is no bad image, which a list of predictions would call it for good."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Input/output error\)"):
        decode(path)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_can(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), (200, 30, 30)).save(tmp_path / "a.avif")
    assert decode(tmp_path / "a.avif").shape == (3, 6, 8)
