"""Footnote 3's test on machines whose use of Winograd is known, and one convolution for real."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from repvgg.bench.kernels import Convolution
from repvgg.deploy.engines import Options
from repvgg.measure.costs import cost
from repvgg.measure.timing import Ratio, Times
from repvgg.paper import winograd
from repvgg.paper.result import NothingChosenError, PaperSettings, Result
from repvgg.paper.winograd import THRESHOLD, conclude, counterparts, shapes, verdict


class Machine:
    """A library whose times are those of its multiplications, then of its memory traffic; `noise` from round to round."""

    def __init__(self, gain: float, bandwidth: float = 1e10, noise: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        self.gain, self.bandwidth, self.noise = gain, bandwidth, noise

    def __call__(self, convolutions: list[Convolution], options: Options, **_: object) -> tuple[int, list[Times]]:
        return options.batch_size, [Times([[self.seconds(c, options.batch_size) * n] for n in self.noise]) for c in convolutions]

    def seconds(self, c: Convolution, batch: int) -> float:
        dense_3x3 = c.stride == 1 and c.groups < c.in_channels
        traffic = 4 * (c.in_channels * c.size**2 + c.out_channels * c.out_size**2)
        return batch * (c.macs / 1e11 / (self.gain if dense_3x3 else 1) + traffic / self.bandwidth)


def run(machine: Machine, monkeypatch: pytest.MonkeyPatch, out: Path, **settings: object) -> Result:
    monkeypatch.setattr(winograd, "time_convolutions", machine)
    return winograd.run(PaperSettings(**{"quick": True, "log": lambda line: None, "out": out, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("gain", "answer"), [(1.0, "no"), (1.1, "no"), (2.25, "yes"), (1.8, "yes")])
def test_a_library_that_uses_it_and_one_that_does_not(
    gain: float, answer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = run(Machine(gain), monkeypatch, tmp_path)
    tests = result.data["tests"]
    assert [t["verdict"] for t in tests] == [answer] * len(tests)
    for t in tests:
        assert t["left"]["ratio"] < gain * 1.01  # memory and transforms are not taken for Winograd
        assert t["plain"]["ratio"] > t["left"]["ratio"]
    words = "Winograd is in use" if answer == "yes" else "Winograd is not in use"
    assert result.data["conclusions"] == {"eager": f"{words}, in all of {len(tests)} shapes"}
    assert f"eager: {words}" in result.why


def test_memory_alone_is_not_taken_for_winograd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With slow memory the counterpart takes several times as long, for want of bandwidth."""
    result = run(Machine(1.0, bandwidth=1e8), monkeypatch, tmp_path)
    assert min(t["plain"]["ratio"] for t in result.data["tests"]) > THRESHOLD
    assert {t["verdict"] for t in result.data["tests"]} == {"no"}


def test_undecided() -> None:
    plain = Ratio(2, 1.9, 2.1)
    assert verdict(plain, Ratio(THRESHOLD, THRESHOLD - 0.1, THRESHOLD + 0.1)) == "undecided"
    assert verdict(plain, Ratio(THRESHOLD + 0.1, THRESHOLD + 0.05, THRESHOLD + 0.2)) == "yes"
    assert verdict(plain, Ratio(1, 0.9, THRESHOLD - 0.01)) == "no"
    assert verdict(plain, Ratio(0.8, 0.7, 0.9)) == "undecided"  # reading explains more than there is
    assert verdict(Ratio(1, 0.9, 1.1), Ratio(0.8, 0.7, 0.9)) == "no"  # there is nothing to explain
    assert conclude(["undecided"]) == "Winograd is undecided, in all of 1 shapes"
    assert conclude(["yes", "yes"]) == "Winograd is in use, in all of 2 shapes"
    assert conclude(["yes", "no", "no"]) == "Winograd is not in use (yes for 1, no for 2 shapes)"
    assert conclude(["yes", "no", "yes", "undecided"]) == "Winograd is undecided (yes for 2, no for 1, undecided for 1 shapes)"


def test_counterparts_do_the_same_work_on_the_same_maps() -> None:
    for convolution in shapes(winograd.MEMBERS):
        one, two, deep_one, deep_two = counterparts(convolution).values()
        for a, b in ((one, two), (deep_one, deep_two)):
            assert (a.macs, a.out_channels, a.out_size) == (b.macs, b.out_channels, b.out_size)
            assert (a.stride, b.stride, 2 * a.size) == (1, 2, b.size)
        assert one.macs == cost(one.module(), (one.in_channels, one.size, one.size)).macs
        assert deep_one.macs * one.in_channels == one.macs * one.groups


def test_shapes_are_the_familys() -> None:
    assert shapes(("repvgg_b1g4",)) == [
        Convolution(128, 128, 56, groups=4),
        Convolution(256, 256, 28, groups=4),
        Convolution(512, 512, 14, groups=4),
    ]


def test_one_for_real_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(winograd, "MEMBERS", ("repvgg_micro",))
    words: list[str] = []
    settings = PaperSettings(quick=True, batch_size=1, rounds=1, log=words.append, out=tmp_path)
    result = winograd.run(settings)
    assert [t["convolution"]["in_channels"] for t in result.data["tests"]] == [32, 64, 128]
    assert all(len(times) == 2 for t in result.data["tests"] for times in t["seconds"].values())
    assert len(words) == 3
    assert set(result.figures) == {"winograd"}
    monkeypatch.setattr(winograd, "time_convolutions", None)  # which would be an error to call
    assert winograd.run(settings).data == result.data


def test_engines_that_are_not_there_are_left_out_with_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("repvgg.deploy.engines.find_spec", lambda name: None)
    words: list[str] = []
    result = run(Machine(1.0), monkeypatch, tmp_path, quick=False, log=words.append)
    assert set(result.data["conclusions"]) == {"eager", "compile", "aotinductor"}
    assert any(w.startswith("left out: the engine openvino needs") for w in words)


@pytest.mark.parametrize("name", ["", "native"])
def test_an_engine_that_has_winograd_for_stride_2_is_not_judged(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("repvgg.deploy.engines.installed", lambda *_: ["eager", "native"])
    monkeypatch.setattr("repvgg.deploy.engines.check", lambda *_: None)
    words: list[str] = []
    settings = {"quick": False, "log": words.append, "engine": name}
    if name:
        with pytest.raises(NothingChosenError, match="native runs stride 2 by Winograd too"):
            run(Machine(1.0), monkeypatch, tmp_path, **settings)
    else:
        assert set(run(Machine(1.0), monkeypatch, tmp_path, **settings).data["conclusions"]) == {"eager"}
        assert words[-1] == "left out: native runs stride 2 by Winograd too, which this test cannot tell"
