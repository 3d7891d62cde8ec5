"""Tables 6 and 7 on CIFAR-10 with a narrow B0, each variant at its own best learning rate; write results/ablation.json and .png.

python results/measure_ablation.py hf:../shared/data/cifar10 results/paper/ablation              # stop and start it at will
python results/measure_ablation.py hf:../shared/data/cifar10 results/paper/ablation --seeds 1    # the pilot alone

The pilot trains every variant with seed 0 at each of three learning rates, the same budget each. The further seeds are trained at
the rate that did best. `repvgg paper table6 --out results/paper`, and table7, show what is finished. Images of 32 pixels meet the
stem at stride 2, so that the network sees 16: a quarter of the work.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from repvgg.disk import atomically
from repvgg.measure.machine import write_record
from repvgg.paper.ablation import draw, kept, record
from repvgg.paper.grid import Grid, Outcome, run
from repvgg.paper.result import PaperSettings
from repvgg.train.recipes import get_recipe

RATES = (0.05, 0.1, 0.2)
RECIPE = replace(get_recipe("cifar"), epochs=15, ema=0.0, small_first=0.0)
WIDTH = 0.125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--variants", default="")
    asked = parser.parse_args()
    grids = {
        lr: Grid(
            asked.out / f"lr-{lr:g}",
            asked.data,
            replace(RECIPE, epochs=asked.epochs, lr=lr),
            width=WIDTH,
            small_input=False,
            limit=asked.limit,
            variants=tuple(filter(None, asked.variants.split(","))),
        )
        for lr in RATES
    }
    first: dict[str, dict[float, Outcome]] = {}
    for lr, grid in grids.items():
        for outcome in run(grid):
            first.setdefault(outcome.variant, {})[lr] = outcome
    best = {variant: max(by_rate, key=lambda lr: by_rate[lr].top1 or 0.0) for variant, by_rate in first.items()}
    for lr, grid in grids.items():
        if variants := tuple(variant for variant in best if best[variant] == lr):
            run(replace(grid, variants=variants, seeds=asked.seeds))
    found = kept(asked.out, tuple(best), PaperSettings(out=asked.out))
    pilot = {variant: {f"{lr:g}": outcome.top1 for lr, outcome in by_rate.items()} for variant, by_rate in first.items()}
    here = Path(__file__)
    write_record(here.with_name("ablation.json"), {"pilot": pilot, **record(found)})
    atomically(here.with_name("ablation.png"), lambda path: draw(found).savefig(path, format="png", dpi=200))


if __name__ == "__main__":
    main()
