"""Table 3 from our family data."""

from dataclasses import replace

import pytest

from repvgg.models.names import FAMILY
from repvgg.paper import table3
from repvgg.paper.numbers import TABLE3
from repvgg.paper.result import PaperSettings


def test_is_the_papers() -> None:
    assert table3.members() == TABLE3
    result = table3.run(PaperSettings())
    assert "our family data are equal to the paper's" in result.why
    for row in result.tables[0].rows:
        assert row[1:7:2] == row[2:7:2]
    assert result.tables[0].rows[2][-1] == "64, 96, 192, 384, 1408"


def test_says_so_when_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILY, "repvgg_b2", replace(FAMILY["repvgg_b2"], a=2))
    result = table3.run(PaperSettings())
    assert not result.data["equal"]
    assert "NOT equal" in result.why
