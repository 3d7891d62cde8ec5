"""timing.py: who runs when, and what the statistics say of times that are known."""

import random
import statistics
import time
from collections import Counter
from itertools import groupby
from typing import Any

import pytest

from repvgg.measure.timing import Times, interleave, ratio


class Machine:
    """A clock that only calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, ""
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self, name: str, seconds: float) -> None:
        self.calls += name
        self.now += seconds

    def calling(self, **seconds: float) -> dict[str, Any]:
        return {name: lambda name=name, s=s: self.run(name, s) for name, s in seconds.items()}


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, done = Machine(monkeypatch), list[int]()
    times = interleave(machine.calling(a=1, b=2, c=4), rounds=4, batches=2, warmup=3, progress=done.append)
    assert machine.calls == "aaabbbccc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert done == [1, 2, 3, 4]
    assert {name: t.rounds for name, t in times.items()} == {"a": [[1, 1]] * 4, "b": [[2, 2]] * 4, "c": [[4, 4]] * 4}


def test_each_candidate_goes_first_and_last_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    interleave(machine.calling(a=1, b=1, c=1, d=1), rounds=8, batches=3, warmup=0)
    turns = [name for name, _ in groupby(machine.calls)]
    rounds = [machine.calls[i : i + 12] for i in range(0, len(machine.calls), 12)]
    assert Counter(machine.calls) == dict.fromkeys("abcd", 24)
    assert Counter(r[0] for r in rounds) == Counter(r[-1] for r in rounds) == dict.fromkeys("abcd", 2)
    assert len(turns) >= 25


def test_the_device_is_waited_for_within_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    times = interleave(machine.calling(a=1), rounds=2, batches=2, warmup=1, synchronise=lambda: machine.run("s", 0.5))
    assert machine.calls == "as" + "asas" * 2
    assert times["a"].rounds == [[1.5, 1.5], [1.5, 1.5]]


def test_drift_hits_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down by half over the run: the ratio is that of the candidates all the same."""
    machine = Machine(monkeypatch)

    def call(seconds: float) -> None:
        machine.now += seconds * (1 + machine.now / 2000)

    times = interleave({"slow": lambda: call(2), "fast": lambda: call(1)}, rounds=20, batches=10)
    assert times["slow"].rounds[-1][0] > 1.2 * times["slow"].rounds[0][0]
    assert ratio(times["slow"], times["fast"]).value == pytest.approx(2, rel=0.02)


def test_medians_and_quartiles() -> None:
    times = Times([[1, 2, 300], [4, 5, 6], [7, 8, 9], [1, 1, 1], [3, 3, 3]])
    assert times.by_round == [2, 5, 8, 1, 3]
    assert times.median == 3
    assert times.quartiles == (2, 5)
    assert Times([[1, 3, 2]]).quartiles == (2, 2)


def noisy(seconds: float, rounds: int, seed: int) -> Times:
    draw = random.Random(seed)
    return Times([[seconds * draw.lognormvariate(0, 0.1) for _ in range(5)] for _ in range(rounds)])


def test_the_interval_covers_the_true_ratio_nineteen_times_in_twenty() -> None:
    covered, widths = 0, []
    for trial in range(200):
        r = ratio(noisy(3, 15, 2 * trial), noisy(2, 15, 2 * trial + 1), resamples=400)
        assert r.low <= r.value <= r.high
        covered += r.low <= 1.5 <= r.high
        widths.append(r.high - r.low)
    assert covered >= 180  # a bootstrap of few rounds is a little narrow
    assert statistics.median(widths) < 0.2  # and not wide enough to say nothing


def test_the_ratio_agrees_with_the_medians() -> None:
    slow, fast = noisy(3, 15, 0), noisy(2, 15, 1)
    r = ratio(slow, fast)
    assert r.value == pytest.approx(slow.median / fast.median, rel=0.1)
    assert ratio(fast, slow).value == pytest.approx(1 / r.value, rel=1e-9)
    assert ratio(slow, slow) == ratio(Times([[1.0]]), Times([[1.0]]))
    assert str(ratio(Times([[3.0]]), Times([[2.0]]))) == "1.50x (1.50 to 1.50)"
    assert r == ratio(slow, fast)  # the same answer each time


def test_settings_that_time_nothing() -> None:
    for rounds, batches in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            interleave({"a": lambda: None}, rounds=rounds, batches=batches)
