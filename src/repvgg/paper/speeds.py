"""Speeds of models that outlive an interruption: each pair is timed taking turns, and kept in a file as soon as it is done.

    a0, a1 = measure([(Candidate("repvgg_a0"), Candidate("resnet18")), (Candidate("repvgg_a1"), Candidate("resnet18"))], settings)
    print(a0.images_per_second, a0.ratio, over(a0, a1))

Tables 4, 5 and 8, Figure 1 and the comparison of forms read from here; the test of footnote 3 keeps its convolutions here.
"""

import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from repvgg.bench.models import Candidate, bench, network, prepared
from repvgg.deploy.engines import Options
from repvgg.deploy.fastest import fastest
from repvgg.disk import write_text
from repvgg.measure.machine import this_machine
from repvgg.measure.timing import Ratio, Times, ratio
from repvgg.models.names import resolve_name
from repvgg.models.zoo import default_preprocessing
from repvgg.paper.numbers import ModelSpeed
from repvgg.paper.result import NothingChosenError, PaperSettings

# What a quick look measures: both ends of the family, the groups, and those they are compared with in the paper's headlines.
QUICK = (
    "repvgg_a0",
    "resnet18",
    "repvgg_b0",
    "repvgg_a2",
    "resnet50",
    "efficientnet_b0",
    "repvgg_b1g4",
    "resnet101",
    "repvgg_b3",
    "regnetx_120",
)


PREPARE = functools.lru_cache(maxsize=2)(prepared)  # the reference of pair after pair is folded, and run in float64, once


@dataclass(frozen=True)
class Speed:
    """Seconds an image, median by round, of a candidate and of the reference that it took turns with; counts of one image.

    date, commit: when it was timed; no commit where that was not kept.
    """

    model: str
    batch_size: int
    input_size: tuple[int, int, int]
    seconds: list[float]
    reference: str
    reference_seconds: list[float]
    params: int
    macs: int
    winograd_muls: int
    date: str
    engine: str = "eager"
    commit: str = ""

    @property
    def images_per_second(self) -> float:
        return 1 / _times(self.seconds).median

    @property
    def reference_per_second(self) -> float:
        return 1 / _times(self.reference_seconds).median

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = _times(self.seconds).quartiles
        return 1 / high, 1 / low

    @property
    def ratio(self) -> Ratio:
        """Speed relative to the reference."""
        return ratio(_times(self.reference_seconds), _times(self.seconds))


def over(fast: Speed, slow: Speed) -> Ratio:
    """Return how many times faster `fast` is than `slow`, through the reference with which both took turns.

    What slowed both models of a pair alike cancels. What slowed the reference alone does not, and the interval does not show it:
    time the two as a pair where much hangs on it.
    """
    assert fast.reference == slow.reference
    fast_, slow_ = (_times([s / r for s, r in zip(speed.seconds, speed.reference_seconds, strict=True)]) for speed in (fast, slow))
    return ratio(slow_, fast_)


def _times(seconds: Sequence[float]) -> Times:
    return Times([[s] for s in seconds])


def chosen(rows: Sequence[ModelSpeed], settings: PaperSettings) -> list[ModelSpeed]:
    """Return the rows whose models were asked for; a quick look's own choice where none were.

    Raises NothingChosenError for no row.
    """
    names = [resolve_name(name) for name in settings.models or (QUICK if settings.quick else ())]
    found = [row for row in rows if not names or row.model in names]
    if not found:
        raise NothingChosenError(f"it has no {' or '.join(names)}: its models are {', '.join(row.model for row in rows)}")
    return found


def in_its_engine(model: str, settings: PaperSettings) -> Candidate:
    """Return a model in the engine to time it in: the one named, else its own fastest that computes what PyTorch does.

    A quick look takes eager where none is named.
    """
    if settings.named_engine or (settings.quick and not settings.engine):
        return Candidate(model, settings.one_engine, settings.precision)
    options = Options(
        input_size=_input_size(settings) or default_preprocessing({"name": model, "in_chans": 3}).input_size,
        batch_size=settings.protocol.batch_size,
        precision=settings.precision,
        threads=settings.threads or torch.get_num_threads(),
        channels_last=settings.channels_last,
        device=settings.device,
    )
    folded, _ = network(Candidate(model))
    engine = fastest(folded, options, lambda line: settings.log(f"{model}: {line}"), seconds=math.inf)
    return Candidate(model, engine, settings.precision)


def _input_size(settings: PaperSettings) -> tuple[int, int, int] | None:
    return (3, settings.input_size, settings.input_size) if settings.input_size else None


def measure(pairs: Sequence[tuple[Candidate, Candidate]], settings: PaperSettings) -> list[Speed]:
    """Measure the speed of the first of each pair, taking turns with the second, its reference.

    What is in `settings.out / "speeds.json"` from the same machine under the same settings is not measured again.
    """
    shelf = Shelf(settings)
    speeds = []
    started = time.perf_counter()
    for number, (candidate, reference) in enumerate(pairs, 1):
        where = f"[{number}/{len(pairs)}] {candidate.name}"
        speed = shelf.get(candidate, reference)
        if speed is None:
            settings.log(f"{where} ...")
            speed = _time(candidate, reference, settings)
            shelf.put(candidate, reference, speed)
            spent = f"{(time.perf_counter() - started) / 60:.1f} minutes so far"
            settings.log(
                f"{where}: {significant(speed.images_per_second)} images/s, {speed.ratio} relative to {reference.name}; {spent}"
            )
        else:
            settings.log(f"{where}: {significant(speed.images_per_second)} images/s, from {shelf.path}")
        speeds.append(speed)
    return speeds


def _time(candidate: Candidate, reference: Candidate, settings: PaperSettings) -> Speed:
    protocol = settings.protocol
    report = bench(
        [reference, candidate],
        batch_size=protocol.batch_size,
        rounds=protocol.rounds,
        batches=protocol.batches,
        warmup=protocol.warmup,
        threads=settings.threads,
        channels_last=settings.channels_last,
        device=settings.device,
        input_size=_input_size(settings),
        log=settings.log,
        progress=lambda line: None,
        prepare=PREPARE,
    )
    first, last = report.rows[0], report.rows[-1]  # the same where the reference is timed itself
    if len(report.rows) != len({reference, candidate}):
        raise ValueError(f"{candidate.name} beside {reference.name}: the engine runs one of them alone")
    here = this_machine()
    return Speed(
        model=candidate.model,
        batch_size=last.batch_size,
        input_size=last.input_size,
        seconds=[s / last.batch_size for s in last.times.by_round],
        reference=reference.name,
        reference_seconds=[s / first.batch_size for s in first.times.by_round],
        params=last.cost.params,
        macs=last.cost.macs,
        winograd_muls=last.cost.winograd_muls,
        date=here["date"],
        engine=candidate.engine,
        commit=here["commit"] or "",
    )


class Shelf:
    """Finished speeds in a file: a list of runs, each with its settings, so that nothing measured otherwise is mixed in or lost."""

    def __init__(self, settings: PaperSettings) -> None:
        self.path = settings.out / "speeds.json"
        self.runs: list[dict[str, Any]] = _read(self.path)
        wanted = _conditions(settings)
        run = next((run for run in self.runs if run["settings"] == wanted), None)
        if run is None:
            run = {"settings": wanted, "speeds": {}}
            self.runs.append(run)
        self.speeds: dict[str, dict[str, Any]] = run["speeds"]
        self.convolutions: dict[str, Any] = run.setdefault("convolutions", {})

    def get(self, candidate: Candidate, reference: Candidate) -> Speed | None:
        found = self.speeds.get(_key(candidate, reference))
        return None if found is None else Speed(**{**found, "input_size": tuple(found["input_size"])})

    def put(self, candidate: Candidate, reference: Candidate, speed: Speed) -> None:
        self.speeds[_key(candidate, reference)] = asdict(speed)
        self.save()

    def save(self) -> None:
        text = json.dumps(self.runs, indent=1) + "\n"
        write_text(self.path, text)


def _key(candidate: Candidate, reference: Candidate) -> str:
    return f"{candidate.name} and {reference.name}"


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        runs = json.loads(path.read_text()) if path.exists() else []
        assert all(isinstance(run["settings"], dict) and isinstance(run["speeds"], dict) for run in runs)
    except (ValueError, TypeError, KeyError, AssertionError):
        raise ValueError(f"{path} is no file of finished speeds: move it away, or name another --out") from None
    return list(runs)


def _conditions(settings: PaperSettings) -> dict[str, Any]:
    """Return all that a speed depends on beside the pair that is timed."""
    return {
        **asdict(settings.protocol),
        **({"input_size": settings.input_size} if settings.input_size else {}),
        "channels_last": settings.channels_last,
        "where": settings.where,
        "versions": {name: version for name, version in this_machine()["versions"].items() if name != "repvgg"},
    }


def significant(value: float) -> str:
    """Write a number with at least three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
