"""findings.py: what is finished in a grid's folder, of one learning rate or several; speeds are measured once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from repvgg.measure.timing import Times
from repvgg.paper import findings, table6, table7
from repvgg.paper.grid import TABLES, Grid
from repvgg.paper.result import NothingChosenError, PaperSettings
from repvgg.train.recipes import get_recipe

RECIPE = replace(get_recipe("demo"), epochs=3)


def cell(folder: Path, top1: float, *by_epoch: float) -> None:
    """A finished cell."""
    folder.mkdir(parents=True)
    for file, facts in (("summary", {"finished": True, "last_top1": top1, "seconds": 1.0}), ("forms", {"equal": 9, "images": 9})):
        (folder / f"{file}.json").write_text(json.dumps(facts))
    lines = [{"step": 1, "loss": 1.0}, *({"step": 9 * i, "epoch": i, "val_top1": y} for i, y in enumerate(by_epoch, 1))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def begun(folder: Path, lr: float) -> Path:
    """A grid's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = Grid(folder, "digits", replace(RECIPE, lr=lr), width=0.25, seeds=3)
    (folder / "grid.json").write_text(json.dumps(grid.settings))
    return folder


def settings(out: Path) -> PaperSettings:
    return PaperSettings(out=out, log=lambda line: None)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Grid]:
    """The grids whose speeds were measured."""
    calls: list[Grid] = []

    def measured(grid: Grid, settings: PaperSettings) -> dict[str, Times]:
        calls.append(grid)
        return {name: Times([[1.0], [2.0]]) for name in grid.variants}

    monkeypatch.setattr(findings, "_time", measured)
    return calls


def test_speeds_are_measured_once(tmp_path: Path, timed: list[Grid]) -> None:
    for variants in (("plain",), ("plain", "acb"), ("plain",)):
        grid = Grid(tmp_path, "digits", RECIPE, variants=variants)
        found = findings.training_speeds(grid, settings(tmp_path))
        assert [(name, t.by_round) for name, t in found.items()] == [(name, [1, 2]) for name in variants]
    assert len(timed) == 2
    for number, other in enumerate(({"batch_size": 3}, {"precision": "bf16"}, {"channels_last": False}), 3):
        findings.training_speeds(grid, replace(settings(tmp_path), **other))  # type: ignore[arg-type]
        assert len(timed) == number


def test_one_learning_rate(tmp_path: Path, timed: list[Grid]) -> None:
    out = begun(tmp_path / "ablation", 0.1)
    for name, top1 in (("plain-0", 0.5), ("plain-1", 0.6), ("repvgg-0", 0.75)):
        cell(out / name, top1)
    (out / "no_1x1-0").mkdir()  # begun
    result = table6.run(settings(tmp_path))
    assert len(result.tables) == 1  # there was no pilot
    rows = result.tables[0].rows
    assert [(row[:2], row[3], row[4]) for row in rows] == [(("no", "no"), "55.00 ± 7.07", "2"), (("yes", "yes"), "75.00", "1")]
    assert "repvgg_b0, width 0.25, on digits, 3 epochs of batch 64, learning rate 0.1;" in result.how
    assert "too few seeds to tell" in result.why
    assert table7.run(settings(tmp_path)).data["variants"].keys() == {"repvgg"}
    with pytest.raises(NothingChosenError, match="has finished: nothing yet"):
        table7.run(settings(tmp_path / "other"))


def test_several_learning_rates(tmp_path: Path, timed: list[Grid]) -> None:
    slow, fast = (begun(tmp_path / "ablation" / f"lr-{lr}", lr) for lr in (0.1, 0.2))
    cell(slow / "plain-0", 0.5, 0.1, 0.5)
    cell(slow / "plain-1", 0.6, 0.3, 0.6)
    cell(slow / "repvgg-0", 0.75)
    cell(fast / "plain-0", 0.9, 0.8, 0.9)  # better, but of fewer seeds
    cell(fast / "repvgg-0", 0.8, 0.2, 0.8)
    (fast / "no_1x1-0").mkdir()
    (fast / "no_1x1-0" / "diverged.json").write_text(json.dumps({"reason": "no number"}))
    found = findings.kept(tmp_path / "ablation", (*TABLES[:4], "resnet50"), settings(tmp_path))
    assert found.rates == {"plain": 0.1, "no_1x1": 0.2, "repvgg": 0.2}
    assert found.cells == {"plain": [50, 60], "no_1x1": [None], "repvgg": [80]}
    assert found.pilot == {
        "plain": {"0.1": 0.5, "0.2": 0.9},
        "no_1x1": {"0.1": None, "0.2": "diverged"},
        "no_identity": {"0.1": None, "0.2": None},
        "repvgg": {"0.1": 0.75, "0.2": 0.8},
    }
    assert found.curves == {"plain": [[0.1, 0.5], [0.3, 0.6]], "no_1x1": [], "repvgg": [[0.2, 0.8]]}
    assert found.curve("plain") == pytest.approx([20, 55])
    assert found.curve("no_1x1") == []
    result = table6.run(settings(tmp_path))
    assert [row[0] for row in result.tables[1].rows] == list(TABLES[:4])
    assert "Finished so far: 5 of 8 trainings of the pilot" in result.why
    assert {"table6", "table6-curves"} == set(result.figures)


def test_grids_of_other_settings_are_refused(tmp_path: Path, timed: list[Grid]) -> None:
    for number, width in enumerate((0.25, 0.5)):
        out = begun(tmp_path / "ablation" / str(number), 0.1 * (1 + number))
        (out / "grid.json").write_text(json.dumps({**json.loads((out / "grid.json").read_text()), "width": width}))
        cell(out / "plain-0", 0.5)
    with pytest.raises(NothingChosenError, match="ablation holds grids of different width, which make no table together"):
        table6.run(settings(tmp_path))
    assert not timed
