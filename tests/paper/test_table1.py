"""Table 1: how the problem is scaled, and what the rates mean."""

import pytest

from repvgg.bench.kernels import Convolution
from repvgg.deploy.engines import Options
from repvgg.measure.timing import Times
from repvgg.paper import table1
from repvgg.paper.numbers import TABLE1
from repvgg.paper.result import PaperSettings
from repvgg.paper.table1 import PAPER, Problem, largest

GTX_1080TI = sum(row.milliseconds for row in TABLE1) / 1e3  # seconds of one run of the whole table


def test_the_papers_problem() -> None:
    assert [round(c.macs * 32 / 1e9, 1) for c in PAPER.convolutions] == pytest.approx([row.gflops for row in TABLE1], abs=0.11)


def test_the_problem_fits_the_machine() -> None:
    per_mac = GTX_1080TI / PAPER.macs
    assert largest(per_mac, GTX_1080TI * 1.01) == PAPER
    assert largest(per_mac, GTX_1080TI / 3) == Problem(2048, 8)
    assert largest(per_mac, GTX_1080TI / 1e3) == Problem(128, 4)
    assert largest(per_mac, 1e-9) == Problem(128, 1)
    sizes = [largest(per_mac, GTX_1080TI / 4**k).macs for k in range(8)]
    assert sizes == sorted(sizes, reverse=True)
    for k in range(7):
        assert largest(per_mac, GTX_1080TI / 4**k).macs * per_mac <= GTX_1080TI / 4**k


def test_a_batch_that_is_asked_for_is_kept() -> None:
    per_mac = GTX_1080TI / PAPER.macs
    assert [largest(per_mac, seconds, 3).batch_size for seconds in (100, 1e-1, 1e-9)] == [3, 3, 3]
    assert largest(per_mac, 100, 3).channels == 2048
    assert largest(per_mac, 1e-9, 3).channels == 128


def on_the_papers_machine(convolutions: list[Convolution], options: Options, **_: object) -> tuple[int, list[Times]]:
    """Its times for its own kernels, by the multiply-add."""
    seconds = {row.kernel_size: row.milliseconds / row.gflops / 1e12 for row in TABLE1}
    return options.batch_size, [Times([[seconds[c.kernel_size] * c.macs * options.batch_size]] * 3) for c in convolutions]


def test_says_what_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table1, "time_convolutions", on_the_papers_machine)
    monkeypatch.setattr(table1, "SECONDS", 1000)
    result = table1.run(PaperSettings(log=lambda line: None))
    assert result.data["problem"] == {"channels": 2048, "batch_size": 32, "size": 56}
    assert "Here too the 3x3 stands out, at 3.83 times" in result.why
    for cells, row in zip(result.tables[0].rows, TABLE1, strict=True):
        assert cells[1] == cells[2]
        assert float(cells[3].replace(",", "")) == pytest.approx(float(cells[4].replace(",", "")), rel=1e-3)
        assert float(cells[7]) == pytest.approx(row.tflops, rel=0.06)


def test_a_small_problem_for_real() -> None:
    words: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table1, "QUICK_SECONDS", 1e-3)
        patch.setattr(table1, "PILOT", Convolution(16, 16, 8))
        result = table1.run(PaperSettings(quick=True, rounds=1, log=words.append))
    assert result.data["problem"] == {"channels": 128, "batch_size": 1, "size": 56}
    assert words == ["128 channels, batch 1: 1/8192 of the paper's work"]
    assert "1/8192 of that work" in result.why
    assert [len(k["seconds"]) for k in result.data["kernels"]] == [1] * 4
    assert result.data["kernels"][0]["rate_over_1x1"] == {"ratio": 1, "low": 1, "high": 1}
