"""Error on noise, where it is largest, against speed of the native engine's algorithms: results/engine.png, of engine.json."""

from pathlib import Path
from typing import Any

from repvgg.web.drawing import INK, MUTED, POINTWISE, RULE, WIDEST, plot


def draw(figures: dict[str, Any]) -> None:
    """Draw error against speed, as engine.png."""
    figure, panels = plot(900, 400, 2)
    top = max(f["images_per_second"] for name, f in figures.items() if name.startswith(("fp32", "bf16")))
    for axes, precision, (_, colour) in zip(panels, ("fp32", "bf16"), (WIDEST, POINTWISE), strict=True):
        points = {n.split()[1]: f for n, f in figures.items() if n.startswith(precision)}
        speeds = [f["images_per_second"] for f in points.values()]
        errors = [f["rms_error"]["noise"] for f in points.values()]
        axes.plot(errors, speeds, marker="o", color=colour)
        for name, x, y in zip(points, errors, speeds, strict=True):
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, -9), fontsize=9, color=INK)
        axes.set(xscale="log", ylim=(0, 1.08 * top))
        axes.margins(x=0.15)
        axes.grid(color=RULE, linewidth=0.4, axis="y")
        axes.set_title(f"{precision}: A0, images a second, batch 32", fontsize=11, color=INK, loc="left")
        axes.set_xlabel("error of the logits on noise, relative to their deviation", fontsize=9, color=MUTED)
    figure.savefig(Path(__file__).with_name("engine.png"), dpi=200)
