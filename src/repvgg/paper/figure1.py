"""Figure 1: top-1 accuracy against speed over ResNet-18's, the paper's and this machine's."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from repvgg.paper.numbers import TABLE4, TABLE5, ModelSpeed
from repvgg.paper.result import PaperSettings, Result, Table, interval
from repvgg.paper.speeds import chosen
from repvgg.paper.table4 import measure_models, printed_ratio, protocol
from repvgg.web.drawing import IDENTITY, INK, MUTED, POINTWISE, RULE, WIDEST, plot

# Colour, marker and the short name's beginning, by the beginning of a model's printed name.
KINDS = {
    "RepVGG-": (WIDEST[1], "o", ""),
    "ResNet-": (POINTWISE[1], "s", "R"),
    "ResNeXt-": ("#8a5a9c", "D", "X"),
    "RegNetX-": ("#5c6675", "^", "Reg "),
    "EfficientNet-": (IDENTITY[1], "v", "Eff "),
    "VGG-": ("#a33b3b", "P", "VGG-"),
}
HEADROOM = 1.35  # to the right of the fastest


def run(settings: PaperSettings) -> Result:
    rows = chosen((*TABLE4, *TABLE5), settings)
    speeds = measure_models(list(dict.fromkeys(row.model for row in rows)), settings)
    here = [speeds[row.model] for row in rows]
    header = ("model", "epochs", "top-1, %", "speed over ResNet-18, paper", "here (95% interval)", "in the engine")
    cells = [
        (row.printed, _epochs(row), f"{row.top1:.2f}", f"{printed_ratio(row):.2f}x", speed.ratio, speed.engine)
        for row, speed in zip(rows, here, strict=True)
    ]
    return Result(
        "Figure 1: accuracy against speed",
        [Table("The points", header, cells, folded=True)],
        "Up and to the right is better. Left, the paper's speeds; right, this machine's; both over that of ResNet-18, with which "
        "each model took turns. Hollow points are Table 5's, trained for 200 epochs with stronger augmentation, so they stand "
        "higher for reasons other than their structure.",
        {
            "points": [
                {
                    "model": row.model,
                    "top1": row.top1,
                    "paper": printed_ratio(row),
                    "here": interval(speed.ratio),
                    "engine": speed.engine,
                    "epochs": int(_epochs(row)),
                    "speed": asdict(speed),
                }
                for row, speed in zip(rows, here, strict=True)
            ]
        },
        {"figure1": draw(rows, [speed.ratio.value for speed in here], [speed.engine for speed in here])},
        protocol(speeds, settings),
    )


def draw(rows: Sequence[ModelSpeed], here: Sequence[float], engines: Sequence[str]) -> Figure:
    """Draw both scatter plots; `here` holds speeds over ResNet-18's, and `engines` what ran them, in the order of `rows`."""
    figure, panels = plot(1150, 520, 2)
    both = [printed_ratio(row) for row in rows], here
    for axes, title, speeds in zip(panels, ("paper: GTX 1080Ti", f"this machine: {_in(engines)}"), both, strict=True):
        _scatter(axes, rows, speeds)
        axes.set_title(title, fontsize=11, color=INK, loc="left")
        axes.set_xlabel("speed over ResNet-18's", fontsize=9, color=MUTED)
    panels[0].set_ylabel("top-1 on ImageNet, % (paper's)", fontsize=9, color=MUTED)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=9)
    for axes, speeds in zip(panels, both, strict=True):
        _label(axes, [(s, row.top1, _short(row.printed)) for s, row in zip(speeds, rows, strict=True)])
    return figure


def _epochs(row: ModelSpeed) -> str:
    return "200" if row in TABLE5 else "120"


def _in(engines: Sequence[str]) -> str:
    """Name the engine; of several, on a line of their own, the commonest first, how many models each is the fastest for."""
    counted = Counter(engines).most_common()
    return counted[0][0] if len(counted) == 1 else "fastest in\n" + ", ".join(f"{name} ({count})" for name, count in counted)


def _scatter(axes: Axes, rows: Sequence[ModelSpeed], speeds: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set(
        xlim=(min(speeds) / HEADROOM, max(speeds) * HEADROOM), ylim=(min(r.top1 for r in rows) - 1, max(r.top1 for r in rows) + 1)
    )
    axes.grid(color=RULE, linewidth=0.4, which="major")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(NullLocator())
    for kind, (colour, marker, _) in KINDS.items():
        for table, fill, label in ((TABLE4, colour, kind.rstrip("-")), (TABLE5, "white", None)):
            points = [(s, row.top1) for s, row in zip(speeds, rows, strict=True) if row in table and row.printed.startswith(kind)]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, markerfacecolor=fill, markersize=7, label=label)


def _short(printed: str) -> str:
    """Shorten a name for the plot: "A0", "R50", "X101", "Reg 3.2GF", "Eff B0", "VGG-16"."""
    kind = next(kind for kind in KINDS if printed.startswith(kind))
    return KINDS[kind][2] + printed.removeprefix(kind)


# Where a name may stand beside its point, in points of 1/72 inch, the better places first; and how it is aligned there.
PLACES: tuple[tuple[float, float, str, str], ...] = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (6, 6, "left", "bottom"),
    (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"),
    (-6, -6, "right", "top"),
)


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name beside each point, where it covers no other point or name; the first place where there is no such place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer: Any = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # constrained layout settles where things are
    spots = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in spots]
    for number, (x, y, name) in enumerate(points):
        tried = []
        for dx, dy, ha, va in PLACES:
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=8, color=INK)
            box = text.get_window_extent(renderer)
            hits = sum(box.overlaps(other) for i, other in enumerate(taken) if i != number)
            tried.append((hits, text, box))
            if not hits:
                break
        best = min(tried, key=lambda t: t[0])
        for _, text, _ in tried:
            if text is not best[1]:
                text.remove()
        taken.append(best[2])
