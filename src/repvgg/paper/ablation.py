"""Tables 6 and 7 on any data: what the branches, and other ways to build them, are worth.

The grid of trainings is grid.py's, and what it has found findings.py's; here that is set beside the paper's.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from repvgg.data import open_source
from repvgg.measure.timing import ratio
from repvgg.paper import agreement
from repvgg.paper.agreement import FULL, PLAIN, PRINTED
from repvgg.paper.findings import Findings, find, kept
from repvgg.paper.grid import RESNETS, TABLES, Grid, Outcome
from repvgg.paper.numbers import TABLE6
from repvgg.paper.result import PaperSettings, Result, Table
from repvgg.paper.speeds import significant
from repvgg.train.recipes import get_recipe
from repvgg.web.charts import LINES
from repvgg.web.drawing import INK, MUTED, POINTWISE, RULE, WIDEST, plot

# A look at whether it works, in minutes; what a network of this size learns in two epochs says little.
QUICK: dict[str, Any] = {"width": 0.125, "limit": 2000}
QUICK_EPOCHS = 2


def ablate(grid: Grid, settings: PaperSettings, ray: str = "") -> Result:
    """Run the grid, on this machine or a cluster of Ray, then both tables of what is in it."""
    return report("Tables 6 and 7", find(grid, settings, ray), settings, (table6, table7, beyond), "ablation")


def part(
    title: str, variants: Sequence[str], table: Callable[[Findings], list[Table]], name: str, settings: PaperSettings
) -> Result:
    """Run one of the tables with the paper's settings: B0 at its full width, the light recipe, every image of `settings.data`.

    Without data, or with masks, it trains nothing, and shows what `repvgg ablate` has finished in the same folder; a quick look
    takes the embedded digits.
    """
    given = settings.data
    if given and open_source(given).masks:
        settings.log(f"{given} has masks, no labels: the blocks are not trained on it")
        given = ""
    if not given and not settings.quick:
        return report(title, kept(settings.out / "ablation", variants, settings), settings, (table,), name)
    data = given or "digits"
    grid = Grid(settings.out / "ablation", data, get_recipe("light"), device=settings.device, workers=settings.workers)
    if settings.quick:
        recipe = replace(get_recipe(open_source(data).recipe), epochs=QUICK_EPOCHS)
        grid = replace(grid, out=settings.out / "ablation-quick", recipe=recipe, **QUICK)
    return report(title, find(replace(grid, variants=tuple(variants)), settings), settings, (table,), name)


# ------------------------------------------------------------------------------------------------------------------ tables


def report(
    title: str, found: Findings, settings: PaperSettings, tables: Sequence[Callable[[Findings], list[Table]]], name: str
) -> Result:
    general = (
        "The paper's figures are of B0 on ImageNet, 120 epochs, one run each. Which structure trains best may depend on depth, "
        "data and schedule, and differences as small as the deviation between seeds say nothing."
    )
    curves = {f"{name}-curves": draw_curves(found)} if any(found.curves.values()) else {}
    return Result(
        f"{title}: what the structure is worth",
        [*(table for make in tables for table in make(found)), *pilot(found)],
        f"{agreement.words(found.cells, found.pilot)} {general}".strip(),
        record(found),
        {name: draw(found), **curves},
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


def pilot(found: Findings) -> list[Table]:
    """Return the table of the pilot, which trained every variant once at each learning rate; none where there was one rate."""
    rates = agreement.rates_of(found.pilot)
    rows = []
    for name, by_rate in found.pilot.items():
        top1 = [agreement.percent(by_rate[rate]) for rate in rates]
        rows.append((name, *top1, f"{found.rates[name]:g}" if name in found.rates else None))
    header = ("variant", *(f"learning rate {rate}" for rate in rates), "taken")
    return [Table("The pilot: top-1, %, of seed 0", header, rows)] if len(rates) > 1 else []


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


def _how(found: Findings, settings: PaperSettings) -> str:
    g = found.grid
    limit = f", {g.limit:,} images of each split at most" if g.limit else ""
    own = ", ".join(f"{name} {lr:g}" for name, lr in found.rates.items()) if len({*found.rates.values()}) > 1 else ""
    rate = f"learning rate {own or f'{g.recipe.lr:g}'}"
    if rates := agreement.rates_of(found.pilot):
        rate = f"a pilot with seed 0 at each learning rate of {', '.join(rates)}, as many epochs each"
    stem = ", the stem at stride 2 (images of 32 pixels are 16 inside)" if g.small_input is False else ""
    return (
        f"Here: {g.arch}, width {g.width:g}, on {g.data}{limit}{stem}, {g.recipe.epochs} epochs of batch {g.recipe.batch_size}, "
        f"{rate}; top-1 of the last epoch on the validation split, mean and standard deviation over n seeds. "
        f"Speeds: batch {found.batch_size} on {settings.where}, eager, {settings.precision}, "
        f"medians of {settings.protocol.rounds} rounds in which all took turns. "
        "Predictions are compared in fp32 on every validation image."
    )


def record(found: Findings) -> dict[str, Any]:
    """Return all that was found, for JSON."""
    count, rank = agreement.correlation(found.cells)
    return {
        "settings": found.grid.settings,
        "rates": found.rates,
        "pilot": found.pilot,
        "rank_correlation": {"variants": count, "spearman": None if math.isnan(rank) else rank},
        "variants": {
            name: {
                "paper": PRINTED[name][1] if name in PRINTED else None,
                "n": len(values := found.top1(name)),
                "mean": statistics.mean(values) if values else None,
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "cells": [asdict(outcome) for outcome in outcomes],
                "top1_by_epoch": found.curves.get(name, []),
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


def draw_curves(found: Findings) -> Figure:
    """Draw each variant's mean top-1 over its seeds after each epoch; named in the order of their ends."""
    curves = {name: curve for name in found.outcomes if (curve := found.curve(name))}
    figure, (axes,) = plot(1000, 460)
    for number, name in enumerate(sorted(curves, key=lambda name: -curves[name][-1])):
        colour, line = LINES[number % len(LINES)], "-" if number < len(LINES) else "--"
        label, width = f"{name} (n = {len(found.curves[name])})", 2.6 if name in (FULL, PLAIN) else 1.3
        axes.plot(range(1, len(curves[name]) + 1), curves[name], label=label, linewidth=width, color=colour, linestyle=line)
    axes.grid(color=RULE, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_title("top-1 on the validation split, %: mean over seeds", fontsize=11, color=INK, loc="left")
    axes.set_xlabel("epoch", fontsize=9, color=MUTED)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
