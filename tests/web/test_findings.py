"""What a run's images show: pictures are what the network saw, and the worst mistakes are the worst."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.tv_tensors import Mask

from repvgg.data import Source, open_source
from repvgg.data.masks import IGNORED
from repvgg.data.transforms import normalise
from repvgg.models.manifest import Preprocessing
from repvgg.train.batches import Feed
from repvgg.train.recipes import get_recipe
from repvgg.web import charts
from repvgg.web.drawing import DPI
from repvgg.web.findings import beside, first_batch, mistakes, mosaic, picture


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_undoes_the_normalisation(channels: int) -> None:
    pixels = torch.randint(0, 256, (1, channels, 5, 7), dtype=torch.uint8)
    p = Preprocessing((channels, 5, 7), 7, "bilinear", (0.4,) * channels, (0.2,) * channels)
    shown = np.asarray(picture(normalise(pixels, p)[0], p)).reshape(5, 7, channels)
    assert np.array_equal(shown, pixels[0].permute(1, 2, 0).numpy())


def test_a_mosaic_has_a_square_for_each() -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    sheet = mosaic([Image.new("RGB", (4, 8), colour) for colour in colours], cell=16, gap=2)
    assert sheet.size == (34, 34)  # two rows of two
    assert [sheet.getpixel(place) for place in ((8, 8), (26, 8), (8, 26))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert beside([sheet, sheet], 6).size == (74, 34)


def test_the_first_batch_is_that_of_training() -> None:
    source = open_source("digits").limited(40)
    recipe = replace(get_recipe("demo"), batch_size=4)
    x, _ = next(iter(Feed(source, recipe, 3).epoch(0)))
    wanted = mosaic([Image.fromarray(image[0].numpy()) for image in x])
    assert np.array_equal(np.asarray(first_batch(source, recipe, 3)), np.asarray(wanted))
    mixed = first_batch(source, replace(recipe, mixup=1.0), 3)
    assert not np.array_equal(np.asarray(mixed), np.asarray(wanted))


class Road(nn.Module):
    """Takes everything for the first class."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.zeros(len(x), 3, *x.shape[2:])
        scores[:, 0] = self.one
        return scores


def test_the_worst_masks_come_first_and_what_has_no_label_does_not_count() -> None:
    images = []
    for wrong in (0, 8, 3):  # rows of 16 that are of the second class
        mask = torch.zeros(16, 16, dtype=torch.uint8)
        mask[:wrong] = 1
        mask[8:] = IGNORED
        images.append((torch.full((3, 16, 16), 10 * wrong, dtype=torch.uint8), Mask(mask)))
    source = Source("roads", images, images, ["road", "sky", "car"], Preprocessing((3, 16, 16), 16), masks=True)  # type: ignore[arg-type]
    found = mistakes(Road(), source)
    assert found.images == 3
    assert [(m.true, m.taken, m.surely) for m in found.worst] == [("sky", "road", 1.0), ("sky", "road", 0.375)]
    assert found.worst[0].picture.size == (16 + 6 + 16, 16)


@pytest.mark.parametrize(("size", "numbers", "names"), [(3, True, True), (30, False, True), (70, False, False)])
def test_a_confusion_matrix_is_written_out_where_there_is_room(size: int, numbers: bool, names: bool) -> None:
    counts = np.arange(size * size).reshape(size, size)
    classes = [f"class {i}" for i in range(size)]
    (axes,) = charts.confusion(counts, classes, "images").axes
    assert [text.get_text() for text in axes.texts] == ([f"{n}" for n in range(1, 9)] if numbers else [])
    assert [label.get_text() for label in axes.get_yticklabels()] == (classes if names else [])


def test_names_are_no_formulas(tmp_path: Path) -> None:
    names = ["$5_to_$10", "$\\bad$"]
    for figure in (
        charts.confusion(np.eye(2), names, "images"),
        charts.curves("top-1", {name: [(1, 1.0)] for name in names}),
    ):
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            figure.savefig(tmp_path / "chart.svg")
        assert all(name in (tmp_path / "chart.svg").read_text() for name in names)


def test_long_counts_are_shares_of_their_row() -> None:
    (axes,) = charts.confusion(np.array([[30_000, 10_000], [0, 5]]), ["a", "b"], "pixels").axes
    assert [text.get_text() for text in axes.texts] == ["75", "25", "100"]
    assert axes.get_title("left") == "pixels, % of each row"


def test_a_matrix_of_a_thousand_classes_is_no_larger_than_a_screen() -> None:
    figure = charts.confusion(np.eye(1000), [f"class {i}" for i in range(1000)], "images")
    assert max(figure.get_size_inches() * DPI) < 1000


def test_a_loss_that_is_far_above_the_others_does_not_squash_them() -> None:
    (axes,) = charts.curves("loss", {"training": [(i, 1.0) for i in range(1, 9)] + [(9, 50.0)]}, level=True).axes
    assert axes.get_ylim()[1] < 3
    assert "highest: 50" in axes.get_title("left")
