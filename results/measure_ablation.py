"""Tables 6 and 7 on CIFAR-10 with a narrow B0, each variant at its own best learning rate; results/ablation.json, two figures.

python results/measure_ablation.py hf:../shared/data/cifar10 results/paper/ablation              # stop and start it at will
python results/measure_ablation.py hf:../shared/data/cifar10 results/paper/ablation --seeds 1    # the pilot alone
python results/measure_ablation.py hf:../shared/data/cifar10 results/paper/ablation --as-is      # trains nothing: what is finished

The pilot trains every variant with seed 0 at each of three learning rates, the same budget each. The further seeds are trained at
the rate that did best. `repvgg paper table6 --out results/paper`, and table7, show what is finished. Images of 32 pixels meet the
stem at stride 2, so that the network sees 16: a quarter of the work.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from plain_recipe import PLAIN

from repvgg.disk import atomically
from repvgg.measure.machine import write_record
from repvgg.paper.ablation import draw, draw_curves, record
from repvgg.paper.findings import kept
from repvgg.paper.grid import TABLES, Grid, Outcome, run, settle
from repvgg.paper.result import PaperSettings

RATES = (0.05, 0.1, 0.2)
RECIPE = replace(PLAIN, epochs=15)
WIDTH = 0.125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--variants", default=",".join(TABLES))
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_name("ablation.json"))
    asked = parser.parse_args()
    variants = tuple(asked.variants.split(","))
    grids = begun(asked, variants)
    if not asked.as_is:
        train(grids, asked.seeds)
    found = kept(asked.out, variants, PaperSettings(out=asked.out))
    write_record(asked.record, record(found))
    for name, figure in (("", draw(found)), ("-curves", draw_curves(found))):
        path = asked.record.with_name(f"{asked.record.stem}{name}.png")
        atomically(path, partial(figure.savefig, format="png", dpi=200))


def begun(asked: argparse.Namespace, variants: tuple[str, ...]) -> dict[float, Grid]:
    """Return the grid of each learning rate; their folders say what there is to be trained."""
    grids = {
        lr: Grid(
            asked.out / f"lr-{lr:g}",
            asked.data,
            replace(RECIPE, epochs=asked.epochs, lr=lr),
            width=WIDTH,
            small_input=False,
            limit=asked.limit,
            variants=variants,
        )
        for lr in RATES
    }
    for grid in grids.values():
        grid.out.mkdir(parents=True, exist_ok=True)
        settle(grid)
    return grids


def train(grids: dict[float, Grid], seeds: int) -> None:
    """Train the pilot, then the further seeds of each variant at its best rate; what is finished is kept."""
    pilot: dict[str, dict[float, Outcome]] = {}
    for lr, grid in grids.items():
        for outcome in run(grid):
            pilot.setdefault(outcome.variant, {})[lr] = outcome
    best = {variant: max(by_rate, key=lambda lr: by_rate[lr].top1 or 0.0) for variant, by_rate in pilot.items()}
    for lr, grid in grids.items():
        if chosen := tuple(variant for variant in best if best[variant] == lr):
            run(replace(grid, variants=chosen, seeds=seeds))


if __name__ == "__main__":
    main()
