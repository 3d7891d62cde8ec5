"""Figure 3: memory at the peak of a residual and a plain stack, counted operator by operator and measured."""

from dataclasses import dataclass
from typing import Any

import torch

from repvgg.bench.memory import STACKS, resident_growth, stack
from repvgg.measure.costs import Cost, cost, measure_peak_activation
from repvgg.paper.numbers import PEAK_ACTIVATION
from repvgg.paper.result import PaperSettings, Result, Table
from repvgg.web.drawing import INK, MUTED, POINTWISE, RULE, WIDEST, plot

CHANNELS, SIZE = 64, 512
MAP = CHANNELS * SIZE * SIZE * 4  # bytes of one feature map
NAMES = {"convolution": "conv", "relu": "ReLU", "add": "add"}
COLOURS = {"residual": POINTWISE, "plain": WIDEST}


@dataclass(frozen=True)
class Measured:
    """One stack. counted: its costs; peak: bytes of activations at the peak of a real run; resident: growth of a process."""

    counted: Cost
    peak: int
    resident: int | None


def run(settings: PaperSettings) -> Result:
    found = {kind: _measure(kind, settings.device) for kind in STACKS}
    cuda = settings.device.startswith("cuda")
    how = "CUDA's allocator" if cuda else "tensors alive in a real run"
    header = (
        "stack",
        "kept between operators, paper",
        "counted",
        "while one runs, counted",
        f"measured: {how}",
        "measured: growth of a process",
    )
    rows = [
        (
            kind,
            f"{PEAK_ACTIVATION[kind]}x",
            _maps(m.counted.peak_activation_bytes),
            _maps(m.counted.peak_working_bytes),
            _maps(m.peak),
            "-" if m.resident is None else _maps(m.resident),
        )
        for kind, m in found.items()
    ]
    return Result(
        "Figure 3: memory at the peak",
        [Table("Peak memory of activations, in feature maps", header, rows)],
        f"Two stacks of four 3x3 convolutions with {CHANNELS} channels on {SIZE} x {SIZE} maps, {MAP / 2**20:.0f} MiB each. A "
        "residual block must keep its input until the addition, so two maps where a plain layer keeps one: the paper's "
        "figure, and what our count of each tensor's first and last use gives. A real run needs one map more in both, the "
        "one that an operator writes beside the one it reads: 3 and 2. (An engine that writes a ReLU or an addition in place "
        "saves part of it.) "
        + (
            "CUDA's allocator also holds the convolutions' workspaces, and rounds up."
            if cuda
            else "The growth of resident memory is that of a fresh process as the operating system sees it, with whatever the "
            "convolution library needs inside. The small remainder is the image, of one channel."
        ),
        {
            "feature_map_bytes": MAP,
            "stacks": {
                kind: {
                    "kept_bytes": m.counted.peak_activation_bytes,
                    "working_bytes": m.counted.peak_working_bytes,
                    "measured_bytes": m.peak,
                    "resident_growth_bytes": m.resident,
                }
                for kind, m in found.items()
            },
        },
        {"figure3": draw({kind: m.counted for kind, m in found.items()})},
    )


def _measure(kind: str, device: str) -> Measured:
    model = stack(kind, CHANNELS)
    counted = cost(model, (1, SIZE, SIZE))
    peak = measure_peak_activation(model.to(device), torch.randn(1, 1, SIZE, SIZE, device=device))
    return Measured(counted, peak, None if device.startswith("cuda") else resident_growth(kind, CHANNELS, SIZE))


def _maps(size: int) -> str:
    return f"{size / MAP:.2f}x"


def draw(counted: dict[str, Cost]) -> Any:
    """Draw how many feature maps are alive during and after each operator."""
    figure, panels = plot(900, 290, len(counted))
    for axes, (kind, c) in zip(panels, counted.items(), strict=True):
        layers = c.layers[1:]  # after the stem
        fill, edge = COLOURS[kind]
        steps = range(len(layers))
        axes.bar(steps, [m.working_bytes / MAP for m in layers], 0.8, color=fill, label="while it runs")
        axes.bar(steps, [m.kept_bytes / MAP for m in layers], 0.8, color=edge, label="kept after it")
        axes.set_xticks(steps, [NAMES.get(m.operator, m.operator) for m in layers], fontsize=8)
        axes.set(ylim=(0, 3.9), yticks=range(4), yticklabels=[f"{n}x" for n in range(4)])
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_title(
            f"{kind}: keeps {max(m.kept_bytes for m in layers) / MAP:.0f}x its input", fontsize=11, color=INK, loc="left"
        )
        axes.legend(frameon=False, fontsize=8, labelcolor=MUTED, loc="upper right", ncols=2)
    return figure
