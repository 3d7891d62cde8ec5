"""data/images.py: large images cost a bounded amount of memory, and JPEGs are read by the faster of two readers, alike."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Forks
from pictures import encoded, noise
from PIL import Image

from repvgg.data import images
from repvgg.data.images import ImageError, decode, enough

MODES = {
    "RGB": Image.fromarray(noise(3)),
    "RGBA": Image.fromarray(noise(4)),
    "L": Image.fromarray(noise()),
    "P": Image.fromarray(noise(3)).quantize(16),
    "1": Image.fromarray(noise()).convert("1"),
    "I;16": Image.fromarray(noise(high=65536, dtype=np.uint16)),
    "F": Image.fromarray(noise().astype(np.float32)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_in_strips_as_at_once(mode: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "TIFF" if mode in ("F", "I;16") else "PNG"
    source = encoded(MODES[mode], kind, **({"transparency": 3} if mode == "P" else {}))
    whole = decode(source, channels)
    monkeypatch.setattr(images, "STRIP", 2 * 13 + 1)  # two rows of the nine at a time
    assert torch.equal(decode(source, channels), whole)


MEASURE = """
from pathlib import Path
from repvgg.data.images import decode
def peak():  # of this program alone; that of getrusage is at least what the process that started it held
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
data = Path("large").read_bytes()
before = peak()
image = decode(data)
print(image[0].numel(), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("mode", ["RGBA", pytest.param("P", marks=pytest.mark.slow), pytest.param("CMYK", marks=pytest.mark.slow)])
def test_a_large_image_takes_nine_bytes_a_pixel_at_most(mode: str, tmp_path: Path, forks: Forks) -> None:
    path = tmp_path / "large"
    Image.new(mode, (6000, 6000)).save(path, "JPEG" if mode == "CMYK" else "PNG")
    assert path.stat().st_size < 2_000_000
    with forks.start(MEASURE, tmp_path) as process:
        done = process.wait()
    pixels, peak = map(int, done.out.split())
    assert pixels == 36_000_000
    assert 3 * pixels < peak < 9 * pixels + 100_000_000  # libraries that are loaded on the way


def photo(size: tuple[int, int] = (150, 113)) -> Image.Image:
    """Smooth, with edges and noise, as photos are."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    planes = [120 + 90 * np.sin(7 * x + i) * np.cos(5 * y) + 25 * (x > 0.5) for i in range(3)]
    rough = np.random.default_rng(0).normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((np.stack(planes, 2) + rough).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1, "quality": 95}, {"progressive": True, "quality": 30}]
)
def test_all_readers_of_jpeg_agree(mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source, channels = encoded(photo().convert(mode), "JPEG", **options), 3 if mode == "RGB" else 1
    fast = images._by_torchvision(source, channels)
    if find_spec("simplejpeg"):
        assert int((fast.int() - images._by_simplejpeg(source, channels).int()).abs().max()) <= 2
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    assert torch.equal(decode(source, channels), fast)
    monkeypatch.setattr(images, "_from_jpeg", lambda *_: None)
    slow = decode(source, channels)
    assert int((fast.int() - slow.int()).abs().max()) <= 2  # two builds of libjpeg may round otherwise


def test_what_the_faster_reader_does_not_read_the_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(images, "_from_jpeg", lambda source, channels: asked.append(channels))
    grey, colour = encoded(photo().convert("L"), "JPEG"), encoded(photo(), "JPEG")
    for source, channels in ((grey, 3), (colour, 1), (encoded(photo().convert("CMYK"), "JPEG"), 3), (encoded(photo(), "PNG"), 3)):
        assert decode(source, channels).shape == (channels, 113, 150)
    assert asked == []
    assert decode(colour, 3).shape == (3, 113, 150)  # it gives up here
    assert asked == [3]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("least", "shown"), [(0, (640, 900)), (400, (640, 900)), (300, (320, 450)), (160, (160, 225)), (20, (80, 113))]
)
def test_what_is_far_larger_than_enough_is_decoded_smaller(least: int, shown: tuple[int, int], progressive: bool) -> None:
    """Beside means over the squares of pixels that each one stands for."""
    source = encoded(photo((900, 640)), "JPEG", quality=95, progressive=progressive)
    with enough(least):
        small = decode(source)
    assert small.shape == (3, *shown)
    times = 640 // shown[0]
    whole = decode(source).float()[:, :, : 900 // times * times]
    wanted = torch.nn.functional.avg_pool2d(whole, times)
    assert float((small[:, :, : wanted.shape[2]].float() - wanted).abs().mean()) < 1.5
    with enough(least):
        assert decode(encoded(photo((900, 640)), "PNG")).shape == (3, 640, 900)
    assert decode(source).shape == (3, 640, 900)


def test_what_is_decoded_smaller_is_upright_and_refused_when_damaged() -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    source = encoded(photo((900, 640)), "JPEG", exif=exif.tobytes())
    with enough(300):
        assert decode(source).shape == (3, 450, 320)
        with pytest.raises(ImageError, match="truncated"):
            decode(source[: len(source) // 2])
