"""Table 2: stages, output sizes, layers and widths, read from our networks."""

from collections.abc import Callable

import torch

from repvgg.models.names import FAMILY, Member
from repvgg.models.repvgg import RepVGG
from repvgg.paper.numbers import TABLE2, Stage
from repvgg.paper.result import PaperSettings, Result, Table

CELLS: tuple[Callable[[Stage], str], ...] = (
    lambda stage: f"{stage.output} x {stage.output}",
    lambda stage: f"{stage.layers_a} x {stage.channels}",
    lambda stage: f"{stage.layers_b} x {stage.channels}",
)


def run(settings: PaperSettings) -> Result:
    ours = stages()
    same = "equal to the paper's" if ours == TABLE2 else "NOT equal to the paper's"
    rows = [(i, *(cell(stage) for cell in CELLS for stage in (p, o))) for i, (p, o) in enumerate(zip(TABLE2, ours, strict=True), 1)]
    header = ("stage", "output, paper", "here", "RepVGG-A, paper", "here", "RepVGG-B, paper", "here")
    return Result(
        "Table 2: the architecture",
        [Table("Layers x channels of each stage", header, rows)],
        f"Nothing is measured here, and our networks are {same}. The output sizes are those of A0's and B0's feature maps for an "
        "image of 224 x 224; the layers are counted in them; how the channels follow from a and b was found by changing these.",
        {"equal": ours == TABLE2, "stages": [vars(stage) for stage in ours]},
    )


def stages() -> tuple[Stage, ...]:
    """Read Table 2 off our networks."""
    with torch.device("meta"):
        a, b = (RepVGG(FAMILY[name], deploy=True).eval() for name in ("repvgg_a0", "repvgg_b0"))
        sizes = [
            [feature.shape[-1] for feature in model.forward_intermediates(torch.empty(1, 3, 224, 224), intermediates_only=True)]
            for model in (a, b)
        ]
    assert sizes[0] == sizes[1]
    depths = [[1, *(len(stage) for stage in model.stages)] for model in (a, b)]  # type: ignore[arg-type]
    return tuple(Stage(size, la, lb, _channels(i)) for i, (size, la, lb) in enumerate(zip(sizes[0], *depths, strict=True)))


def _channels(stage: int) -> str:
    """Find out how the channels of a stage depend on a and b."""

    def width(a: float, b: float) -> int:
        return Member((1, 1, 1, 1), a, b).widths()[stage]

    one = width(1, 1)
    if width(1, 2) == 2 * one:
        return f"{one}b"
    assert width(0.5, 1) == one / 2
    return f"{one}a" if width(2, 1) == 2 * one else f"min({one}, {one}a)"
