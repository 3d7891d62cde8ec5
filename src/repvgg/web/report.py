"""The page of a run, run.html: how it learned, what it confuses, its worst mistakes, what it saw, what it costs, how it was made.

    write_report(Path("runs/photos"))                 # run.html, report.json and report/*.png in the run folder
    write_comparison([Path("runs/a"), Path("runs/b")], Path("compare.html"))

Curves, confusion and settings come from the run folder alone; pictures need the images that it was trained on.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from repvgg.data import Source
from repvgg.disk import Log, atomically, write_text
from repvgg.measure.machine import write_record
from repvgg.models.load import load
from repvgg.train.logs import TITLES
from repvgg.train.recipes import Recipe
from repvgg.web import charts, findings, page
from repvgg.web.findings import Mistakes, Speeds
from repvgg.web.run_folder import NAMES, RunFolder, open_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HARDEST = 100  # classes in the table
SHOWN = 100  # points of the learning rate


def write_report(folder: Path, source: Source | None = None, data: str = "", device: str = "cpu", log: Log = print) -> Path:
    """Write run.html into a run folder, a PNG of each picture on it (report/) and its figures (report.json). Returns its path.

    source: the images that it was trained on; by default opened from `data`, which says where they are now, by default where they
    were. Raises `FileError` for a folder that holds no run.
    """
    run = open_run(folder)
    source = source or run.source(data, log)
    both = findings.forms(load(folder / "best.safetensors"), log)
    speeds = findings.speeds(both, device)
    pieces = Pieces(folder / "report")
    sections = [("How it learned", _learning(run, pieces)), ("What it confuses", _confusion(run, pieces))]
    if source is not None:
        source = run.as_trained(source)
        network = both.get("deploy form", both["training form"])
        with TemporaryDirectory() as beside:  # the run's own list is left as it is
            skipping = (folder / "bad_images.txt").exists()  # it was trained with --on-bad-image skip
            bad = Path(beside) / "bad_images.txt" if skipping else None
            sections.append(("Its worst mistakes", _mistakes(findings.mistakes(network, source, device, bad), run, pieces)))
            batch = findings.first_batch(source, run.recipe, int(run.settings.get("seed", 0)), bad)
        sections.append(("What it saw", _first_batch(batch, pieces)))
    sections += [("What it costs", _costs(speeds)), ("How it was made", _settings(run))]
    target = folder / "run.html"
    html = page.page(run.title, [(title, body) for title, body in sections if body], _lead(run))
    write_text(target, html)
    write_record(folder / "report.json", _figures(run, speeds))
    return target


class Pieces:
    """The pictures of a page, each also kept as a PNG in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def chart(self, name: str, figure: "Figure", caption: str = "") -> str:
        atomically(self.folder / f"{name}.png", partial(figure.savefig, format="png", dpi=200))
        return page.svg(figure, caption)

    def picture(self, name: str, image: Image.Image, alt: str, caption: str = "") -> str:
        data = io.BytesIO()
        image.save(data, "PNG", optimize=True)
        atomically(self.folder / f"{name}.png", lambda path: path.write_bytes(data.getvalue()))
        return page.png(image, alt, caption)


def _lead(run: RunFolder) -> str:
    best, name = run.best_line, NAMES[run.measure]
    if best is None:
        return ""
    text = f"Its best {name} is {best[f'val_{run.measure}']:.1%}, after epoch {best['epoch'] + 1} of {run.settings.get('epochs')}"
    text += f", of {run.best.images:,} images that it was not trained on." if run.best else "."
    if run.seconds is not None:
        text += f" It was trained for {duration(run.seconds)}."
    return text + ("" if run.finished else " The run has not come to its end.")


# ------------------------------------------------------------------------------------------------------------------- the sections


def _learning(run: RunFolder, pieces: Pieces) -> str:
    drawn = []
    for name, title in TITLES.items():
        scale = 1 if name == "loss" else 100
        training = run.curve(f"train_{name}", scale) or run.curve(name, scale)
        lines = {"training": training, "validation": run.curve(f"val_{name}", scale)}
        if not lines["validation"]:
            continue
        best = None
        if run.best_line is not None and name == run.measure:
            best = (run.best_line["epoch"] + 1.0, scale * run.best_line[f"val_{name}"])
        drawn.append(pieces.chart(name, charts.curves(title, lines, best, level=name == "loss")))
    recipe = run.recipe
    planned = [(recipe.epochs * i / SHOWN, recipe.lr_at(i / SHOWN)) for i in range(SHOWN + 1)]
    drawn.append(pieces.chart("learning_rate", charts.curves("learning rate, as the recipe says", {"": planned}, level=True)))
    return page.charts(drawn)


def _confusion(run: RunFolder, pieces: Pieces) -> str:
    """Return the confusion matrix and the table of classes; nothing where the run's state is gone."""
    if run.best is None:
        return ""
    classes = run.manifest.classes or []
    unit = "images" if run.task.kind == "labels" else "pixels"
    title = f"{unit}, by true and predicted class"
    drawn = pieces.chart("confusion", charts.confusion(run.best.confusion, classes, title))
    rows, header = class_table(run)
    shown = page.table(rows[:HARDEST], header)
    more = page.paragraph(f"The {HARDEST} hardest of {len(rows)} classes.") if len(rows) > HARDEST else ""
    told = (
        f"The best model on {run.best.images:,} validation images. A row is what a class was taken for, in a stronger colour where "
        "it is a larger share."
    )
    return page.paragraph(told) + drawn + more + shown


def class_table(run: RunFolder) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return a row for each class, the hardest first: of labels with precision, recall and F1, of masks with IoU."""
    best: Any = run.best
    there = best.confusion.sum(1).double()
    if run.task.kind == "labels":
        header: tuple[str, ...] = ("class", "images", "precision", "recall", "F1")
        columns: tuple[list[str], ...] = (
            [f"{count:,.0f}" for count in there.tolist()],
            *map(percents, (best.precision, best.per_class, best.f1)),
        )
        order = best.f1
    else:
        header = ("class", "of the pixels", "recognised", "IoU")
        columns = tuple(map(percents, ((there / there.sum()).tolist(), (best.confusion.diag() / there).tolist(), best.per_class)))
        order = best.per_class
    rows = list(zip(run.manifest.classes or [], *columns, strict=True))
    hardest = sorted(range(len(rows)), key=lambda i: (math.isnan(order[i]), order[i]))
    return [rows[i] for i in hardest], header


def _mistakes(mistakes: Mistakes, run: RunFolder, pieces: Pieces) -> str:
    looked = f"Of {mistakes.images:,} validation images that were looked at"
    if not mistakes.worst:
        return page.paragraph(f"{looked}, none was mistaken.")
    pictures = [mistake.picture for mistake in mistakes.worst]
    if run.task.kind == "labels":
        pieces.picture("mistakes", findings.mosaic(pictures), "the worst mistakes")
        told = page.paragraph(f"{looked}, these are the ones whose true class it gave the least chance; as the network saw them.")
        captions = [f"{m.true}, taken for {m.taken} ({m.surely:.0%})" for m in mistakes.worst]
        return told + page.grid(page.png(m.picture, m.true, words) for m, words in zip(mistakes.worst, captions, strict=True))
    told = page.paragraph(f"{looked}, in these the largest share of the pixels is wrong. Left what is true, right what was found.")
    shown = [
        pieces.picture(f"mistake-{i}", m.picture, m.true, f"{m.surely:.1%} wrong, most of it {m.true} taken for {m.taken}")
        for i, m in enumerate(mistakes.worst, 1)
    ]
    return told + page.charts(shown)


def _first_batch(batch: Image.Image, pieces: Pieces) -> str:
    told = "The beginning of the first training batch, augmented: what the network was shown."
    return page.paragraph(told) + pieces.picture("first_batch", batch, "a mosaic of augmented training images")


def _costs(speeds: Speeds) -> str:
    rows = [
        (
            name,
            f"{cost.params / 1e6:,.2f}",
            f"{cost.macs / 1e9:,.3f}",
            f"{cost.winograd_muls / 1e9:,.3f}",
            f"{cost.peak_activation_bytes / 2**20:,.1f}",
            f"{speeds.batch / speeds.times[name].median:,.1f}",
            " to ".join(f"{speeds.batch / seconds:,.1f}" for seconds in reversed(speeds.times[name].quartiles)),
        )
        for name, cost in speeds.costs.items()
    ]
    header = ("", "parameters, M", "MACs, G", "Winograd MULs, G", "activations, MiB", "images/s", "quartiles")
    told = f"Of one image of {' x '.join(map(str, speeds.size))}. Speeds are PyTorch's in float32 on {speeds.device}, "
    told += f"{speeds.batch} images at a time, the forms taking turns over {findings.ROUNDS} rounds."
    if speeds.gain:
        told += f" The deploy form has {speeds.gain} the speed (95% interval); other engines are faster: `repvgg bench`."
    return page.paragraph(told) + page.table(rows, header)


def _settings(run: RunFolder) -> str:
    recipe = {f.name: f.default for f in fields(Recipe)}
    first = {name: value for name, value in run.settings.items() if name not in recipe and value not in ("", None)}
    changed = {name: run.settings[name] for name, value in recipe.items() if run.settings.get(name, value) != value}
    rest = {name: run.settings[name] for name in recipe if name in run.settings and name not in changed}
    shown = [(name.replace("_", " "), value) for name, value in {**first, **changed}.items() if not isinstance(value, dict)]
    parts = [page.table(shown, ("setting", ""))]
    parts.append(
        page.folded(
            "Settings left at their usual values", page.table([(n.replace("_", " "), v) for n, v in rest.items()], ("setting", ""))
        )
    )
    if run.machine:
        parts += [page.heading("The machine that it was trained on"), page.machine(run.machine)]
    return "".join(parts)


def _figures(run: RunFolder, speeds: Speeds) -> dict[str, Any]:
    return {
        "run": run.title,
        f"best_{run.measure}": run.best_line[f"val_{run.measure}"] if run.best_line else None,
        "epochs": len(run.evaluations),
        "seconds": run.seconds,
        "confusion": run.best.confusion.tolist() if run.best and len(run.best.confusion) <= HARDEST else None,
        "batch_size": speeds.batch,
        "params": {name: cost.params for name, cost in speeds.costs.items()},
        "macs": {name: cost.macs for name, cost in speeds.costs.items()},
        "seconds_per_batch": {name: {"median": t.median, "quartiles": t.quartiles} for name, t in speeds.times.items()},
        "speedup": [speeds.gain.value, speeds.gain.low, speeds.gain.high] if speeds.gain else None,
    }


# ------------------------------------------------------------------------------------------------------------------ side by side


def write_comparison(folders: Iterable[Path], out: Path) -> list[tuple[str, ...]]:
    """Write a page that sets runs side by side. Returns the rows of its table, the best first; the header is `COMPARED`.

    Raises `FileError` for a folder that holds no run, ValueError for runs of labels and of masks together.
    """
    runs = [open_run(folder) for folder in folders]
    if len({run.measure for run in runs}) > 1:
        raise ValueError("some of these runs learned labels and some masks: compare them apart")
    measure = runs[0].measure
    runs.sort(key=lambda run: -(run.best_line or {}).get(f"val_{measure}", 0))
    rows = [_row(run) for run in runs]
    drawn = []
    for name in ("loss", measure):
        scale = 1 if name == "loss" else 100
        lines = {str(run.path): run.curve(f"val_{name}", scale) for run in runs}
        drawn.append(page.svg(charts.curves(f"validation: {TITLES[name]}", lines, level=name == "loss")))
    sections = [
        ("The runs", page.table(rows, COMPARED)),
        ("How they learned", page.charts(drawn)),
        ("What differs", _differences(runs)),
        ("Class by class", _classes(runs)),
    ]
    html = page.page(f"{len(runs)} runs side by side", [(title, body) for title, body in sections if body])
    write_text(out, html)
    return rows


COMPARED = ("run", "model", "data", "images", "best", "epoch", "last", "of epochs", "time")


def _row(run: RunFolder) -> tuple[str, ...]:
    key, best, lines = f"val_{run.measure}", run.best_line or {}, run.evaluations
    return (
        str(run.path),
        str((run.manifest.arch or {}).get("name", "")),
        str(run.settings.get("data", "")),
        f"{run.settings.get('images', 0):,}",
        percent(best.get(key, math.nan)),
        str(best.get("epoch", -1) + 1),
        percent(lines[-1][key] if lines else math.nan),
        f"{len(lines)} of {run.settings.get('epochs', len(lines))}",
        "" if run.seconds is None else duration(run.seconds),
    )


def _differences(runs: list[RunFolder]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    if not differing:
        return page.paragraph("Nothing: all settings are the same.")
    rows = [(name.replace("_", " "), *(run.settings.get(name, "") for run in runs)) for name in differing]
    return page.table(rows, ("setting", *(str(run.path) for run in runs)))


def _classes(runs: list[RunFolder]) -> str:
    """Return each class's F1, or IoU, in every run; nothing where they are of other classes."""
    if any(run.best is None or run.manifest.classes != runs[0].manifest.classes for run in runs):
        return ""
    tables = [{row[0]: row[-1] for row in class_table(run)[0]} for run in runs]
    rows = [(name, *(found[name] for found in tables)) for name in list(tables[0])[:HARDEST]]
    what = "F1" if runs[0].task.kind == "labels" else "IoU"
    told = page.paragraph(f"The {what} of each class, the first run's hardest first.")
    return told + page.table(rows, ("class", *(str(run.path) for run in runs)))


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def percents(shares: Iterable[float]) -> list[str]:
    return [percent(share) for share in shares]


def duration(seconds: float) -> str:
    """Write a time in words: 42 s, 12.3 min, 5.0 h."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
