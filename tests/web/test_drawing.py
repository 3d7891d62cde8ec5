"""What is drawn on a canvas can be read: every text lies inside the figure, and none on another."""

import numpy as np
import pytest
from conftest import randomize
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import repvgg, with_bn
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import Member
from repvgg.models.repvgg import RepVGG
from repvgg.paper import figure2, figure4
from repvgg.web.drawing import canvas, wire, write


def illegible(figure: Figure) -> list[str]:
    """Texts that leave the figure or touch another one."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = figure.axes[0].texts
    left, low, right, high = np.array([text.get_window_extent(renderer).padded(-1).extents for text in texts]).T
    width, height = figure.get_size_inches() * figure.dpi
    outside = (left < 0) | (low < 0) | (right > width) | (high > height)
    touching = (left[:, None] < right) & (left < right[:, None]) & (low[:, None] < high) & (low < high[:, None])
    bad = outside | (touching.sum(0) > 1)  # each touches itself
    return [text.get_text() for text, is_bad in zip(texts, bad, strict=True) if is_bad]


@pytest.mark.parametrize(
    ("member", "arguments"),
    [
        (Member((1, 2, 5, 1), 0.25, 0.25), {}),
        (Member((1, 2, 1, 1), 2, 0.25), {"block": "plain"}),
        (Member((1, 2, 4, 1), 0.25, 0.25, groups=4), {"output_stride": 8}),
        (Member((1, 1, 1, 1), 0.25, 0.25, squeeze_excite=True), {"block": "no_1x1"}),
    ],
)
def test_figure2_is_legible(member: Member, arguments: dict[str, object]) -> None:
    model = RepVGG(member, 10, **arguments).eval()  # type: ignore[arg-type]
    deploy = reparameterize(model)
    assert isinstance(deploy, RepVGG)
    assert not illegible(figure2.draw(model, deploy))


@pytest.mark.parametrize(
    "block",
    [
        repvgg(1, 1),
        repvgg(2, 2),
        repvgg(4, 3, stride=2),
        Branches(conv=with_bn(nn.Conv2d(2, 2, 5, padding=2)), small=nn.Conv2d(2, 2, 3, padding=1)),
    ],
    ids=["one_channel", "two_channels", "four_channels", "large_kernel"],
)
def test_figure4_is_legible(block: Branches) -> None:
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    assert not illegible(figure4.draw(randomize(block, (8, channels, 8, 8))))


def test_the_check_sees_what_is_not_legible() -> None:
    figure, axes = canvas(300, 100)
    for x, word in ((150, "first"), (160, "second"), (50, "fine"), (295, "outside")):
        write(axes, x, 50, word)
    assert illegible(figure) == ["first", "second", "outside"]


def test_a_wire_ends_where_it_should() -> None:
    _, axes = canvas(200, 100)
    wire(axes, [(10, 10), (50, 10), (50, 90), (190, 90)], head=True)
    line, head = (np.asarray(patch.get_path().vertices) for patch in axes.patches)
    assert line[0].tolist() == [10, 10]
    assert head[0].tolist() == [190, 90]
    assert line[:, 0].max() < 190
