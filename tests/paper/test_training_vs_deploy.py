"""Training form against deploy form, on a machine that is as fast as the paper's."""

from pathlib import Path

import pytest

from repvgg.bench.models import Candidate
from repvgg.models.names import FAMILY
from repvgg.paper import speeds
from repvgg.paper import training_vs_deploy as forms
from repvgg.paper.numbers import TABLE6
from repvgg.paper.result import NothingChosenError, PaperSettings
from repvgg.paper.speeds import Speed

SPEEDS = {row.block: row.speed for row in TABLE6}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []

    def on_the_papers_machine(candidate: Candidate, reference: Candidate, settings: PaperSettings) -> Speed:
        pairs.append((candidate.name, reference.name))
        seconds = [[1 / (1817 if c.form == "deploy" else SPEEDS[c.block])] * 2 for c in (candidate, reference)]
        return Speed(candidate.model, 8, (3, 224, 224), seconds[0], reference.name, seconds[1], 1, 1, 1, "")

    monkeypatch.setattr(speeds, "_time", on_the_papers_machine)
    return pairs


def test_says_what_the_paper_says(tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    result = forms.run(PaperSettings(models=("repvgg_b0",), out=tmp_path, log=lambda line: None))
    assert asked[0] == ("repvgg_b0 eager fp32", "repvgg_b0 eager fp32 training form")
    assert {reference for _, reference in asked[1:]} == {"repvgg_b0 eager fp32 plain blocks training form"}
    gains, structures = result.tables
    assert gains.rows[0][:3] == ("repvgg_b0", "1,061", "1,817")
    assert str(gains.rows[0][3]).startswith("1.71x")
    assert str(gains.rows[0][4]) == "1.71x"
    for row, printed in zip(structures.rows, TABLE6, strict=True):
        assert row[2] == f"{printed.top1:.2f}"
        assert str(row[4]).startswith(row[3])
    assert "the members timed here 1.71 to 1.71 times as fast" in result.why


def test_members() -> None:
    everything = forms._members(PaperSettings())
    assert set(FAMILY) - set(everything) == {"repvgg_d2se", "repvgg_l2pse", "repvgg_micro", "repvgg_mini"}
    assert forms._members(PaperSettings(models=("resnet18", "RepVGG-D2se"))) == ["repvgg_d2se"]
    with pytest.raises(NothingChosenError, match="resnet18 have one form only"):
        forms._members(PaperSettings(models=("resnet18",)))


def test_b0s_structures_are_built_as_table_6_has_them() -> None:
    from torch import nn

    from repvgg.bench.models import network
    from repvgg.fold.as_linear import Branches

    for row in TABLE6:
        model, _ = network(Candidate("repvgg_micro", form="training", block=row.block))
        blocks = [m for m in model.modules() if isinstance(m, Branches)]
        assert any("conv_1x1" in dict(b.named_children()) for b in blocks) == row.pointwise
        assert any(isinstance(child, nn.BatchNorm2d) for b in blocks for child in b.children()) == row.identity
