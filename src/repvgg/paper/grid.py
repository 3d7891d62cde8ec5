"""The grid behind Tables 6 and 7: every variant of a network trained with every seed, in one folder.

    run(Grid(Path("ablation"), "digits", get_recipe("demo"), width=0.125, seeds=3), log=print)

    OUT/grid.json             the settings; a grid with others is refused, more variants and seeds are welcome
    OUT/acb-0/                the run folder of a cell (see train/loop.py), and forms.json: its two forms compared
    OUT/acb-0.log             what its training said

One process works in a folder, cell by cell; with ray="auto" or a cluster's address it hands the cells out as tasks of Ray, which
are tried again where a worker or a machine is lost. What is finished is kept, what was begun goes on.
"""

import json
import os
import statistics
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.data import Source, open_source
from repvgg.disk import FileError, Log, hold, make_folder, plain_file, read_text, write_text
from repvgg.fold.algebra import ReparamError
from repvgg.fold.blocks import BLOCKS
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.machine import write_record
from repvgg.models import zoo
from repvgg.models.load import load
from repvgg.models.names import NETWORKS, resolve_name
from repvgg.numerics import full_float32
from repvgg.predict.connect import absolute, connect, reason_of, refuse_without_ray
from repvgg.terminal import Progress
from repvgg.train.evaluate import batches
from repvgg.train.logs import read_lines
from repvgg.train.loop import train
from repvgg.train.recipes import Recipe

TABLES = (
    *("plain", "no_1x1", "no_identity", "repvgg"),  # Table 6
    *("identity_no_bn", "post_bn", "relu_in_branch", "dirac", "trivial", "acb", "residual"),  # Table 7
)
RESNETS = {"resnet50": {}, "resnet50_repvgg": {"block": "repvgg"}}  # Table 7's last comparison: blocks for the 3x3s of ResNet-50
VARIANTS = (*TABLES, *(name for name in BLOCKS if name not in TABLES), *RESNETS)
RETRIES = 3  # of a cell whose worker is lost


@dataclass(frozen=True)
class Grid:
    """The cells to train: each of `variants` (names in `VARIANTS`) with seeds 0 to seeds - 1, in the order seed by seed.

    arch, width, small_input: the member that the variants are of. limit: at most so many images of each split, the same for all.
    Raises ValueError for a variant or an arch that there is not.
    """

    out: Path
    data: str
    recipe: Recipe
    arch: str = "repvgg_b0"
    width: float = 1.0
    small_input: bool | None = None
    limit: int | None = None
    variants: tuple[str, ...] = ()
    seeds: int = 1
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self) -> None:
        arch = resolve_name(self.arch)
        reorganised = f"{arch}_residual" in NETWORKS
        object.__setattr__(self, "arch", arch)
        object.__setattr__(self, "variants", self.variants or tuple(n for n in TABLES if n != "residual" or reorganised))
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"no variant {unknown[0]!r}: there are {', '.join(VARIANTS)}")
        if "residual" in self.variants and not reorganised:
            raise ValueError(f"{arch} has no residual reorganisation: that is Table 7's, of repvgg_b0")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}: at least 1")

    @property
    def cells(self) -> list["Cell"]:
        return [Cell(self, variant, seed) for seed in range(self.seeds) for variant in dict.fromkeys(self.variants)]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all cells of a folder share."""
        names = ("data", "arch", "width", "small_input", "limit")
        return {**{name: getattr(self, name) for name in names}, **asdict(self.recipe)}

    def network(self, variant: str) -> tuple[str, dict[str, Any]]:
        """Return name and options of a variant, as `create_model` takes them."""
        if variant in RESNETS:
            return "resnet50", dict(RESNETS[variant])
        options: dict[str, Any] = {"width": self.width}
        if self.small_input is not None:
            options["small_input"] = self.small_input
        return (f"{self.arch}_residual", options) if variant == "residual" else (self.arch, {**options, "block": variant})


@dataclass(frozen=True)
class Outcome:
    """A finished cell. top1: of the last epoch, on the validation split; None where training diverged.

    forms: of the trained network, `images` validated, how many got `equal` predictions in deploy form, the largest relative
    difference of logits `max_rel_err`, both in float32; or why it is `refused`.
    """

    variant: str
    seed: int
    top1: float | None = None
    seconds: float = 0.0
    forms: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    grid: Grid
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.grid.out / self.name

    @property
    def outcome(self) -> Outcome | None:
        """The cell's outcome; None while it is not finished."""
        if _read(self.folder / "diverged.json"):
            return Outcome(self.variant, self.seed)
        summary, forms = _read(self.folder / "summary.json"), _read(self.folder / "forms.json")
        if not summary or not summary.get("finished") or not forms:
            return None
        forms.pop("machine", None)
        return Outcome(self.variant, self.seed, summary["last_top1"], summary["seconds"], forms)

    @property
    def by_epoch(self) -> list[float]:
        """The top-1 on the validation split after each epoch so far."""
        lines = read_lines(self.folder / "metrics.jsonl")
        return list({line["epoch"]: line["val_top1"] for line in lines if "val_top1" in line}.values())

    @property
    def state(self) -> str:
        """The cell's accuracy, or how far it is, in words."""
        if outcome := self.outcome:
            return "diverged" if outcome.top1 is None else f"{outcome.top1:.2%}"
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        epochs = [json.loads(line) for line in lines if "val_top1" in line and line.startswith("{") and line.endswith("}")]
        return f"epoch {epochs[-1]['epoch'] + 1}: {epochs[-1]['val_top1']:.1%}" if epochs else "begun"


def run(grid: Grid, log: Log = print, ray: str = "") -> list[Outcome]:
    """Work until every cell is finished; ray: "auto" or the address of the cluster that does it.

    Raises ValueError, before any work, for settings that do not fit the data, or are not those that the folder was begun with, and
    `FileError` for a folder in which another process works.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "a grid is spread by repvgg ablate --ray, not under torchrun; repvgg paper then takes it from OUT/ablation"
        )
    if ray:
        refuse_without_ray()
    source = open_source(grid.data).limited(grid.limit)
    _try_out(grid, source)
    make_folder(grid.out, "a grid's folder")
    with hold(grid.out):
        settle(grid)
        left = [cell for cell in grid.cells if cell.outcome is None]
        with Progress(len(grid.cells), log, len(grid.cells) - len(left), partial(_table, grid)) as progress:
            if ray and left:
                _work_on_ray(left, ray, progress)
            else:
                for cell in left:
                    progress.say(f"{cell.name} ...")
                    _work(cell, source)
                    _ended(cell, progress)
    return [outcome for cell in grid.cells if (outcome := cell.outcome)]


def compare_forms(model: nn.Module, source: Source, device: str = "cpu", batch_size: int = 250) -> dict[str, Any]:
    """Compare both forms of a trained network on the validation split, in float32: see `Outcome.forms`."""
    try:
        deploy = reparameterize(model.eval())
    except ReparamError as error:
        return {"refused": str(error)}
    full_float32(device)
    networks = [m.to(device, memory_format=torch.channels_last) for m in (model, deploy)]  # type: ignore[call-overload]
    images, equal, off, size = 0, 0, 0.0, 0.0
    with torch.no_grad():
        for x, labels in batches(source.val, source.preprocessing, batch_size, device=device):
            x = x[labels >= 0]  # the others could not be read
            wanted, got = (network(x) for network in networks)
            images += len(x)
            equal += int((wanted.argmax(1) == got.argmax(1)).sum())
            off, size = max(off, float((got - wanted).abs().max())), max(size, float(wanted.abs().max()))
    return {"images": images, "equal": equal, "max_rel_err": off / size if size else 0.0}


# ---------------------------------------------------------------------------------------------------------------- one cell


def _work_on_ray(cells: Sequence[Cell], address: str, progress: Progress) -> None:
    """Work on cells as tasks of a cluster. Raises ValueError with the reason of one that failed."""
    connect(address, progress.say)
    import ray

    grid = cells[0].grid
    device = grid.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
    device = "cuda" if device.startswith("cuda") else device  # a worker sees the one that it was given
    grid = replace(grid, out=grid.out.resolve(), data=absolute(grid.data), device=device)
    needs = {"CPU": 1 + grid.workers, "GPU": int(grid.device.startswith("cuda"))}
    if not any(all(node["Resources"].get(what, 0) >= count for what, count in needs.items()) for node in ray.nodes()):
        progress.say(
            f"no machine of the cluster has {needs['CPU']} processors and {needs['GPU']} GPUs for a cell: it is waited for"
        )
    task: Any = ray.remote(_work_far_away).options(max_retries=RETRIES, num_cpus=needs["CPU"], num_gpus=needs["GPU"])
    under_way = {task.remote(replace(cell, grid=grid)): cell for cell in cells}
    while under_way:
        (ended, *_), _ = ray.wait(list(under_way))
        cell = under_way.pop(ended)
        try:
            ray.get(ended)
        except ray.exceptions.RayError as error:
            raise ValueError(f"{cell.name}: stopped, the same command goes on ({reason_of(error)})") from None
        _ended(cell, progress)


def _work_far_away(cell: Cell) -> None:
    _work(cell, _opened(cell.grid.data).limited(cell.grid.limit))


@lru_cache(maxsize=1)
def _opened(data: str) -> Source:
    """Keep open what many cells of one worker are trained on."""
    return open_source(data)


def _work(cell: Cell, source: Source) -> None:
    grid = cell.grid
    arch, options = grid.network(cell.variant)
    # To the cell's own log goes also what would be drawn over the board.
    log = plain_file(grid.out / f"{cell.name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with os.fdopen(log, "a") as file, redirect_stderr(file):
        if not (_read(cell.folder / "summary.json") or {}).get("finished"):  # one that was stopped has a summary too
            say = partial(print, file=file, flush=True)
            how: dict[str, Any] = {"seed": cell.seed, "device": grid.device, "workers": grid.workers, "log": say, **options}
            try:
                train(arch, source, grid.recipe, cell.folder, **how)
            except FloatingPointError as error:  # a result too
                write_record(cell.folder / "diverged.json", {"reason": str(error)}, grid.device)
                return
        forms = compare_forms(load(cell.folder / "last.safetensors"), source, grid.device)
        write_record(cell.folder / "forms.json", forms, grid.device)


# ---------------------------------------------------------------------------------------------------------------- settings


def _try_out(grid: Grid, source: Source) -> None:
    """Check that every variant can be built."""
    for variant in grid.variants:
        arch, options = grid.network(variant)
        with torch.device("meta"):
            zoo.create_model(arch, num_classes=len(source.classes), in_chans=source.preprocessing.input_size[0], **options)


def settle(grid: Grid) -> None:
    """Make the folder this grid's. Raises ValueError, naming what differs, if it is another's."""
    path = grid.out / "grid.json"
    wanted = json.loads(json.dumps(grid.settings))
    if not path.exists():
        write_text(path, json.dumps(wanted, indent=2) + "\n")
    found = {**asdict(Recipe()), **(_read(path) or {})}  # a recipe's fields may have been fewer then
    if other := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
        differences = ", ".join(f"{name} {found.get(name)} there and {wanted.get(name)} here" for name in other)
        raise ValueError(f"{grid.out} holds a grid with other settings ({differences}): name another --out")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise FileError(f"{path}: cannot be read as JSON: remove it, and what it stood for is done again") from None
    return found if isinstance(found, dict) else None


# ---------------------------------------------------------------------------------------------------------- what people see


def _ended(cell: Cell, progress: Progress) -> None:
    progress.say(f"{cell.name}: {cell.state}; {_summary(cell.grid)}")
    progress.add(1, lambda: "cells", "cell")


def _summary(grid: Grid) -> str:
    done = [outcome for cell in grid.cells if (outcome := cell.outcome)]
    times = [outcome.seconds for outcome in done if outcome.seconds]
    mean = statistics.mean(times) if times else 0.0
    each = f", {mean / 60:.1f} minutes each" if mean >= 60 else f", {mean:.0f} s each" if mean else ""
    return f"{len(done)} of {len(grid.cells)} cells done{each}"


def _table(grid: Grid) -> Any:
    """Return how far every cell is, as a table for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    seeds = range(grid.seeds)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("", *(f"seed {seed}" for seed in seeds)):
        table.add_column(header)
    for variant in dict.fromkeys(grid.variants):
        table.add_row(variant, *(Cell(grid, variant, seed).state for seed in seeds))
    return Group(f"{grid.out}: {_summary(grid)}", table)
