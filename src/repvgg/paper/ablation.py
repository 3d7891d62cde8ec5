"""Tables 6 and 7 on any data: what the branches, and other ways to build them, are worth.

The grid of trainings is grid.py's; here its outcomes are set beside the paper's, with the speed of each training form.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from repvgg.bench.models import randomise_norms
from repvgg.data import open_source
from repvgg.deploy import engines
from repvgg.disk import atomically
from repvgg.measure.timing import Times, interleave, ratio, synchroniser
from repvgg.paper.grid import RESNETS, TABLES, Cell, Grid, Outcome, run
from repvgg.paper.numbers import RESNET50, RESNET50_WITH_BLOCKS, TABLE6, TABLE7
from repvgg.paper.result import NothingChosenError, PaperSettings, Result, Table
from repvgg.paper.speeds import significant
from repvgg.paper.table4 import spearman
from repvgg.train.loop import new_model
from repvgg.train.recipes import Recipe, get_recipe
from repvgg.web.drawing import INK, MUTED, POINTWISE, RULE, WIDEST, plot

PLAIN, FULL = "plain", "repvgg"
# The paper's name and top-1 of each variant that it has.
PRINTED: dict[str, tuple[str, float]] = {
    "plain": ("Neither (plain)", TABLE6[0].top1),
    "no_1x1": ("Identity alone", TABLE6[1].top1),
    "no_identity": ("1x1 alone", TABLE6[2].top1),
    **{("residual" if v.model.endswith("residual") else v.block): (v.printed, v.top1) for v in TABLE7},
    "resnet50": ("ResNet-50", RESNET50),
    "resnet50_repvgg": ("ResNet-50 with RepVGG blocks", RESNET50_WITH_BLOCKS),
}
# A look at whether it works, in minutes; what a network of this size learns in two epochs says little.
QUICK: dict[str, Any] = {"width": 0.125, "limit": 2000}
QUICK_EPOCHS = 2


@dataclass(frozen=True)
class Findings:
    """Everything found in one grid.

    outcomes: the finished cells of each variant; speeds: seconds a batch of `batch_size`, training form; rates: the learning rate
    of each variant, where that is not the grid's.
    """

    grid: Grid
    outcomes: dict[str, list[Outcome]]
    speeds: dict[str, Times]
    batch_size: int
    rates: dict[str, float] = field(default_factory=dict)

    def top1(self, variant: str) -> list[float]:
        """Return the top-1 of each cell that did not diverge, in percent."""
        return [100 * o.top1 for o in self.outcomes[variant] if o.top1 is not None]


def ablate(grid: Grid, settings: PaperSettings, ray: str = "") -> Result:
    """Run the grid, on this machine or a cluster of Ray, then both tables of what is in it."""
    return report("Tables 6 and 7", find(grid, settings, ray), settings, (table6, table7, beyond), "ablation")


def part(
    title: str, variants: Sequence[str], table: Callable[[Findings], list[Table]], name: str, settings: PaperSettings
) -> Result:
    """Run one of the tables with the paper's settings: B0 at its full width, the light recipe, every image of `settings.data`.

    Without data it trains nothing, and shows what `repvgg ablate` has finished in the same folder; a quick look takes the embedded
    digits.
    """
    if not settings.data and not settings.quick:
        return report(title, kept(settings.out / "ablation", variants, settings), settings, (table,), name)
    data = settings.data or "digits"
    grid = Grid(settings.out / "ablation", data, get_recipe("light"), device=settings.device, workers=settings.workers)
    if settings.quick:
        recipe = replace(get_recipe(open_source(data).recipe), epochs=QUICK_EPOCHS)
        grid = replace(grid, out=settings.out / "ablation-quick", recipe=recipe, **QUICK)
    return report(title, find(replace(grid, variants=tuple(variants)), settings), settings, (table,), name)


def kept(folder: Path, variants: Sequence[str], settings: PaperSettings) -> Findings:
    """Return what is finished of some variants in a grid's folder. Of several grids below it, as of several learning rates, each
    variant is shown from that with most seeds, then from the best.

    Raises NothingChosenError where there is nothing.
    """
    best: dict[str, tuple[Grid, list[Outcome]]] = {}
    for path in sorted(folder.glob("**/grid.json")):
        grid = _grid_in(path.parent, settings)
        for name in variants:
            outcomes = [o for seed in range(grid.seeds) if (o := Cell(grid, name, seed).outcome)]
            if outcomes and (name not in best or _worth(outcomes) > _worth(best[name][1])):
                best[name] = grid, outcomes
    if not best:
        raise NothingChosenError(
            "it trains networks, so it must be told on what: --data (the paper's is ImageNet, in folders). Without, it shows what "
            f"repvgg ablate --out {folder} has finished: nothing yet"
        )
    grid = replace(next(iter(best.values()))[0], variants=tuple(best))
    speeds, outcomes_of = training_speeds(grid, settings), {name: outcomes for name, (_, outcomes) in best.items()}
    rates = {name: grid.recipe.lr for name, (grid, _) in best.items()}
    return Findings(grid, outcomes_of, speeds, settings.protocol.batch_size, rates)


def _grid_in(folder: Path, settings: PaperSettings) -> Grid:
    given = json.loads((folder / "grid.json").read_text())
    recipe = Recipe(**{f.name: given.pop(f.name) for f in fields(Recipe) if f.name in given})
    numbers = [run.name.rpartition("-")[2] for run in folder.glob("*-*") if run.is_dir()]
    seeds = 1 + max((int(number) for number in numbers if number.isdigit()), default=0)
    return Grid(folder, recipe=recipe, seeds=seeds, device=settings.device, **given)


def _worth(outcomes: Sequence[Outcome]) -> tuple[int, float]:
    return len(outcomes), statistics.mean(outcome.top1 or 0.0 for outcome in outcomes)


def find(grid: Grid, settings: PaperSettings, ray: str = "") -> Findings:
    """Train what is not trained yet, and time what is not timed yet."""
    outcomes = run(grid, settings.log, ray)
    by_variant = {name: [o for o in outcomes if o.variant == name] for name in dict.fromkeys(grid.variants)}
    return Findings(grid, by_variant, training_speeds(grid, settings), settings.protocol.batch_size)


def training_speeds(grid: Grid, settings: PaperSettings) -> dict[str, Times]:
    """Time every variant's training form, taking turns, and keep the times in the grid's folder (eval mode, random weights)."""
    protocol = settings.protocol
    conditions = {**asdict(protocol), "where": settings.where, "torch": torch.__version__, "variants": list(grid.variants)}
    key = json.dumps(conditions)
    path = grid.out / "speeds.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if key not in kept:
        settings.log("timing the training forms, which take turns")
        kept[key] = {name: times.by_round for name, times in _time(grid, settings).items()}
        atomically(path, lambda temporary: temporary.write_text(json.dumps(kept, indent=1) + "\n"))
    return {name: Times([[s] for s in seconds]) for name, seconds in kept[key].items()}


def _time(grid: Grid, settings: PaperSettings) -> dict[str, Times]:
    source, protocol = open_source(grid.data), settings.protocol
    size = source.preprocessing.input_size
    options = replace(settings.options(protocol.batch_size), input_size=size)
    calls = {}
    for variant in dict.fromkeys(grid.variants):
        arch, how = grid.network(variant)
        model = randomise_norms(new_model(arch, source, log=lambda line: None, **how), (4, *size))
        engine = engines.build("eager", model, options)
        calls[variant] = partial(engine.run, engine.prepare(torch.randn(protocol.batch_size, *size)))
    return interleave(
        calls,
        rounds=protocol.rounds,
        batches=protocol.batches,
        warmup=protocol.warmup,
        synchronise=synchroniser(settings.device),
    )


# ------------------------------------------------------------------------------------------------------------------ tables


def report(
    title: str, found: Findings, settings: PaperSettings, tables: Sequence[Callable[[Findings], list[Table]]], name: str
) -> Result:
    return Result(
        f"{title}: what the structure is worth",
        [table for make in tables for table in make(found)],
        f"{_agreement(found)}The paper's figures are of B0 on ImageNet, 120 epochs, one run each. Which structure trains best may "
        "depend on depth, data and schedule, and differences as small as the deviation between seeds say nothing.",
        record(found),
        {name: draw(found)},
        _how(found, settings),
    )


def table6(found: Findings) -> list[Table]:
    """Return Table 6: B0's branches, taken away one by one."""
    rows = [
        (
            "yes" if row.identity else "no",
            "yes" if row.pointwise else "no",
            f"{row.top1:.2f}",
            *_top1(found, row.block),
            f"{row.speed:,}",
            *_speed(found, row.block, PLAIN),
            _folded(found.outcomes[row.block]),
        )
        for row in TABLE6
        if row.block in found.outcomes
    ]
    header = (
        *("identity", "1x1", "top-1, %, paper", "here", "n", "examples/s in training form, paper", "here"),
        *("relative to neither (95% interval)", "same predictions folded"),
    )
    return [Table("Table 6: the branches", header, rows)] if rows else []


def table7(found: Findings) -> list[Table]:
    """Return Table 7: other structures beside the full one, and ResNet-50's 3x3s."""
    others = _structures(found, TABLES[4:], FULL, "Table 7: other structures")
    return [*others, *_structures(found, list(RESNETS)[1:], "resnet50", "Table 7: RepVGG blocks in ResNet-50")]


def beyond(found: Findings) -> list[Table]:
    """Return the table of variants that the paper does not have."""
    return _structures(found, [name for name in found.outcomes if name not in PRINTED], FULL, "Beyond the paper")


def _structures(found: Findings, variants: Sequence[str], reference: str, title: str) -> list[Table]:
    """Return rows of the `variants` that were trained, under the reference that they are compared with."""
    shown = [name for name in (reference, *variants) if name in found.outcomes]
    if shown in ([], [reference]):
        return []
    rows = []
    for variant in shown:
        printed, top1 = PRINTED.get(variant, (variant, None))
        other = variant != reference
        rows.append(
            (
                printed,
                variant,
                None if top1 is None else f"{top1:.2f}",
                *_top1(found, variant),
                f"{top1 - PRINTED[reference][1]:+.2f}" if other and top1 is not None else None,
                _difference(found, variant, reference) if other else None,
                *_speed(found, variant, reference),
                _folded(found.outcomes[variant]),
            )
        )
    header = (
        *("structure", "variant", "top-1, %, paper", "here", "n", f"over {reference}, paper", "here"),
        *("examples/s in training form", f"relative to {reference} (95% interval)", "same predictions folded"),
    )
    return [Table(title, header, rows)]


def _top1(found: Findings, variant: str) -> tuple[str | None, str]:
    """Return mean, deviation and number of seeds in words, and how many diverged."""
    values, cells = found.top1(variant), found.outcomes[variant]
    lost = len(cells) - len(values)
    count = f"{len(values)}" + (f" ({lost} diverged)" if lost else "")
    if not values:
        return None, count
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""), count


def _difference(found: Findings, variant: str, reference: str) -> str | None:
    """Return the mean difference over the seeds that both have: they share order and augmentation."""
    by_seed = {o.seed: o.top1 for o in found.outcomes.get(reference, []) if o.top1 is not None}
    pairs = [100 * (o.top1 - by_seed[o.seed]) for o in found.outcomes[variant] if o.top1 is not None and o.seed in by_seed]
    if not pairs:
        return None
    return f"{statistics.mean(pairs):+.2f}" + (f" ± {statistics.stdev(pairs):.2f}" if len(pairs) > 1 else "")


def _speed(found: Findings, variant: str, reference: str) -> tuple[str, str | None]:
    times, other = found.speeds[variant], found.speeds.get(reference)
    return significant(found.batch_size / times.median), None if other is None else str(ratio(other, times))


def _folded(outcomes: Sequence[Outcome]) -> str:
    """Count the images with the same prediction in deploy form, over all seeds."""
    forms = [o.forms for o in outcomes if o.forms]
    if any("refused" in f for f in forms):
        return "cannot be folded"
    return f"{sum(f['equal'] for f in forms):,} of {sum(f['images'] for f in forms):,}" if forms else ""


# ----------------------------------------------------------------------------------------------------------- what it says


def correlation(found: Findings) -> tuple[int, float]:
    """Return how many variants of Tables 6 and 7 there are, and the rank correlation of their mean top-1 with the paper's."""
    both = [(PRINTED[name][1], statistics.mean(top1)) for name in TABLES if name in found.outcomes and (top1 := found.top1(name))]
    return len(both), spearman([p for p, _ in both], [h for _, h in both])


def _agreement(found: Findings) -> str:
    count, rank = correlation(found)
    if math.isnan(rank) or count < 3:
        return ""
    return f"The order of {count} variants has a rank correlation of {rank:.2f} with the paper's. "


def _how(found: Findings, settings: PaperSettings) -> str:
    g = found.grid
    limit = f", {g.limit:,} images of each split at most" if g.limit else ""
    own = ", ".join(f"{name} {lr:g}" for name, lr in found.rates.items()) if len({*found.rates.values()}) > 1 else ""
    return (
        f"Here: {g.arch}, width {g.width:g}, on {g.data}{limit}, {g.recipe.epochs} epochs of batch {g.recipe.batch_size}, learning "
        f"rate {own or f'{g.recipe.lr:g}'}; top-1 of the last epoch on the validation split, mean and standard deviation over n "
        f"seeds. Speeds: batch {found.batch_size} on {settings.where}, eager, fp32, medians of "
        f"{settings.protocol.rounds} rounds in which "
        "all took turns. Predictions are compared in fp32 on every validation image."
    )


def record(found: Findings) -> dict[str, Any]:
    """Return all that was found, for JSON."""
    count, rank = correlation(found)
    return {
        "settings": found.grid.settings,
        "rates": found.rates,
        "rank_correlation": {"variants": count, "spearman": None if math.isnan(rank) else rank},
        "variants": {
            name: {
                "paper": PRINTED[name][1] if name in PRINTED else None,
                "n": len(values := found.top1(name)),
                "mean": statistics.mean(values) if values else None,
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "cells": [asdict(outcome) for outcome in outcomes],
                "training_form_examples_per_second": found.batch_size / found.speeds[name].median,
                "seconds_per_batch_by_round": found.speeds[name].by_round,
            }
            for name, outcomes in found.outcomes.items()
        },
    }


def draw(found: Findings) -> Figure:
    """Draw top-1 of the paper and of this grid side by side, the paper's best on top."""
    names = sorted(found.outcomes, key=lambda name: -PRINTED[name][1] if name in PRINTED else 0.0)
    figure, (left, right) = plot(1000, 90 + 30 * len(names), 2)
    rows = range(len(names))
    printed = [(PRINTED[name][1], row) for row, name in enumerate(names) if name in PRINTED]
    if printed:
        left.plot(*zip(*printed, strict=True), "o", color=POINTWISE[1], markersize=7)
    for row, name in enumerate(names):
        if values := found.top1(name):
            right.plot(values, [row] * len(values), "o", color=WIDEST[1], markerfacecolor="white", markersize=5)
            right.plot([statistics.mean(values)], [row], "|", color=WIDEST[1], markersize=16, markeredgewidth=2.5)
    left.set_yticks(rows, [PRINTED.get(name, (name, 0))[0] for name in names], fontsize=9, color=INK)
    right.set_yticks(rows, [""] * len(names))
    titles = "paper: B0 on ImageNet", f"here: {found.grid.arch}, width {found.grid.width:g}, on {Path(found.grid.data).name}"
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(color=RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        axes.set_title(title, fontsize=11, color=INK, loc="left")
        axes.set_xlabel("top-1, %", fontsize=9, color=MUTED)
    return figure
