"""Table 2 from our networks."""

from dataclasses import replace

import pytest

from repvgg.models.names import FAMILY
from repvgg.paper import table2
from repvgg.paper.numbers import TABLE2
from repvgg.paper.result import PaperSettings


def test_is_the_papers() -> None:
    assert table2.stages() == TABLE2
    result = table2.run(PaperSettings())
    assert result.data["equal"]
    assert "our networks are equal to the paper's" in result.why
    for row in result.tables[0].rows:
        assert row[1::2] == row[2::2]
    assert [row[4] for row in result.tables[0].rows][1:4] == ["2 x 64a", "4 x 128a", "14 x 256a"]


def test_says_so_when_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILY, "repvgg_a0", replace(FAMILY["repvgg_a0"], depths=(2, 4, 13, 1)))
    result = table2.run(PaperSettings())
    assert not result.data["equal"]
    assert "NOT equal" in result.why
