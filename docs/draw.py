"""Draw the pictures of the pages: python docs/draw.py [FOLDER]

FOLDER/layers.svg is a stretch of a network in both forms, FOLDER/fold.svg one block folding, number by number, and
FOLDER/blocks/NAME.svg each block of blocks.md.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import nn

from repvgg.bench.models import randomise_norms
from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import BLOCKS
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.zoo import create_model
from repvgg.paper import figure2, figure4
from repvgg.paper.figure2 import draw_block

FOLDER = Path(__file__).parent
CHANNELS = 64
SEED = 4  # of the weights in fold.svg
# Text stays text, and the same drawing is the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "repvgg", "font.sans-serif": ["Arial", "Helvetica", "DejaVu Sans"]}


def main(folder: Path = FOLDER) -> None:
    """Write fold.svg and layers.svg, and one SVG for each block, of a layer whose input and output have one shape."""
    (folder / "blocks").mkdir(exist_ok=True)
    torch.manual_seed(SEED)
    one_channel = randomise_norms(BLOCKS["repvgg"](1, 1), (8, 1, 8, 8))
    assert isinstance(one_channel, Branches)
    drawings: dict[str, Callable[[], Figure]] = {"fold": partial(figure4.draw, one_channel)}
    training = randomise_norms(create_model("repvgg_micro", num_classes=10).eval(), (8, 3, 32, 32))
    drawings["layers"] = partial(figure2.draw, training, reparameterize(training))  # type: ignore[arg-type]
    drawings |= {f"blocks/{name}": partial(_block, block) for name, block in BLOCKS.items()}
    for name, draw in drawings.items():
        with mpl.rc_context(STYLE):
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _block(block: Callable[..., nn.Module]) -> Figure:
    return draw_block(block(CHANNELS, CHANNELS))


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
