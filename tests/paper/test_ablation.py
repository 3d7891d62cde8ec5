"""Tables 6 and 7, of a grid whose outcomes are the paper's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg import cli
from repvgg.measure.timing import Times
from repvgg.paper import ablation, table6, table7
from repvgg.paper.agreement import PRINTED
from repvgg.paper.findings import Findings
from repvgg.paper.grid import TABLES, Grid, Outcome
from repvgg.paper.numbers import TABLE6
from repvgg.paper.result import NothingChosenError, PaperSettings
from repvgg.train.recipes import get_recipe

FORMS = {"images": 1000, "equal": 999, "max_rel_err": 1e-6}
REFUSED = {"refused": "stem.block.conv_kxk.relu: ReLU"}


def found(*variants: str, out: Path = Path("x"), spread: float = 0.0) -> Findings:
    """Of the paper's accuracies, over three seeds `spread` apart, and the paper's speeds."""
    speeds = {row.block: row.speed for row in TABLE6}

    def cells(variant: str) -> list[Outcome]:
        top1 = PRINTED.get(variant, ("", 70.0))[1]
        forms = REFUSED if variant == "relu_in_branch" else FORMS
        return [Outcome(variant, s, (top1 + spread * (s - 1)) / 100, 60, forms) for s in range(3)]

    return Findings(
        Grid(out, "digits", get_recipe("demo"), variants=variants, seeds=3),
        {name: cells(name) for name in variants},
        {name: Times([[8 / speeds.get(name, 500)]] * 3) for name in variants},
        8,
    )


def test_says_what_the_paper_says() -> None:
    result = ablation.report(
        "Both", found(*TABLES, spread=0.5), PaperSettings(), (ablation.table6, ablation.table7, ablation.beyond), "x"
    )
    six, seven = result.tables  # and no table of others
    for row, printed in zip(six.rows, TABLE6, strict=True):
        assert row[:3] == ("yes" if printed.identity else "no", "yes" if printed.pointwise else "no", f"{printed.top1:.2f}")
        assert row[3:5] == (f"{printed.top1:.2f} ± 0.50", "3")
        assert row[5] == row[6] == f"{printed.speed:,}"
        assert str(row[7]).startswith(f"{printed.speed / TABLE6[0].speed:.2f}x")
        assert row[8] == "2,997 of 3,000"
    rows = {row[1]: row for row in seven.rows}
    assert list(rows) == ["repvgg", *TABLES[4:]]
    assert rows["repvgg"][5:7] == (None, None)
    for name in TABLES[4:]:
        printed_difference = f"{PRINTED[name][1] - 75.14:+.2f}"
        assert rows[name][5:7] == (printed_difference, f"{printed_difference} ± 0.00")  # of pairs, the spread cancels
    assert rows["relu_in_branch"][-1] == "cannot be folded"
    assert "the order of 11 variants has a rank correlation of 1.00 with the paper's" in result.why
    assert list(result.figures) == ["x"]  # there are no curves here
    data = json.loads(json.dumps(result.data))
    assert data["rank_correlation"] == {"variants": 11, "spearman": pytest.approx(1)}
    assert data["variants"]["acb"]["n"] == 3
    assert data["variants"]["acb"]["deviation"] == pytest.approx(0.5)
    assert data["variants"]["acb"]["cells"][0]["seed"] == 0
    assert result.figures["x"].axes[0].get_yticklabels()[0].get_text() == "+ReLU in branch"  # the paper's best on top


def test_the_pilot_and_the_curves() -> None:
    f = replace(
        found("plain", "repvgg"),
        rates={"plain": 0.1, "repvgg": 0.2},
        pilot={"plain": {"0.1": 0.5, "0.2": "diverged"}, "repvgg": {"0.1": None, "0.2": 0.75}, "acb": {"0.1": None, "0.2": None}},
        curves={"plain": [[0.1, 0.5], [0.3, 0.7]], "repvgg": [[0.2, 0.8]]},
    )
    result = ablation.report("Both", f, PaperSettings(), (ablation.table6,), "x")
    pilot = result.tables[-1]
    assert pilot.header == ("variant", "learning rate 0.1", "learning rate 0.2", "taken")
    assert pilot.rows == [("plain", "50.00", "diverged", "0.1"), ("repvgg", "", "75.00", "0.2"), ("acb", "", "", None)]
    assert "Finished so far: 3 of 6 trainings of the pilot" in result.why
    assert "a pilot with seed 0 at each learning rate of 0.1, 0.2, as many epochs each" in result.how
    axes = result.figures["x-curves"].axes[0]
    drawn = {line.get_label(): np.round(np.asarray(line.get_ydata(), float), 9).tolist() for line in axes.lines}
    assert list(drawn.items()) == [("repvgg (n = 1)", [20, 80]), ("plain (n = 2)", [20, 60])]
    data = json.loads(json.dumps(result.data))
    assert data["pilot"]["plain"] == {"0.1": 0.5, "0.2": "diverged"}
    assert data["variants"]["plain"]["top1_by_epoch"] == [[0.1, 0.5], [0.3, 0.7]]


def test_part_of_a_grid() -> None:
    settings = PaperSettings()
    result = ablation.report("Part", found("dbb", "acb"), settings, (ablation.table6, ablation.table7, ablation.beyond), "x")
    assert [t.title for t in result.tables] == ["Table 7: other structures", "Beyond the paper"]
    (acb,), (dbb,) = (t.rows for t in result.tables)
    assert acb[5:7] == ("-1.56", None)  # there is no full one here to compare with
    assert acb[8] is None  # neither in speed
    assert dbb[:4] == ("dbb", "dbb", None, "70.00 ± 0.00")
    assert "rank correlation" not in result.why
    (resnets,) = ablation.table7(found("resnet50", "resnet50_repvgg"))
    assert resnets.title == "Table 7: RepVGG blocks in ResNet-50"
    assert [row[5:7] for row in resnets.rows] == [(None, None), ("+0.03", "+0.03 ± 0.00")]
    assert ablation.table7(found("repvgg", "plain")) == ablation.beyond(found("repvgg")) == ablation.table6(found("acb")) == []


def test_those_that_diverged_are_told() -> None:
    f = found("plain", "repvgg", "acb")
    f.outcomes["acb"][1:] = [Outcome("acb", 1), Outcome("acb", 2)]
    f.outcomes["repvgg"][:] = [Outcome("repvgg", s) for s in range(3)]
    result = ablation.report("Part", f, PaperSettings(), (ablation.table7,), "x")
    full, acb = result.tables[0].rows
    assert full[3:5] == (None, "0 (3 diverged)")
    assert acb[3:5] == ("73.58", "1 (2 diverged)")
    assert acb[6] is None
    assert result.data["variants"]["repvgg"]["mean"] is None


@pytest.mark.parametrize("quick", [True, False])
def test_with_the_papers_settings(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[Grid] = []

    def find(grid: Grid, settings: PaperSettings) -> Findings:
        grids.append(grid)
        return found(*grid.variants)

    monkeypatch.setattr(ablation, "find", find)
    settings = PaperSettings(data="digits", out=tmp_path, quick=quick, workers=3)
    titles = [part.run(settings).title.partition(":")[0] for part in (table6, table7)]
    assert titles == ["Table 6", "Table 7"]
    assert {*grids[0].variants, *grids[1].variants} == {*TABLES} | (set() if quick else {"resnet50", "resnet50_repvgg"})
    assert grids[0].settings == grids[1].settings
    assert grids[0].out == grids[1].out == tmp_path / ("ablation-quick" if quick else "ablation")
    assert grids[0].arch == "repvgg_b0"
    assert grids[0].workers == 3
    if quick:
        assert (grids[0].width, grids[0].limit, grids[0].recipe) == (0.125, 2000, replace(get_recipe("demo"), epochs=2))
    else:
        assert (grids[0].width, grids[0].limit, grids[0].recipe) == (1, None, get_recipe("light"))
    if not quick:
        with pytest.raises(NothingChosenError, match="it must be told on what: --data"):
            table6.run(replace(settings, data=""))


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    words = ["ablate", "--data", "digits", "--arch", "repvgg_micro", "--width", "0.125", "--limit", "64", "--epochs", "1"]
    words += ["--seeds", "1", "--device", "cpu", "--out", str(tmp_path / "abl")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--variants", "plain,acme"])
    assert stop.value.code == 2
    assert "repvgg: no variant 'acme': there are plain, no_1x1" in capsys.readouterr().err
    cli.main([*words, "--variants", "plain,relu_in_branch"])
    shown = capsys.readouterr()
    assert "Table 6: the branches" in shown.out
    assert "64 of 64" in shown.out
    assert "cannot be folded" in shown.out
    assert shown.err.count("recipe: demo") == 1
    assert {path.name for path in (tmp_path / "abl").glob("ablation.*")} == {"ablation.json", "ablation.png", "ablation.svg"}
    assert (tmp_path / "abl" / "ablation-curves.png").exists()
    cli.main([*words, "--variants", "plain,relu_in_branch", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["data"]["variants"]["plain"]["cells"][0]["forms"]["equal"] == 64
    assert record["data"]["settings"]["lr"] == 0.1
    assert "commit" in record["machine"]
