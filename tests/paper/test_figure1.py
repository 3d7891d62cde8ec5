"""Figure 1: every model is a point with a name that can be read."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from repvgg.paper import figure1
from repvgg.paper.figure1 import _short, draw
from repvgg.paper.numbers import TABLE4, TABLE5
from repvgg.paper.result import PaperSettings
from repvgg.paper.speeds import Speed

ROWS = (*TABLE4, *TABLE5)
EAGER = ["eager"] * len(ROWS)


def points(axes: Axes) -> list[tuple[float, float]]:
    return sorted((float(x), float(y)) for line in axes.lines for x, y in np.asarray(line.get_xydata()))


def test_points_are_the_speeds_over_resnet_18_and_the_accuracies() -> None:
    here = [row.speed / 100 + i for i, row in enumerate(ROWS)]
    left, right = draw(ROWS, here, EAGER).axes
    assert points(left) == sorted((row.speed / 2442, row.top1) for row in ROWS)
    assert points(right) == sorted((speed, row.top1) for speed, row in zip(here, ROWS, strict=True))


def test_a_machine_that_slowed_down_for_one_pair_moves_no_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(models: list[str], settings: PaperSettings) -> dict[str, Speed]:
        seconds = {name: float(number) for number, name in enumerate(models, 1)}
        return {name: Speed(name, 8, (3, 224, 224), [s], "resnet18", [3 * s], 1, 1, 1, "") for name, s in seconds.items()}

    monkeypatch.setattr(figure1, "measure_models", measured)
    result = figure1.run(PaperSettings())
    assert {x for x, _ in points(result.figures["figure1"].axes[1])} == {3}
    assert {str(row[4]) for row in result.tables[0].rows} == {"3.00x (3.00 to 3.00)"}
    assert {point["here"]["ratio"] for point in result.data["points"]} == {3}


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
