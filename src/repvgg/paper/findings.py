"""The findings of a grid of Tables 6 and 7: outcomes, learning curves, the pilot's learning rates, speeds of the training forms."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

from repvgg.bench.models import randomise_norms
from repvgg.data import open_source
from repvgg.deploy import engines
from repvgg.disk import write_text
from repvgg.measure.timing import Times, interleave, synchroniser
from repvgg.paper.grid import TABLES, Cell, Grid, Outcome, run
from repvgg.paper.result import NothingChosenError, PaperSettings
from repvgg.train.loop import new_model
from repvgg.train.recipes import Recipe


@dataclass(frozen=True)
class Findings:
    """Everything found in one grid.

    outcomes: the finished cells of each variant; speeds: seconds a batch of `batch_size`, training form; rates: the learning rate
    of each variant, where that is not the grid's. pilot: see agreement.py, empty where there was one rate. curves:
    of each variant's seeds, the share after each epoch.
    """

    grid: Grid
    outcomes: dict[str, list[Outcome]]
    speeds: dict[str, Times]
    batch_size: int
    rates: dict[str, float] = field(default_factory=dict)
    pilot: dict[str, dict[str, float | str | None]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def cells(self) -> dict[str, list[float | None]]:
        """The top-1 of each cell in percent, None of one that diverged."""
        return {name: [None if o.top1 is None else 100 * o.top1 for o in found] for name, found in self.outcomes.items()}

    def top1(self, variant: str) -> list[float]:
        """Return the top-1 of each cell that did not diverge, in percent."""
        return [value for value in self.cells[variant] if value is not None]

    def curve(self, variant: str) -> list[float]:
        """Return the mean top-1 of a variant's seeds after each epoch, in percent."""
        return [100 * statistics.mean(seeds) for seeds in zip(*self.curves.get(variant, []), strict=False)]


def find(grid: Grid, settings: PaperSettings, ray: str = "") -> Findings:
    """Train what is not trained yet, and time what is not timed yet."""
    outcomes = run(grid, settings.log, ray)
    by_variant = {name: [o for o in outcomes if o.variant == name] for name in dict.fromkeys(grid.variants)}
    curves = {name: _curves(grid, found) for name, found in by_variant.items()}
    return Findings(grid, by_variant, training_speeds(grid, settings), settings.protocol.batch_size, curves=curves)


def kept(folder: Path, variants: Sequence[str], settings: PaperSettings) -> Findings:
    """Return what is finished of some variants in a grid's folder. Of several grids below it, as of several learning rates, each
    variant is shown from that with most seeds, then from the best.

    Raises NothingChosenError where there is nothing, and where the grids differ in more than the learning rate.
    """
    grids = [_grid_in(path.parent, settings) for path in sorted(folder.glob("**/grid.json"))]
    _check(grids, folder)
    best: dict[str, tuple[Grid, list[Outcome]]] = {}
    for grid in grids:
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
    curves = {name: _curves(*found) for name, found in best.items()}
    return Findings(grid, outcomes_of, speeds, settings.protocol.batch_size, rates, _pilot(grids, variants), curves)


def _grid_in(folder: Path, settings: PaperSettings) -> Grid:
    given = json.loads((folder / "grid.json").read_text())
    recipe = Recipe(**{f.name: given.pop(f.name) for f in fields(Recipe) if f.name in given})
    numbers = [run.name.rpartition("-")[2] for run in folder.glob("*-*") if run.is_dir()]
    seeds = 1 + max((int(number) for number in numbers if number.isdigit()), default=0)
    return Grid(folder, recipe=recipe, seeds=seeds, device=settings.device, **given)


def _check(grids: Sequence[Grid], folder: Path) -> None:
    settings = [{**grid.settings, "lr": None} for grid in grids]
    if differ := sorted({name for other in settings for name in other if other[name] != settings[0][name]}):
        raise NothingChosenError(
            f"{folder} holds grids of different {' and '.join(differ)}, which make no table together: move the others out of it"
        )


def _worth(outcomes: Sequence[Outcome]) -> tuple[int, float]:
    return len(outcomes), statistics.mean(outcome.top1 or 0.0 for outcome in outcomes)


def _pilot(grids: Sequence[Grid], variants: Sequence[str]) -> dict[str, dict[str, float | str | None]]:
    """Return seed 0's top-1 by learning rate, where there are several."""
    if len(grids) < 2:
        return {}
    found = {name: {f"{grid.recipe.lr:g}": _share(Cell(grid, name, 0).outcome) for grid in grids} for name in variants}
    return {name: row for name, row in found.items() if any(row.values()) or name in TABLES}  # ResNet-50 needs no pilot


def _share(outcome: Outcome | None) -> float | str | None:
    return None if outcome is None else "diverged" if outcome.top1 is None else outcome.top1


def _curves(grid: Grid, outcomes: Sequence[Outcome]) -> list[list[float]]:
    return [curve for o in outcomes if o.top1 is not None and (curve := Cell(grid, o.variant, o.seed).by_epoch)]


def training_speeds(grid: Grid, settings: PaperSettings) -> dict[str, Times]:
    """Time every variant's training form, taking turns, and keep the times in the grid's folder (eval mode, random weights)."""
    protocol = settings.protocol
    how = {"precision": settings.precision, "channels_last": settings.channels_last, "torch": torch.__version__}
    key = json.dumps({**asdict(protocol), "where": settings.where, **how, "variants": list(grid.variants)})
    path = grid.out / "training_speeds.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if key not in kept:
        settings.log("timing the training forms, which take turns")
        kept[key] = {name: times.by_round for name, times in _time(grid, settings).items()}
        write_text(path, json.dumps(kept, indent=1) + "\n")
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
