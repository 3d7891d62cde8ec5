"""Draw every block of blocks.md from its modules: python docs/draw.py"""

import sys
from pathlib import Path

import matplotlib as mpl

from repvgg.fold.blocks import BLOCKS
from repvgg.paper.figure2 import draw_block

FOLDER = Path(__file__).parent / "blocks"
CHANNELS = 64
# Text stays text, and the same drawing is the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "repvgg", "font.sans-serif": ["Arial", "Helvetica", "DejaVu Sans"]}


def main(folder: Path = FOLDER) -> None:
    """One SVG for each block, of a layer whose input and output have one shape."""
    folder.mkdir(exist_ok=True)
    for name, block in BLOCKS.items():
        with mpl.rc_context(STYLE):
            draw_block(block(CHANNELS, CHANNELS)).savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
