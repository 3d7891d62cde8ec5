"""`repvgg paper`: produce tables and figures, print them, and leave them behind as JSON, PNG, SVG and one page."""

import difflib
import json
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from repvgg.deploy import engines
from repvgg.disk import FileError, atomically, write_text
from repvgg.measure.machine import this_machine, write_record
from repvgg.models.names import resolve_name
from repvgg.paper.result import NothingChosenError, PaperSettings, Result
from repvgg.terminal import print_table
from repvgg.web import page

TITLE = "The RepVGG paper, measured here"
# In the order of the page.
PARTS = (
    "figure1",
    "table4",
    "table5",
    "training_vs_deploy",
    "table6",
    "table7",
    "figure2",
    "figure3",
    "figure4",
    "table1",
    "winograd",
    "table2",
    "table3",
    "table8",
)


def paper(part: str, settings: PaperSettings, with_json: bool = False) -> None:
    """Produce one part, or "all" of them and a page, in the folder `settings.out`.

    Raises ValueError for an unknown part or model, and for what its engine lacks.
    """
    if part != "all" and part not in PARTS:
        close = difflib.get_close_matches(part, [*PARTS, "all"], n=3, cutoff=0.3) or [*sorted(PARTS), "all"]
        raise ValueError(f"the paper has no {part!r} here: did you mean {', '.join(close)}?")
    for model in settings.models:
        resolve_name(model)
    engines.check(settings.one_engine, settings.precision, settings.device)
    settings.out.mkdir(parents=True, exist_ok=True)
    if part != "all":
        show(part, produce(part, settings), settings, with_json)
        return
    refuse_another_page(settings.out / "index.html")
    started = time.perf_counter()
    results = {}
    for number, name in enumerate(PARTS, 1):
        settings.log(f"{name}, {number} of {len(PARTS)}")
        try:
            results[name] = produce(name, settings)
        except NothingChosenError as error:
            settings.log(f"{name} left out: {error}")
        else:
            show(name, results[name], settings, with_json)
    html = as_page(results, settings)
    write_text(settings.out / "index.html", html)
    settings.log(f"all in {(time.perf_counter() - started) / 60:.1f} minutes: {settings.out / 'index.html'}")


def refuse_another_page(path: Path) -> None:
    """Raise `FileError` where a page of something else would be lost."""
    if path.exists() and TITLE.encode() not in path.read_bytes():
        raise FileError(f"{path}: is the page of something else, which would be lost: name another --out")


def produce(part: str, settings: PaperSettings) -> Result:
    """Run a part, write its JSON and figures, and return it."""
    result: Result = import_module(f"repvgg.paper.{part}").run(settings)
    keep(part, result, settings)
    return result


def keep(part: str, result: Result, settings: PaperSettings) -> None:
    """Write a part's JSON and figures."""
    write_record(settings.out / f"{part}.json", to_record(result, settings), settings.device)
    for name, figure in result.figures.items():
        for kind in ("png", "svg"):
            atomically(settings.out / f"{name}.{kind}", partial(figure.savefig, format=kind, dpi=200))


def to_record(result: Result, settings: PaperSettings) -> dict[str, object]:
    """Return what a part's file holds beside the machine."""
    return {
        "title": marked(result.title, settings),
        "quick": settings.quick,
        "tables": [
            {
                "title": marked(t.title, settings),
                "header": t.header,
                "rows": [["" if c is None else str(c) for c in row] for row in t.rows],
            }
            for t in result.tables
        ],
        "how": result.how,
        "why": result.why,
        "data": result.data,
    }


def show(part: str, result: Result, settings: PaperSettings, with_json: bool) -> None:
    """Print the tables and the paragraph, or the part's JSON."""
    if with_json:
        print((settings.out / f"{part}.json").read_text(), end="")
        return
    print(f"\n{result.title}")
    for t in result.tables:
        print_table(t.header, [["" if cell is None else cell for cell in row] for row in t.rows], marked(t.title, settings))
    for text in filter(None, (result.how, result.why)):
        print(textwrap.fill(text, 120))
    written = [f"{part}.json", *(f"{name}.{kind}" for name in result.figures for kind in ("png", "svg"))]
    settings.log(f"written: {', '.join(str(settings.out / name) for name in written)}")


def as_page(
    results: Mapping[str, Result],
    settings: PaperSettings,
    stamps: Mapping[str, dict[str, Any]] | None = None,
    drawn: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return all parts as one self-contained HTML document.

    stamps: what each part was measured on, as `this_machine` records it; by default this machine, now. drawn: by part, figures that
    are HTML already, beside those of the results.
    """
    told: dict[str, str] = {}  # a protocol that several parts share, by the first that tells it
    sections = []
    for part, result in results.items():
        figures = [*(drawn or {}).get(part, ()), *map(page.svg, result.figures.values())]
        sections.append((marked(result.title, settings), "\n".join(_pieces(result, settings, told, figures))))
    stamps = stamps or dict.fromkeys(results, this_machine(settings.device))
    sections.append(("Measured on", "\n".join(_measured(results, stamps))))
    about = next(iter(stamps.values()), this_machine(settings.device))
    lead = (
        f"{len(results)} of the {len(PARTS)} parts of “RepVGG: Making VGG-style ConvNets Great Again” that repvgg paper knows, "
        f"beside what was measured on {about.get('gpu') or about['processor']}."
    )
    if left_out := [part for part in PARTS if part not in results]:
        lead += f" Left out, for want of data to train on or of a model that is in them: {', '.join(left_out)}."
    if settings.quick:
        lead += " This is a quick look: small batches, few rounds, a handful of models. Intervals are wide, and say so."
    return page.page(TITLE, sections, lead)


def _pieces(result: Result, settings: PaperSettings, told: dict[str, str], figures: Iterable[str]) -> Iterable[str]:
    first = told.setdefault(result.how, result.title)
    how = result.how if not result.how or first == result.title else f"Measured as for {first.partition(':')[0]}."
    yield from (page.paragraph(text) for text in (how, result.why) if text)
    yield from figures
    for t in result.tables:
        title, table = marked(t.title, settings), page.table(t.rows, t.header)
        yield page.folded(title, table) if t.folded else f"{page.heading(title)}\n{table}"


def _measured(results: Mapping[str, Result], stamps: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Say on what the parts were measured, and when; of parts that keep speeds, when those were timed."""
    machines: dict[str, tuple[dict[str, Any], list[str]]] = {}
    rows = []
    for part, stamp in stamps.items():
        about = {name: value for name, value in stamp.items() if name not in ("date", "commit")}
        title = results[part].title.partition(":")[0]
        machines.setdefault(json.dumps(about, sort_keys=True), (about, []))[1].append(title)
        timed = list(_timed(results[part].data))
        days = sorted(date for date, _ in timed) or [stamp["date"]]
        commits = dict.fromkeys(commit or "not kept" for _, commit in timed) or [stamp["commit"] or "unknown"]
        rows.append((title, " to ".join(dict.fromkeys((days[0][:16], days[-1][:16]))), ", ".join(commits)))
    for about, titles in machines.values():
        if len(machines) > 1:
            yield page.paragraph(f"{'; '.join(titles)}:")
        yield page.machine(about)
    yield page.table(rows, ("", "when (UTC)", "commit"))
    yield page.paragraph("A part that keeps speeds: when those were timed; any other: when it was written.")


def _timed(data: Any) -> Iterator[tuple[str, str]]:
    """Find the speeds in what a part keeps: the date of each and the commit."""
    if isinstance(data, Mapping) and "reference_seconds" in data:
        yield data["date"], data.get("commit", "")
    for inner in data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ():
        yield from _timed(inner)


def marked(title: str, settings: PaperSettings) -> str:
    return f"{title} (quick)" if settings.quick and title else title
