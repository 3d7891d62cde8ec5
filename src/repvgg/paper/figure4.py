# ruff: noqa: RUF001  (the symbols are those of the paper)
"""Figure 4: a trained block of a few channels becomes one convolution in three steps; every number comes from the algebra."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from repvgg.bench.models import randomise_norms
from repvgg.fold.algebra import LinearMap, Pair, regroup, widen
from repvgg.fold.as_linear import Branches, as_linear
from repvgg.fold.blocks import repvgg
from repvgg.paper.result import PaperSettings, Result
from repvgg.web.drawing import IDENTITY, INK, MUTED, PAPER, POINT, POINTWISE, RULE, WIDEST, box, canvas, plus, wire, write

CHANNELS = 4  # beyond these the numbers cannot be read
CELL, SLIT, VECTOR, ARROW, ROW, LABEL, MARGIN, TOP = 32, 6, 38, 56, 26, 46, 20, 104
HEADING = 224  # a column is as wide as what stands above it
# Steeper about zero, where most weights are; blue and orange are told apart by every kind of eye.
HEAT = LinearSegmentedColormap.from_list(
    "heat",
    [(0, "#174d84"), (0.22, "#5d97cb"), (0.4, "#bcd6ec"), (0.5, "#f8f8f6"), (0.6, "#f8d5ac"), (0.78, "#e08f45"), (1, "#9c430a")],
)


@dataclass(frozen=True, eq=False)
class Branch:
    """One branch through the first two steps; every map in float64."""

    kernel: LinearMap  # as trained, before its batch norm
    norm: LinearMap | None
    folded: LinearMap  # step 1: batch norm into the kernel
    padded: LinearMap  # step 2: the kernel size and groups of the whole block


@dataclass(frozen=True, eq=False)
class Steps:
    """The branches in their order, and step 3: their sum."""

    branches: tuple[Branch, ...]
    total: LinearMap


def run(settings: PaperSettings) -> Result:
    torch.manual_seed(0)
    block = randomise_norms(repvgg(2, 2), (8, 2, 8, 8))
    assert isinstance(block, Branches)
    x = torch.randn(8, 2, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        wanted, got = copy.deepcopy(block).double()(x), steps(block).total(x)
    error = float((got - wanted).abs().max() / wanted.abs().max())
    return Result(
        "Figure 4: three branches become one convolution",
        [],
        "The paper draws the fold of a block of two channels with shades for numbers. This is such a block of ours with "
        "random weights and batch norm statistics, and the numbers are the ones that the fold computes, in float64. The "
        f"convolution on the right gives what the three branches give, to {error:.0e} of the largest output.",
        {"channels": 2, "max_rel_err": error},
        {"figure4": draw(block)},
    )


@torch.no_grad()
def steps(block: Branches) -> Steps:
    """Take `block` through the three steps of section 3.3.

    Raises `ReparamError` where it cannot be folded, `ValueError` where it is not a sum of branches.
    """
    if type(block) is not Branches:
        raise ValueError(
            f"figure 4 shows the branches of a block, and {type(block).__name__} is none: a Layer holds its own in .block"
        )
    total = as_linear(block)
    return Steps(tuple(_branch(child, total) for child in block.children()), total)


def _branch(module: nn.Module, total: LinearMap) -> Branch:
    parts = list(module.children()) if type(module) is nn.Sequential else [module]
    norm = parts.pop() if parts and isinstance(parts[-1], nn.BatchNorm2d | nn.SyncBatchNorm) else None
    folded = as_linear(module, total.in_channels)
    return Branch(
        kernel=as_linear(nn.Sequential(*parts).eval(), total.in_channels),
        norm=None if norm is None else as_linear(norm),
        folded=folded,
        padded=regroup(widen(folded, total.kernel_size, total.dilation), total.groups),
    )


def draw(block: Branches) -> Figure:
    """Draw `block` (eval mode, at most 4 channels in and out) through the three steps, its kernels as heat maps.

    All share one colour scale. A row for each branch; in each kernel output channels run from top to bottom, input channels from
    left to right.
    Raises `ValueError` for more channels, `ReparamError` where the block cannot be folded.
    """
    s = steps(block)
    channels = max(s.total.in_channels, s.total.out_channels)
    if channels > CHANNELS:
        raise ValueError(f"figure 4 writes out every number: draw a block of at most {CHANNELS} channels, not {channels}")
    tile = Tile.of(s)
    trained = [_as_trained(branch) for branch in s.branches]
    names = [name for name in ("bias", "scale", "shift") if any(name in beside for beside in trained)]

    widths = [max(tile.width + vectors * VECTOR, HEADING) for vectors in (len(names), 1, 1, 1)]
    lefts = [MARGIN + LABEL + sum(widths[:column]) + column * ARROW for column in range(4)]
    middles = [TOP + tile.height / 2 + row * (tile.height + ROW) for row in range(len(trained))]
    middle = sum(middles) / len(middles)
    bottom = max(middles[-1] + tile.height / 2, middle + tile.height / 2 + 64)
    figure, axes = canvas(lefts[3] + widths[3] + MARGIN, bottom + MARGIN)

    size = "×".join(map(str, s.total.kernel_size))
    _heading(axes, lefts[0], "As trained", "batch norm: scale γ/σ, shift β − μγ/σ" if "scale" in names else "no batch norm")
    how = "both × scale, bias + shift" if "bias" in names else "kernel × scale; the shift is its bias"
    _heading(axes, lefts[1], "1  Batch norm into the kernel", how)
    _heading(axes, lefts[2], f"2  Pad to {size}", "zeros around the smaller kernels")
    _heading(axes, lefts[3], "3  Add", f"one {size} convolution with bias")
    tile.legend(axes, lefts[0], middles[0], names)
    for x, y in ((lefts[1], middles[0]), (lefts[2], middles[0]), (lefts[3], middle)):
        tile.legend(axes, x, y, ["bias"])
    for y, branch, beside in zip(middles, s.branches, trained, strict=True):
        _name(axes, MARGIN, y, tile.height, branch.kernel)
        tile.outputs_legend(axes, lefts[0], y)
        tile.kernel(axes, lefts[0], y, branch.kernel)
        for position, name in enumerate(names):
            if name in beside:
                tile.vector(axes, lefts[0], y, position, beside[name], heat=name == "bias")
        tile.map(axes, lefts[1], y, branch.folded)
        tile.map(axes, lefts[2], y, branch.padded, inner=branch.folded.kernel_size)
        for x in lefts[1:3]:
            wire(axes, [(x - ARROW + 12, y), (x - 12, y)], head=True)
    tile.map(axes, lefts[3], middle, s.total)
    _sum(axes, lefts[3] - ARROW + 8, lefts[3] - 8, middles, middle)
    _scale(axes, lefts[3], middle + tile.height / 2 + 40, tile.width, tile.limit)
    return figure


def _as_trained(branch: Branch) -> dict[str, Tensor]:
    """Return the numbers of each output channel, by name, that stand beside the kernel as it was trained."""
    vectors = {"bias": branch.kernel.bias} if bool((branch.kernel.bias != 0).any()) else {}
    if branch.norm is not None:
        vectors |= {"scale": branch.norm.kernel.flatten(), "shift": branch.norm.bias}
    return vectors


@dataclass(frozen=True)
class Tile:
    """The layout of a drawn kernel: for each pair of channels a slot of the block's kernel size, smaller kernels in its middle."""

    inputs: int
    outputs: int
    rows: int
    columns: int
    limit: float  # the end of the colour scale

    @classmethod
    def of(cls, s: Steps) -> "Tile":
        maps = [s.total, *(m for b in s.branches for m in (b.kernel, b.folded))]
        limit = max(float(values.abs().max()) for m in maps for values in (m.kernel, m.bias))
        return cls(s.total.in_channels, s.total.out_channels, *s.total.kernel_size, limit or 1.0)

    @property
    def width(self) -> float:
        """The width of the kernel in pixels; each vector beside it adds VECTOR."""
        return self.inputs * (self.columns * CELL + SLIT) - SLIT

    @property
    def height(self) -> float:
        return self.outputs * (self.rows * CELL + SLIT) - SLIT

    def across(self, left: float, channel: float) -> float:
        return left + (channel + 0.5) * self.columns * CELL + channel * SLIT

    def beside(self, left: float, position: int) -> float:
        return left + self.width + (position + 0.5) * VECTOR + 4

    def down(self, middle: float, channel: float) -> float:
        return middle - self.height / 2 + (channel + 0.5) * self.rows * CELL + channel * SLIT

    def map(self, axes: Axes, left: float, middle: float, m: LinearMap, inner: Pair | None = None) -> None:
        """Draw kernel and bias of `m`."""
        self.kernel(axes, left, middle, m, inner)
        self.vector(axes, left, middle, 0, m.bias)

    def kernel(self, axes: Axes, left: float, middle: float, m: LinearMap, inner: Pair | None = None) -> None:
        """Draw the kernel of `m`; what lies outside its `inner` part is padding."""
        kernel = regroup(m, 1).kernel
        height, width = inner or m.kernel_size
        rows, columns = m.kernel_size
        for o, i, r, c in product(range(self.outputs), range(self.inputs), range(rows), range(columns)):
            dy, dx = r - (rows - 1) / 2, c - (columns - 1) / 2
            padding = abs(dy) > (height - 1) / 2 or abs(dx) > (width - 1) / 2
            x, y = self.across(left, i) + dx * CELL, self.down(middle, o) + dy * CELL
            _cell(axes, x, y, CELL, CELL, float(kernel[o, i, r, c]), None if padding else self.limit)

    def vector(self, axes: Axes, left: float, middle: float, position: int, values: Tensor, heat: bool = True) -> None:
        """Draw a number for each output channel in the `position`-th column beside the kernel."""
        x = self.beside(left, position)
        for o in range(self.outputs):
            _cell(axes, x, self.down(middle, o), VECTOR - 6, CELL - 4, float(values[o]), self.limit if heat else None)

    def legend(self, axes: Axes, left: float, middle: float, names: Sequence[str]) -> None:
        """Write the names of the input channels and of the vectors above."""
        y = middle - self.height / 2 - 11
        for i in range(self.inputs):
            write(axes, self.across(left, i), y, f"in {i + 1}", 11, MUTED)
        for position, name in enumerate(names):
            write(axes, self.beside(left, position), y, name, 11, MUTED)

    def outputs_legend(self, axes: Axes, left: float, middle: float) -> None:
        """Write the names of the output channels on the left."""
        for o in range(self.outputs):
            write(axes, left - 10, self.down(middle, o), f"out {o + 1}", 11, MUTED, rotation=90, va="center")


def _cell(axes: Axes, x: float, y: float, width: float, height: float, value: float, limit: float | None) -> None:
    """Draw one number on its colour, or on none where there is no `limit`."""
    fill = to_hex(HEAT(0.5 + 0.5 * value / limit)) if limit else PAPER
    edge = PAPER if limit else "#dfe3e8"
    axes.add_patch(
        Rectangle((x - width / 2, y - height / 2), width, height, facecolor=fill, edgecolor=edge, linewidth=POINT, clip_on=False)
    )
    colour = RULE if value == 0 else PAPER if limit and abs(value) > 0.7 * limit else INK
    write(axes, x, y, number(value), 11, colour)


def number(value: float) -> str:
    """Write a number that fits a cell: two digits after the point, one from 1 on, none from 10 on, no leading zero."""
    size = abs(value)
    if value and size < 0.005:
        return ".00"
    digits = 2 if size < 0.995 else 1 if size < 9.95 else 0
    text = f"{size:.{digits}f}" if size < 999.5 else f"{size:.0e}".replace("e+0", "e")
    return ("−" if value < 0 else "") + ("0" if value == 0 else text.removeprefix("0"))


def _heading(axes: Axes, x: float, title: str, what: str) -> None:
    write(axes, x, 28, title, 15, align="left", weight="bold")
    write(axes, x, 52, what, 12, MUTED, "left")


def _name(axes: Axes, x: float, y: float, height: float, kernel: LinearMap) -> None:
    """Label a row with its kind of branch."""
    rows, columns = kernel.kernel_size
    name, colours = f"{rows}×{columns}", POINTWISE if kernel.pointwise else WIDEST
    if kernel.scales_channels and bool((kernel.kernel == 1).all()):
        name, colours = "identity", IDENTITY
    box(axes, x + 12, y, 24, height, colours)
    write(axes, x + 12, y, name, 13, rotation=90, va="center")


def _sum(axes: Axes, left: float, right: float, middles: Sequence[float], middle: float) -> None:
    """Draw the wires from every row into one."""
    x = left + 16
    for y in middles:
        wire(axes, [(left, y), (x, y), (x, middle)])
    wire(axes, [(x, middle), (right, middle)], head=True)
    if len(middles) > 1:
        plus(axes, x, middle)


def _scale(axes: Axes, left: float, y: float, width: float, limit: float) -> None:
    """Draw the colour scale, with its ends and its middle."""
    step = width / 60
    for k in range(60):
        colour = HEAT((k + 0.5) / 60)
        axes.add_patch(Rectangle((left + k * step, y - 5), step, 10, facecolor=colour, edgecolor=colour, linewidth=0.3))
    for part, align in ((0.0, "left"), (0.5, "center"), (1.0, "right")):
        write(axes, left + part * width, y + 17, number((2 * part - 1) * limit), 11, MUTED, align)
