"""Figure 1: every model is a point with a name that can be read."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from repvgg.paper.figure1 import _short, draw
from repvgg.paper.numbers import TABLE4, TABLE5

ROWS = (*TABLE4, *TABLE5)
EAGER = ["eager"] * len(ROWS)


def points(axes: Axes) -> list[tuple[float, float]]:
    return sorted((float(x), float(y)) for line in axes.lines for x, y in np.asarray(line.get_xydata()))


def test_points_are_the_speeds_and_accuracies() -> None:
    here = [row.speed / 100 + i for i, row in enumerate(ROWS)]
    left, right = draw(ROWS, here, EAGER).axes
    assert points(left) == sorted((float(row.speed), row.top1) for row in ROWS)
    assert points(right) == sorted((speed, row.top1) for speed, row in zip(here, ROWS, strict=True))


def test_table_5_is_hollow() -> None:
    axes = draw(ROWS, [float(row.speed) for row in ROWS], EAGER).axes[0]
    hollow = [len(np.asarray(line.get_xydata())) for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert sum(hollow) == len(TABLE5)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:3], ROWS[-1:]], ids=len)
def test_names_cover_neither_each_other_nor_the_points(rows: tuple[object, ...]) -> None:
    figure = draw(rows, [row.speed for row in rows], EAGER)  # type: ignore[arg-type, attr-defined]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(boxes) == len(rows)
        spots = axes.transData.transform(points(axes))
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i]), axes.texts[i].get_text()
            assert not any(box.padded(-2).contains(x, y) for x, y in spots)
            assert np.asarray(figure.bbox.extents)[0] <= box.x0 < box.x1 <= figure.bbox.x1


def test_the_engines_are_named() -> None:
    speeds = [float(row.speed) for row in ROWS]
    assert draw(ROWS, speeds, EAGER).axes[1].get_title("left") == "this machine: eager"
    mixed = ["openvino"] * 2 + ["native"] * (len(ROWS) - 2)
    title = draw(ROWS, speeds, mixed).axes[1].get_title("left")
    assert title == f"this machine: fastest in\nnative ({len(ROWS) - 2}), openvino (2)"


def test_short_names() -> None:
    assert [_short(row.printed) for row in (ROWS[0], ROWS[1], ROWS[7], ROWS[11], ROWS[16])] == [
        "A0",
        "R18",
        "Eff B0",
        "Reg 3.2GF",
        "VGG-16",
    ]
