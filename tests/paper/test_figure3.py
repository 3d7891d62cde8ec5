"""Figure 3: counted, measured, drawn."""

import pytest

from repvgg.bench.memory import STACKS, stack
from repvgg.measure.costs import cost
from repvgg.paper import figure3
from repvgg.paper.figure3 import draw
from repvgg.paper.numbers import PEAK_ACTIVATION
from repvgg.paper.result import PaperSettings


def test_counted_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure3, "SIZE", 64)
    monkeypatch.setattr(figure3, "MAP", 64 * 64 * 64 * 4)
    monkeypatch.setattr(figure3, "resident_growth", lambda *_: None)  # test_memory asks the operating system
    result = figure3.run(PaperSettings())
    assert result.tables[0].rows == [
        ("residual", "2x", "2.00x", "3.00x", "3.02x", "-"),
        ("plain", "1x", "1.00x", "2.00x", "2.02x", "-"),
    ]
    assert result.data["stacks"]["plain"]["resident_growth_bytes"] is None


def test_bars_are_what_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure3, "MAP", 8 * 16 * 16 * 4)
    figure = draw({kind: cost(stack(kind, 8), (1, 16, 16)) for kind in STACKS})
    for axes, kind in zip(figure.axes, STACKS, strict=True):
        working, kept = ([bar.get_height() for bar in bars] for bars in axes.containers)
        assert len(working) == len(kept) == len(axes.get_xticklabels()) == {"residual": 10, "plain": 8}[kind]
        assert max(kept) == PEAK_ACTIVATION[kind]
        assert max(working) == PEAK_ACTIVATION[kind] + 1
        assert all(a <= b for a, b in zip(kept, working, strict=True))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][:5] == ["conv", "ReLU", "conv", "add", "ReLU"]
