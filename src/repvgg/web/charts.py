"""Charts of a run, each small enough to be read on a telephone: curves by epoch, and a confusion matrix as a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repvgg.train.logs import top_of
from repvgg.web.drawing import IDENTITY, INK, MUTED, PAPER, POINT, POINTWISE, RULE, WIDEST, plot

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 420, 280  # pixels; on a telephone they are shown at three quarters, which just fit
TEXT = 13 * POINT
LINES = (WIDEST[1], POINTWISE[1], IDENTITY[1], "#8a5a9c", "#a33b3b", INK, MUTED)
MOST_NUMBERS, MOST_NAMES = 20, 60  # classes whose cells are numbered; whose names are written
TOO_LONG = 10_000  # counts from here on are written as shares
SHADES = LinearSegmentedColormap.from_list("shades", [PAPER, "#a9c6e6", WIDEST[1], "#173a61"])


def curves(title: str, lines: Mapping[str, Points], best: tuple[float, float] | None = None, level: bool = False) -> Figure:
    """Draw lines by epoch, each of them named; the best point is marked.

    level: the axis begins at zero, and few values that are far above the others leave the chart, with a word. Lines without points
    are left out.
    """
    figure, axes = chart(title)
    shown = {name: points for name, points in lines.items() if points}
    for (name, points), colour in zip(shown.items(), _colours(list(shown)), strict=True):
        axes.plot(
            *zip(*points, strict=True), color=colour, label=_legible(name), marker="." if len(points) < 30 else None, linewidth=1.6
        )
    if best is not None:
        axes.plot(*best, "o", color=IDENTITY[1], markersize=7, label=f"best: {best[1]:.4g} in epoch {best[0]:g}", zorder=4)
    if level:
        _level(axes, [y for points in shown.values() for _, y in points])
    if len(shown) + (best is not None) > 1:
        for text in axes.legend(frameon=False, fontsize=TEXT * 0.92, loc="best").get_texts():
            text.set_parse_math(False)
    axes.set_xlabel("epoch", fontsize=TEXT, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _legible(name: str) -> str:
    """Return a name that matplotlib shows in a legend: it leaves out those that begin with "_"."""
    return f"./{name}" if name.startswith("_") else name


def confusion(counts: Any, classes: Sequence[str], measured: str) -> Figure:
    """Draw a confusion matrix: rows the true class, columns the predicted one, each row shaded by its shares.

    counts: [classes, classes]. Up to 20 classes have their counts (shares where counts are long)
    written in the cells, up to 60 their names beside them. measured:
    the title.
    """
    counts = np.asarray(counts)
    size = len(classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named, numbered = size <= MOST_NAMES, size <= MOST_NUMBERS
    cell = 36 if numbered else min(16, 600 / size)
    as_shares = numbered and counts.max() >= TOO_LONG
    margin = 8 * max(map(len, classes)) if named else 20
    side = max(230.0, size * cell)
    figure, (axes,) = plot(side + margin + 50, side + margin + 70)
    axes.imshow(shares**0.5, cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")  # so that few mistakes are seen too
    axes.set_title(f"{measured}, % of each row" if as_shares else measured, fontsize=TEXT, color=INK, loc="left")
    axes.set_xlabel("predicted", fontsize=TEXT, color=INK)
    axes.set_ylabel("true", fontsize=TEXT, color=INK)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    ticks = range(size) if named else ()
    axes.set_xticks(ticks, classes if named else (), rotation=90 if max(map(len, classes)) > 2 else 0, parse_math=False)
    axes.set_yticks(ticks, classes if named else (), parse_math=False)
    axes.tick_params(labelsize=TEXT if numbered else TEXT * 0.75)
    if numbered:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = PAPER if shares[i, j] > 0.2 else INK
                text = f"{100 * shares[i, j]:.0f}" if as_shares else f"{count:,}"
                axes.text(j, i, text, ha="center", va="center", fontsize=TEXT * 0.9, color=colour)
    return figure


def chart(title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return a small figure with one axes and its title."""
    figure, (axes,) = plot(WIDTH, height)
    axes.set_title(title, fontsize=TEXT * 1.08, color=INK, loc="left")
    axes.tick_params(labelsize=TEXT)
    axes.grid(color=RULE, linewidth=0.4, axis="y")
    axes.set_axisbelow(True)
    return figure, axes


def _colours(names: list[str]) -> list[str]:
    """Return grey for training, and colours that are easily told apart for all else."""
    others = [name for name in names if name != "training"]
    return [MUTED if name == "training" else LINES[others.index(name) % len(LINES)] for name in names]


def _level(axes: Axes, values: Sequence[float]) -> None:
    top, highest = top_of(values), max(values, default=0.0)
    if top < highest:
        axes.set_title(f"{axes.get_title('left')}   (highest: {highest:.3g})", fontsize=TEXT * 1.08, color=INK, loc="left")
    axes.set_ylim(0, top * 1.05 or 1)
