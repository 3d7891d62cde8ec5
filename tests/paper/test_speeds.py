"""paper/speeds.py: what is kept, what is measured again, and ratios through a shared reference."""

import json
from pathlib import Path

import pytest

from repvgg.bench.models import Candidate
from repvgg.measure.machine import this_machine
from repvgg.paper import speeds
from repvgg.paper.numbers import TABLE4, TABLE5
from repvgg.paper.result import NothingChosenError, PaperSettings
from repvgg.paper.speeds import QUICK, Speed, chosen, measure, over, significant

MICRO, TRAINING = Candidate("repvgg_micro"), Candidate("repvgg_micro", form="training")
PLAIN = Candidate("repvgg_micro", form="training", block="plain")


def settings(out: Path, **more: object) -> PaperSettings:
    return PaperSettings(**{"out": out, "batch_size": 1, "rounds": 2, "quick": True, "log": lambda line: None, **more})  # type: ignore[arg-type]


def speed(seconds: list[float], reference: list[float]) -> Speed:
    return Speed("a", 2, (3, 8, 8), seconds, "b", reference, 1, 2, 3, "today")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was really timed; the times are made up."""
    names: list[str] = []

    def record(candidate: Candidate, reference: Candidate, settings: PaperSettings) -> Speed:
        if candidate.block == "plain":
            raise KeyboardInterrupt
        names.append(candidate.name)
        return speed([0.1, 0.3, 0.2], [0.4, 0.6, 0.4])

    monkeypatch.setattr(speeds, "_time", record)
    return names


def test_a_real_measurement(tmp_path: Path) -> None:
    training, deploy = measure([(TRAINING, TRAINING), (MICRO, TRAINING)], settings(tmp_path))
    assert training.seconds == training.reference_seconds
    assert (training.ratio.low, training.ratio.high) == (1, 1)
    assert deploy.ratio.low <= deploy.ratio.value <= deploy.ratio.high
    assert deploy.params < training.params
    assert (deploy.model, deploy.batch_size, deploy.input_size) == ("repvgg_micro", 1, (3, 224, 224))
    low, high = deploy.quartiles
    assert 0 < low <= deploy.images_per_second <= high


def test_goes_on_where_it_was_interrupted(tmp_path: Path, timed: list[str]) -> None:
    pairs = [(MICRO, TRAINING), (PLAIN, TRAINING), (TRAINING, TRAINING)]
    with pytest.raises(KeyboardInterrupt):
        measure(pairs, settings(tmp_path))
    assert timed == [MICRO.name]
    words: list[str] = []
    first, last = measure([pairs[0], pairs[2]], settings(tmp_path, log=words.append))
    assert timed == [MICRO.name, TRAINING.name]
    assert first == last
    assert words[0] == f"[1/2] {MICRO.name}: 5.00 images/s, from {tmp_path / 'speeds.json'}"
    assert len(words) == 3


def test_another_reference_is_another_measurement(tmp_path: Path, timed: list[str]) -> None:
    measure([(MICRO, TRAINING), (MICRO, MICRO)], settings(tmp_path))
    assert timed == [MICRO.name] * 2


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"rounds": 3}, {"threads": 7}, {"channels_last": False}, {"quick": False}])
def test_other_settings_neither_mix_nor_lose_anything(change: dict[str, object], tmp_path: Path, timed: list[str]) -> None:
    for more in ({}, change, {}, change):
        measure([(MICRO, TRAINING)], settings(tmp_path, **more))
    assert timed == [MICRO.name] * 2
    runs = json.loads((tmp_path / "speeds.json").read_text())
    assert [list(run["speeds"]) for run in runs] == [[f"{MICRO.name} and {TRAINING.name}"]] * 2


def test_another_machine_measures_anew(tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measure([(MICRO, TRAINING)], settings(tmp_path))
    here = this_machine()
    for name, value in (("processor", "Z80"), ("versions", {**here["versions"], "torch": "9.9"})):
        for module in ("speeds", "result"):
            monkeypatch.setattr(f"repvgg.paper.{module}.this_machine", lambda *_, n=name, v=value: {**here, n: v})
        measure([(MICRO, TRAINING)], settings(tmp_path))
    assert timed == [MICRO.name] * 3


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"settings": {}}]', '{"settings": 1}'])
def test_a_broken_file_is_not_overwritten(text: str, tmp_path: Path, timed: list[str]) -> None:
    (tmp_path / "speeds.json").write_text(text)
    with pytest.raises(ValueError, match=r"speeds\.json is no file of finished speeds: move it away, or name another --out"):
        measure([(MICRO, TRAINING)], settings(tmp_path))
    assert (tmp_path / "speeds.json").read_text() == text


def test_drift_between_two_turns_cancels() -> None:
    """The machine was half as fast while b was timed, reference and all; b takes twice as long as a."""
    a, b = speed([1.0, 1.1, 0.9], [2.0, 2.2, 1.8]), speed([4.0, 4.4, 3.6], [4.0, 4.4, 3.6])
    assert (over(a, b).value, over(a, b).low, over(a, b).high) == pytest.approx((2, 2, 2))
    assert over(b, a).value == pytest.approx(0.5)
    assert a.images_per_second == pytest.approx(1)
    assert a.reference_per_second == pytest.approx(0.5)


def test_choice_of_rows() -> None:
    assert chosen(TABLE4, PaperSettings()) == list(TABLE4)
    assert [row.model for row in chosen(TABLE4, PaperSettings(models=("ResNet50", "repvgg_a0")))] == ["repvgg_a0", "resnet50"]
    assert {row.model for table in (TABLE4, TABLE5) for row in chosen(table, PaperSettings(quick=True))} == set(QUICK)
    with pytest.raises(NothingChosenError, match="it has no resnet18: its models are repvgg_b2g4, repvgg_b3g4"):
        chosen(TABLE5, PaperSettings(models=("resnet18",)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(3256, "3,256"), (99.96, "100"), (99.94, "99.9"), (12.345, "12.3"), (9.996, "10.0"), (9.99, "9.99"), (0.123, "0.12")],
)
def test_significant(value: float, text: str) -> None:
    assert significant(value) == text
