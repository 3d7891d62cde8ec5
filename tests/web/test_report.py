"""The page of a run: its figures are those of the run's own files, and of an evaluation made anew."""

import asyncio
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, browsing
from PIL import Image

from repvgg.data import open_source
from repvgg.disk import FileError
from repvgg.models.load import load
from repvgg.train.evaluate import evaluate_model
from repvgg.train.loop import train
from repvgg.train.recipes import get_recipe
from repvgg.web.report import duration, write_comparison, write_report
from repvgg.web.run_folder import open_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two short runs that differ in their learning rate, on the same 200 scans."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lr in (("a", 0.1), ("b", 0.02)):
        source = open_source("digits").limited(200, 0)
        recipe = replace(get_recipe("demo"), epochs=2, batch_size=40, lr=lr)
        train("repvgg_micro", source, recipe, folder / name, width=0.125, log=lambda line: None)
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path]) -> str:
    return write_report(runs[0]).read_text()


def test_the_figures_are_those_of_the_model_in_the_folder(runs: tuple[Path, Path], page: str) -> None:
    source = open_source("digits").limited(200, 0)
    accuracy = evaluate_model(load(runs[0] / "best.safetensors"), source)
    figures = json.loads((runs[0] / "report.json").read_text())
    assert figures["confusion"] == accuracy.confusion.tolist()
    assert figures["best_top1"] == pytest.approx(accuracy.top1)
    assert f"Its best top-1 is {accuracy.top1:.1%}" in page
    hits, taken, there = accuracy.confusion.diag(), accuracy.confusion.sum(0), accuracy.confusion.sum(1)
    for name, hit, predicted, true in zip(source.classes, hits.tolist(), taken.tolist(), there.tolist(), strict=True):
        (row,) = re.findall(rf"<tr><td[^>]*>{name}</td>(.*?)</tr>", page)
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
        precision, recall = hit / predicted if predicted else None, hit / true if true else None
        assert cells[0] == str(true)
        assert cells[1] == (f"{precision:.1%}" if precision is not None else "-")
        assert cells[2] == (f"{recall:.1%}" if recall is not None else "-")
        if precision and recall:
            assert float(cells[3].rstrip("%")) == pytest.approx(200 * precision * recall / (precision + recall), abs=0.051)


def test_the_mistakes_are_mistakes_and_the_worst_first(runs: tuple[Path, Path], page: str) -> None:
    source, model = open_source("digits").limited(200, 0), load(runs[0] / "best.safetensors")
    from repvgg.train.evaluate import batches

    wrong = []
    for x, y in batches(source.val, source.preprocessing, 64):
        with torch.no_grad():
            logits = model(x)
        for row, label in zip(logits.double(), y.tolist(), strict=True):
            if int(row.argmax()) != label:
                wrong.append((float(row[label] - row.logsumexp(0)), str(label), str(int(row.argmax()))))
    wrong.sort()
    shown = re.findall(r"<figcaption>(\d), taken for (\d) \(\d+%\)", page)
    assert shown == [(true, taken) for _, true, taken in wrong[:24]]


def test_every_picture_is_also_a_file(runs: tuple[Path, Path], page: str) -> None:
    names = sorted(path.name for path in (runs[0] / "report").iterdir())
    assert names == ["confusion.png", "first_batch.png", "learning_rate.png", "loss.png", "mistakes.png", "top1.png"]
    for name in names:
        with Image.open(runs[0] / "report" / name) as image:
            assert min(image.size) > 100
    assert page.count("<svg") == 4


def test_without_the_images_there_is_a_page_without_pictures_of_them(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    shutil.rmtree(folder / "state")  # as one does who needs the room
    recorded = open_run(folder)
    assert recorded.best is None
    said: list[str] = []
    said_of = replace(recorded, settings={**recorded.settings, "data": str(tmp_path / "gone")})
    assert said_of.source("", said.append) is None
    assert said == [
        f"{folder}: without pictures, as the images are not to be had (no data {str(tmp_path / 'gone')!r}: "
        + said[0].partition(f"{str(tmp_path / 'gone')!r}: ")[2]
    ]
    with pytest.raises(ValueError, match="no data"):
        recorded.source("nothing-of-the-kind", said.append)


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.slow), "killed"])
def test_a_run_that_was_ended_early_has_a_page_that_says_so(how: str, runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    summary = folder / "summary.json"
    if how == "killed":
        summary.unlink()
    else:
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "finished": False}))
    assert "has not come to its end" not in write_report(runs[1]).read_text()
    html = write_report(folder).read_text()
    assert "The run has not come to its end." in html
    assert "What it confuses" in html


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no run folder, it has no metrics"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(FileError, match="no epoch of this run has ended"):
        write_report(tmp_path)


def test_runs_side_by_side(runs: tuple[Path, Path], tmp_path: Path) -> None:
    rows = write_comparison(runs, tmp_path / "compare.html")
    best = {str(folder): max(line["val_top1"] for line in open_run(folder).evaluations) for folder in runs}
    assert [row[0] for row in rows] == sorted(best, key=lambda name: -best[name])
    assert {row[0]: row[4] for row in rows} == {name: f"{share:.1%}" for name, share in best.items()}
    html = (tmp_path / "compare.html").read_text()
    assert html.count("<svg") == 2
    (differs,) = re.findall(r"What differs</h2>\n(.*?)</section>", html, re.DOTALL)
    assert re.findall(r"<tr><td[^>]*>([\w ]+)</td>", differs) == ["lr"]


async def shown_on_a_telephone(path: Path, profile: Path) -> dict[str, Any]:
    """What each colour scheme makes of the page: its background, its width, and the width that each card holds and has room for."""
    found = {}
    async with browsing(profile) as browser:
        await browser.do("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        await browser.do("Page.navigate", url=path.as_uri())
        await browser.until("complete", "location.protocol == 'file:' ? document.readyState : null")
        for scheme in ("light", "dark"):
            await browser.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            found[scheme] = (
                await browser.value("getComputedStyle(document.body).backgroundColor"),
                await browser.value("document.documentElement.scrollWidth"),
                await browser.value("[...document.querySelectorAll('.card')].map(card => [card.scrollWidth, card.clientWidth])"),
            )
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_no_chart_is_cut_on_a_telephone(runs: tuple[Path, Path], page: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    found = asyncio.run(shown_on_a_telephone(runs[0] / "run.html", tmp_path))
    assert len({background for background, _, _ in found.values()}) == 2
    for _, width, cards in found.values():
        assert width <= 360
        assert len(cards) == page.count("<svg") == 4
        assert [card for card in cards if card[0] > card[1]] == []


@pytest.mark.parametrize(("seconds", "words"), [(42, "42 s"), (738, "12.3 min"), (18000, "5.0 h")])
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
