"""data/__init__.py: a source by its name, parts of it, and images kept in memory."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from repvgg.data import DataError, Decoded, InMemory, Source, Subset, open_source
from repvgg.models.manifest import Preprocessing


def numbered(count: int) -> Decoded:
    """Images whose first pixel and label are their number."""
    return Decoded(torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).repeat(1, 3, 2, 2), list(range(count)))


def labels(images: Subset) -> list[int]:
    return [images[i][1] for i in range(len(images))]


def source(train: int = 100, val: int = 30) -> Source:
    return Source("numbers", numbered(train), numbered(val), [str(i) for i in range(100)], Preprocessing((3, 2, 2), 2))


@pytest.mark.parametrize("spec", ["", "nowhere", "hf", "hf:", "digit", "cifar:", "/no/such/folder"])
def test_unknown_data_lists_what_there_is(spec: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(spec)
    folders = "digits, a folder of class folders, a table (.csv), cifar10[:ROOT]"
    assert str(caught.value) == (
        f"no data {spec!r}: {folders}, hf:NAME, hf-stream:NAME, wds:SHARDS, camvid:ROOT or cityscapes:ROOT"
    )


def test_data_on_disk_are_read_anew_each_time(tmp_path: Path) -> None:
    """In a notebook, images are added and asked for again."""
    for number in range(3):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    before = open_source(str(tmp_path))
    Image.new("L", (8, 8)).save(tmp_path / "b" / "new.png")
    after = open_source(str(tmp_path))
    assert [len(source.train) + len(source.val) for source in (before, after)] == [3, 4]


def test_limited_draws_with_the_seed() -> None:
    drawn = source().limited(20, seed=3)
    assert isinstance(drawn.train, Subset)
    assert isinstance(drawn.val, Subset)
    assert len(set(labels(drawn.train))) == len(set(labels(drawn.val))) == 20
    again, other = source().limited(20, seed=3), source().limited(20, seed=4)
    assert isinstance(again.train, Subset)
    assert isinstance(other.train, Subset)
    assert labels(again.train) == labels(drawn.train) != labels(other.train)
    assert labels(drawn.train) != list(range(20))  # drawn, not the first ones
    image, label = drawn.train[7]
    assert int(image[0, 0, 0]) == label


def test_limited_to_more_than_there_are_keeps_all() -> None:
    drawn = source(train=5, val=3).limited(10)
    assert isinstance(drawn.train, Subset)
    assert labels(drawn.train) == list(range(5))
    assert len(drawn.val) == 3


def test_limited_to_nothing() -> None:
    whole = source()
    assert whole.limited(None) is whole
    for count in (0, -1):
        with pytest.raises(DataError, match=f"--limit {count}: at least one image"):
            whole.limited(count)


def test_each_image_is_decoded_once() -> None:
    asked = []

    def decode(index: int) -> Tensor:
        asked.append(index)
        return torch.full((3, 4, 4), index, dtype=torch.uint8)

    kept = InMemory(decode, [10, 11, 12], (3, 4, 4))
    assert asked == []
    for index in (2, 0, 2, 0, 2):
        image, label = kept[index]
        assert torch.equal(image, torch.full((3, 4, 4), index, dtype=torch.uint8))
        assert label == 10 + index
    assert asked == [2, 0]
    assert len(kept) == 3


def test_an_image_of_another_shape_is_not_kept_and_not_spoiled() -> None:
    kept = InMemory(lambda index: torch.full((3, 1 + index, 4), 7, dtype=torch.uint8), [0, 0, 0], (3, 2, 4))
    assert [kept[i][0].shape for i in (0, 1, 2, 0)] == [(3, 1, 4), (3, 2, 4), (3, 3, 4), (3, 1, 4)]
    assert kept.known.tolist() == [0, 1, 0]


def test_what_a_worker_process_decodes_the_others_see() -> None:
    kept = InMemory(lambda index: torch.full((3, 2, 2), 9, dtype=torch.uint8), [0, 0], (3, 2, 2))
    worker = multiprocessing.get_context("fork").Process(target=kept.__getitem__, args=(1,))
    worker.start()
    worker.join()
    assert kept.known.tolist() == [0, 1]
    assert kept.pixels[1].eq(9).all()


def test_all_images_are_one_split_too() -> None:
    whole = source()
    assert len(whole.split("all")) == len(whole.train) + len(whole.val)
