"""Figure 2: a stretch of the network in training form, and the same layers in deploy form, read from a real model."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from repvgg.bench.models import randomise_norms
from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import Branches, Chain, as_conv, as_linear
from repvgg.fold.blocks import DerivedConv
from repvgg.fold.proof import verify
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.costs import cost
from repvgg.models import zoo
from repvgg.models.repvgg import Layer, RepVGG
from repvgg.paper.numbers import FRAGMENTS
from repvgg.paper.result import PaperSettings, Result, Table
from repvgg.web.drawing import IDENTITY, MUTED, NEUTRAL, PANEL, POINTWISE, WIDEST, Colours, box, canvas, dot, plus, wire, write

MODEL = "repvgg_a0"
LAYERS = 4  # as many as the paper shows
MARGIN, STUB, GAP, PAD, SUM = 20, 30, 12, 14, 20
HEADING = 640  # at least so wide, for the words
LANE, CHIP = 52, 38  # heights: of a branch, of an operator in it
FOLD_ROOM, REFUSAL_ROOM = 120, 360  # for the words beside one block


@dataclass(frozen=True)
class DrawnOperator:
    """One box: what it is, what is unusual about its geometry, and its look."""

    name: str
    note: str = ""
    colours: Colours = NEUTRAL
    width: int = 38


IDENTITY_BOX = DrawnOperator("identity", colours=IDENTITY, width=76)


def run(settings: PaperSettings) -> Result:
    torch.manual_seed(0)
    model = randomise_norms(zoo.create_model(MODEL))
    deploy = reparameterize(model)
    assert isinstance(model, RepVGG)
    assert isinstance(deploy, RepVGG)
    proof = verify(model, deploy, (3, 64, 64))
    return Result(
        "Figure 2: one network in two forms",
        [_fragments(deploy)],
        f"Drawn from the modules of our {MODEL}, with random weights and batch norm statistics, and of what reparameterize "
        "made of it. The paper draws the same blocks, and beside them a ResNet's. The two forms give the same logits: "
        f"{proof}.",
        {"model": MODEL, "max_rel_err": proof.max_rel_err, "parameters": {"training": count(model), "deploy": count(deploy)}},
        {"figure2": draw(model, deploy)},
    )


def _fragments(deploy: RepVGG) -> Table:
    """Count the convolutions and pools of one block, beside the paper's counts (section 3.1)."""
    blocks = {"ResNet-18": ("resnet18", "layer1.1"), "ResNet-50": ("resnet50", "layer1.1")}
    counts = {}
    for name, (model, path) in blocks.items():
        with suppress(ValueError), torch.device("meta"):  # without timm there is no ResNet
            counts[name] = sum(layer.fragment for layer in cost(zoo.create_model(model), (3, 64, 64)).inside(path))
    counts["RepVGG, deploy form"] = sum(layer.fragment for layer in cost(deploy, (3, 64, 64)).inside("stem.block"))
    printed = {
        "ResNet-18": FRAGMENTS["ResNet"][0],
        "ResNet-50": FRAGMENTS["ResNet"][1],
        "RepVGG, deploy form": FRAGMENTS["RepVGG"][0],
    }
    rows = [("NASNet-A", FRAGMENTS["NASNet-A"][0], None), *((name, printed[name], found) for name, found in counts.items())]
    return Table("Convolutions and pools in one block (section 3.1)", ("network", "paper", "counted here"), rows)


def count(model: nn.Module) -> int:
    """Count the elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def draw(model: RepVGG, deploy: RepVGG) -> Figure:
    """Draw the first layers (four, as in the paper) of the deepest stage of `model`, and below each what it is in `deploy`.

    Raises `ValueError` unless `model` is in training form and `deploy` is the same network in deploy form.
    """
    depths = [len(_layers(model, i)) for i in range(len(model.stages))]
    stage = depths.index(max(depths))
    layers, folded = _layers(model, stage), _layers(deploy, stage)
    if not all(type(layer.block) is Branches for layer in layers):
        raise ValueError("figure 2 shows blocks of branches: its first model must be in training form")
    if len(layers) != len(folded) or not all(type(layer.block) is nn.Conv2d for layer in folded):
        raise ValueError("the second model of figure 2 is not the first in deploy form: reparameterize(model) is")

    layers, folded = layers[:LAYERS], folded[:LAYERS]
    branches = [[_branch(branch) for branch in layer.block.children()] for layer in layers]
    panel = max(_length(lane) for lanes in branches for lane in lanes) + 4 * PAD + SUM
    pitch = panel + GAP + max(_length(_after(layer)) for layer in layers) + GAP
    height = max(map(len, branches)) * LANE + 20
    top = 92.0
    middle, below = top + height / 2, top + height + 82
    last = MARGIN + STUB + len(layers) * pitch  # where the wire leaves the last layer
    figure, axes = canvas(max(last + STUB - GAP + MARGIN, HEADING), below + 76)

    shown = f"stage {stage + 2}, layers 1 to {len(layers)} of {depths[stage]}"  # as Table 2 counts: the stem is stage 1
    _heading(axes, 28, "Training form", f"{shown}; the whole network has {_parameters(model)}")
    _heading(axes, below + 52, "Deploy form", f"the same function in one convolution per layer; {_parameters(deploy)}")
    for i, (layer, plain) in enumerate(zip(layers, folded, strict=True)):
        x = MARGIN + STUB + i * pitch
        write(axes, x, top - 15, f"layer {i + 1}", 12.5, MUTED, "left")
        write(axes, x + panel, top - 15, _channels(layer.block), 12.5, MUTED, "right")
        box(axes, x + panel / 2, middle, panel, height, (PANEL, PANEL), radius=10, zorder=1)
        _block(axes, x, middle, panel, branches[i])
        wire(axes, [(x + panel / 2, top + height + 10), (x + panel / 2, below - CHIP / 2 - 6)], head=True)
        write(axes, x + panel / 2 + 9, below - 50, "fold", 12.5, MUTED, "left")
        _chain(axes, x, below, panel, _operators(plain.block))
        for y, form in ((middle, layer), (below, plain)):
            _chain(axes, x + panel, y, pitch - panel, _after(form))
    for y in (middle, below):
        wire(axes, [(MARGIN, y), (MARGIN + STUB, y)])
        wire(axes, [(last, y), (last + STUB - GAP, y)], head=True)
    return figure


def draw_block(block: nn.Module) -> Figure:
    """Draw one block in training form, `Branches` or a `Chain` that begins with them, and what it folds into."""
    body, after = (block[0], list(block)[1:]) if isinstance(block, Chain) else (block, [])
    branches = [_branch(branch) for branch in body.children()]
    chain = [operator for m in after for operator in _operators(m)]
    panel = max(_length(lane) for lane in branches) + (4 * PAD + SUM if len(branches) > 1 else 2 * PAD)
    height = len(branches) * LANE + 20
    middle, x = MARGIN + height / 2, MARGIN + STUB
    end = x + panel + (_length(chain) + 2 * GAP if chain else 0)  # of what folds
    try:
        folded = [_convolution(as_conv(as_linear.read(block), next(block.parameters())))]
    except ReparamError as error:
        folded, word = [], f"cannot be folded: {error.reason.partition(':')[0]}"
    else:
        word = "folds into"
    room = FOLD_ROOM if folded else REFUSAL_ROOM
    figure, axes = canvas(end + room + (_length(folded) + STUB if folded else 0) + MARGIN, height + 2 * MARGIN)
    box(axes, (x + end) / 2, middle, end - x, height, (PANEL, PANEL), radius=10, zorder=1)
    wire(axes, [(MARGIN, middle), (x, middle)])
    _block(axes, x, middle, panel, branches)
    if chain:
        _chain(axes, x + panel, middle, end - x - panel, chain)
    wire(axes, [(end, middle), (end + STUB - GAP, middle)], head=True)
    write(axes, end + STUB + GAP if folded else end + STUB, middle, word, 12.5, MUTED, "left")
    if folded:
        _chain(axes, end + room, middle, _length(folded) + STUB, folded)
    return figure


def _layers(model: RepVGG, stage: int) -> list[Layer]:
    return list(model.stages[stage]) if stage < len(model.stages) else []  # type: ignore[call-overload]


def _branch(branch: nn.Module) -> list[DrawnOperator]:
    found = _operators(branch)
    return found if any(isinstance(m, nn.Conv2d) for m in branch.modules()) else [IDENTITY_BOX, *found]


def _after(layer: Layer) -> list[DrawnOperator]:
    squeeze_excite = [] if isinstance(layer.se, nn.Identity) else [DrawnOperator("SE")]
    return [*squeeze_excite, *_operators(layer.act)]


def _operators(module: nn.Module) -> list[DrawnOperator]:
    """Return the leaves of `module` in order: a convolution with its geometry, "BN", or the name of anything else."""
    found: list[DrawnOperator] = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            found.append(_convolution(part))
        elif isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm):
            found.append(DrawnOperator("BN"))
        elif isinstance(part, nn.AvgPool2d):
            found.append(DrawnOperator("average", f"{part.kernel_size}×{part.kernel_size}", width=76))  # noqa: RUF001
        elif not isinstance(part, nn.Identity | nn.Sequential) and not any(True for _ in part.children()):
            found.append(DrawnOperator(type(part).__name__, width=50))
    return found


def _convolution(conv: nn.Conv2d) -> DrawnOperator:
    rows, columns = conv.kernel_size
    unusual = [
        f"{what} {n}" for what, n in (("stride", conv.stride[0]), ("dilation", conv.dilation[0]), ("groups", conv.groups)) if n > 1
    ]
    if isinstance(conv, DerivedConv):
        unusual.insert(0, conv.formula)
    note = unusual[0] if len(unusual) == 1 else " ".join(f"{word[0]}{word.split()[1]}" for word in unusual)
    return DrawnOperator(f"{rows}×{columns}", note, POINTWISE if (rows, columns) == (1, 1) else WIDEST, 76)  # noqa: RUF001


def _channels(block: nn.Module) -> str:
    conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    return f"{conv.in_channels} → {conv.out_channels} channels"


def _parameters(model: nn.Module) -> str:
    return f"{count(model):,} parameters"


def _length(chain: Sequence[DrawnOperator]) -> int:
    return sum(operator.width + GAP for operator in chain) - GAP


def _heading(axes: Axes, y: float, form: str, details: str) -> None:
    write(axes, MARGIN, y, form, 16, align="left", weight="bold")
    write(axes, MARGIN + 138, y, details, 13, MUTED, "left")


def _block(axes: Axes, x: float, y: float, width: float, branches: Sequence[Sequence[DrawnOperator]]) -> None:
    """Draw the branches of one block, each in its lane, between the point where they part and their sum."""
    if len(branches) == 1:
        _chain(axes, x, y, width, branches[0])
        return
    split, total = x + PAD, x + width - PAD - SUM / 2
    for lane, branch in enumerate(branches):
        level = y + (lane - (len(branches) - 1) / 2) * LANE
        wire(axes, [(split, y), (split, level), (total, level), (total, y)])
        _boxes(axes, (split + total - SUM / 2) / 2, level, branch)
    wire(axes, [(x, y), (split, y)])
    wire(axes, [(total, y), (x + width, y)])
    dot(axes, split, y)
    plus(axes, total, y, SUM / 2)


def _chain(axes: Axes, x: float, y: float, width: float, chain: Sequence[DrawnOperator]) -> None:
    """Draw operators one after the other on a wire."""
    wire(axes, [(x, y), (x + width, y)])
    _boxes(axes, x + width / 2, y, chain)


def _boxes(axes: Axes, centre: float, y: float, chain: Sequence[DrawnOperator]) -> None:
    x = centre - _length(chain) / 2
    for operator in chain:
        middle = x + operator.width / 2
        box(axes, middle, y, operator.width, CHIP, operator.colours)
        write(axes, middle, y - 7 if operator.note else y, operator.name, 13.5)
        if operator.note:
            write(axes, middle, y + 9, operator.note, 11, MUTED if operator.colours is NEUTRAL else operator.colours[1])
        x += operator.width + GAP
