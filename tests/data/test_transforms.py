"""data/transforms.py: evaluation's pipeline against Pillow, and randomness that depends on seed, epoch and index alone."""

import errno
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from repvgg.data import DataError, Decoded
from repvgg.data.folder import Folder
from repvgg.data.images import ImageError
from repvgg.data.transforms import BadImages, Transformed, eval_transform, load, normalise
from repvgg.disk import FileError
from repvgg.models.manifest import Preprocessing

PILLOW = {"bilinear": (Image.Resampling.BILINEAR, 1), "bicubic": (Image.Resampling.BICUBIC, 2)}  # and how far rounding may go


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("height", "width"), [(300, 400), (517, 333), (100, 64)])
def test_evaluation_against_pillow(height: int, width: int, interpolation: str) -> None:
    smooth = np.random.default_rng(0).integers(0, 256, (12, 9, 3)).astype(np.uint8)
    image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
    short = 256 / min(height, width)
    method, tolerance = PILLOW[interpolation]
    resized = image.resize((int(width * short), int(height * short)), method)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=int)
    uint8 = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    got = eval_transform(Preprocessing(interpolation=interpolation))(uint8)
    assert got.dtype == torch.uint8
    difference = np.abs(got.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= tolerance
    assert difference.mean() < 0.3  # Pillow rounds between its two passes; PyTorch does on processors with AVX2 alone


def test_a_crop_larger_than_the_image_has_a_black_border() -> None:
    out = eval_transform(Preprocessing((3, 32, 32), 16))(torch.full((3, 40, 40), 200, dtype=torch.uint8))
    assert out.shape == (3, 32, 32)
    assert out[:, 8:24, 8:24].eq(200).all()
    assert out.sum() == 3 * 16 * 16 * 200


def test_normalise() -> None:
    p = Preprocessing()
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (p.mean, p.std))
    got = normalise(images, p)
    assert got.dtype == torch.float32
    assert (got - (images.double() / 255 - mean) / std).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 3_000_000), (3_000_000, 1), (2, 1000)])
def test_a_long_line_of_pixels_does_not_fill_the_memory(shape: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 77, dtype=torch.uint8)
    image[..., shape[0] // 2, shape[1] // 2] = 79
    out = eval_transform(Preprocessing())(image)
    assert out.shape == (3, 224, 224)
    assert out.min() >= 77
    assert out.max() == 79  # the centre is what is left


def noisy(count: int) -> Transformed:
    """Transformed images whose transform draws random numbers."""
    images = Decoded(torch.zeros(count, 1, 4, 4, dtype=torch.uint8), list(range(count)))
    return Transformed(images, v2.Lambda(lambda x: torch.randint_like(x, 256)), seed=5)


def test_randomness_is_a_function_of_seed_epoch_and_index() -> None:
    images = noisy(3)
    seen = {}
    for seed in (5, 6):
        for epoch in (0, 1):
            images.seed = seed
            images.epoch.fill_(epoch)
            for index in (2, 0, 1):
                seen[seed, epoch, index] = images[index][0]
    assert len({tuple(x.flatten().tolist()) for x in seen.values()}) == 12
    images.epoch.fill_(0)
    images.seed = 5
    torch.manual_seed(123)
    assert all(torch.equal(images[i][0], seen[5, 0, i]) for i in (0, 1, 2))


def test_the_callers_randomness_is_left_alone() -> None:
    images = noisy(2)
    torch.manual_seed(9)
    expected = torch.rand(4)
    torch.manual_seed(9)
    images[0]
    assert torch.equal(torch.rand(4), expected)


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def test_the_callers_randomness_is_left_alone_by_a_failure() -> None:
    images = Transformed(noisy(1).images, Failing())
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        images[0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_give_the_same_batches() -> None:
    images = noisy(10)
    order = [3, 1, 4, 9, 2, 6, 5]
    for epoch in (0, 1):
        images.epoch.fill_(epoch)
        alone, together = (list(load(images, 3, workers, order)) for workers in (0, 2))
        assert [len(y) for _, y in alone] == [3, 3, 1]
        assert torch.cat([y for _, y in alone]).tolist() == order
        for (x, y), (x2, y2) in zip(alone, together, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_from_any_process(workers: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "x: y.png"
    path.write_bytes(b"damaged")
    images, before = Transformed(Folder(tmp_path), eval_transform(Preprocessing())), set(multiprocessing.active_children())
    with pytest.raises(ImageError) as caught:
        list(load(images, 1, workers))
    assert set(multiprocessing.active_children()) <= before  # no worker is left behind
    assert str(caught.value).startswith(f"{path}: not an image")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_is_one_line_from_any_process(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's message comes in its traceback: the reason, at the end of that, must not be cut off."""

    def failing(*args: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "x.png"
    Image.new("RGB", (9, 9)).save(path)
    images = Transformed(Folder(tmp_path), eval_transform(Preprocessing()), bad=BadImages(tmp_path / "bad.txt", replace=True))
    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(DataError) as caught:
        list(load(images, 1, workers))
    assert str(caught.value) == f"{path}: cannot be read (Input/output error)"


def test_the_list_of_bad_images_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Names of images are strangers' words, and so is a link in their run folder."""
    (precious := tmp_path / ".bashrc").write_text("mine")
    (listing := tmp_path / "bad_images.txt").symlink_to(precious)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/0.png").write_bytes(b"damaged")
    with pytest.raises(FileError, match=r"bad_images\.txt: is a link"):
        BadImages(listing, replace=False).read(Folder(tmp_path), 0)
    assert precious.read_text() == "mine"


def test_bad_images_are_replaced_in_training_and_do_not_count_in_evaluation(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (10 * i, 0, 0)).save(tmp_path / f"c/{i}.png")
    (tmp_path / "c/3.png").write_bytes(b"damaged")
    images, listing = Folder(tmp_path), tmp_path / "bad.txt"
    training = Transformed(images, v2.Resize((8, 8)), bad=BadImages(listing, replace=True))
    assert [int(training[i][0][0, 0, 0]) for i in range(4)] == [0, 10, 20, 0]  # the next one, round the corner
    evaluation = BadImages(listing, replace=False)
    got = [Transformed(images, v2.Resize((8, 8)), bad=evaluation)[i] for i in range(4)]
    assert [label for _, label in got] == [0, 0, 0, -1]
    assert got[3][0].shape == (3, 8, 8)
    assert len(evaluation.listed()) == 1
    assert evaluation.listed()[0].startswith(f"{tmp_path / 'c/3.png'}: not an image")
    for i in range(3):
        (tmp_path / f"c/{i}.png").write_bytes(b"damaged")
    with pytest.raises(ImageError, match="none of the images can be read"):
        training[0]


def test_the_loaders_speed_is_measured() -> None:
    images = Transformed(Decoded(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), [0] * 8), nn.Identity())
    assert images.images_per_second == 0
    list(load(images, 4))
    assert images.spent[0, 1] == 8
    assert images.images_per_second > 0


HALF = """
import sys
import torch
from repvgg.data import DataError, Decoded
from repvgg.data.transforms import Transformed, load
images = Decoded(torch.zeros(64, 3, 8, 8, dtype=torch.uint8), [0] * 64)
batches = load(Transformed(images, torch.nn.Identity()), 4, int(sys.argv[1]))
next(batches)
sys.modules["kept to the end"] = batches
"""


@pytest.mark.parametrize("workers", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_program_may_end_with_a_loader_half_read(workers: str) -> None:
    done = subprocess.run([sys.executable, "-c", HALF, workers], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
