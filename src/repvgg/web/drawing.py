"""A sheet to draw on, measured in pixels from its top left corner, axes for data, and the look that the figures share."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch
from matplotlib.path import Path

INK, MUTED, RULE, PANEL, PAPER = "#1d2530", "#667080", "#aab2bd", "#f4f6f8", "#ffffff"

# Fill and edge of a branch by its kernel: told apart by lightness too, and labelled wherever they are used.
Colours = tuple[str, str]
NEUTRAL: Colours = (PAPER, RULE)
WIDEST: Colours = ("#dbe8f6", "#2f6cab")
POINTWISE: Colours = ("#fdebcd", "#bd7a10")
IDENTITY: Colours = ("#dcf0e6", "#2e8564")

DPI = 100
POINT = 72 / DPI  # points in a pixel
Point = tuple[float, float]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a white figure of `width` x `height` pixels and its one axes, whose units are those pixels, y downwards."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def plot(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a white figure of `width` x `height` pixels with axes side by side for data."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER, layout="constrained")
    found = figure.subplots(1, columns, squeeze=False)[0]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(color=RULE, labelcolor=INK, labelsize=11 * POINT * 1.15)
    return figure, list(found)


def write(
    axes: Axes, x: float, y: float, text: str, size: float = 13, color: str = INK, align: str = "center", **more: Any
) -> None:
    """Write `text` at a height of `size` pixels, centred on y."""
    axes.text(x, y, text, **{"fontsize": size * POINT, "color": color, "ha": align, "va": "center_baseline", **more})


def box(axes: Axes, x: float, y: float, width: float, height: float, colours: Colours, radius: float = 6, **more: Any) -> None:
    """Draw a rounded box of that size centred on (x, y)."""
    fill, edge = colours
    style = f"round,pad=0,rounding_size={radius}"
    corner = x - width / 2, y - height / 2
    more = {"linewidth": 1.3 * POINT, "zorder": 3, "clip_on": False, **more}
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=fill, edgecolor=edge, **more))


def wire(axes: Axes, points: Sequence[Point], head: bool = False, color: str = MUTED, radius: float = 8, **more: Any) -> None:
    """Draw a line through `points` with rounded corners; with an arrow head where `head`, its tip on the last of them."""
    vertices, codes = [points[0]], [Path.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        vertices += [_towards(corner, before, radius), corner, _towards(corner, after, radius)]
        codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
    end = _towards(points[-1], points[-2], 4) if head else points[-1]
    line = Path([*vertices, end], [*codes, Path.LINETO])
    more = {"linewidth": 1.4 * POINT, "zorder": 2, "snap": True, "clip_on": False, **more}
    axes.add_patch(PathPatch(line, facecolor="none", edgecolor=color, capstyle="butt", **more))
    if head:
        back, (x, y) = _towards(points[-1], points[-2], 7), points[-1]
        across = (y - back[1]) * 0.5, (x - back[0]) * 0.5
        tip = Path([(x, y), (back[0] - across[0], back[1] + across[1]), (back[0] + across[0], back[1] - across[1]), (x, y)])
        axes.add_patch(PathPatch(tip, facecolor=color, edgecolor="none", zorder=2))


def dot(axes: Axes, x: float, y: float) -> None:
    """Mark where a wire splits."""
    axes.add_patch(Circle((x, y), 2.6, facecolor=MUTED, edgecolor="none", zorder=3))


def plus(axes: Axes, x: float, y: float, radius: float = 9) -> None:
    """Mark where wires are added."""
    axes.add_patch(Circle((x, y), radius, facecolor=PAPER, edgecolor=MUTED, linewidth=1.4 * POINT, zorder=3))
    arm = radius * 0.5
    for points in ([(x - arm, y), (x + arm, y)], [(x, y - arm), (x, y + arm)]):
        wire(axes, points, color=INK, zorder=4)


def _towards(start: Point, end: Point, distance: float) -> Point:
    """Return the point `distance` from `start` on the way to `end`, at most half way."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = (dx * dx + dy * dy) ** 0.5
    part = min(distance / length, 0.5) if length else 0.0
    return start[0] + dx * part, start[1] + dy * part
