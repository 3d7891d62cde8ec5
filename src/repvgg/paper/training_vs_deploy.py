"""Training form against deploy form for each member, and the last column of Table 6: B0 without some of its branches."""

from dataclasses import asdict

from repvgg.bench.models import Candidate
from repvgg.models.names import FAMILY, resolve_name
from repvgg.paper.numbers import TABLE4, TABLE6
from repvgg.paper.result import NothingChosenError, PaperSettings, Result, Table, interval
from repvgg.paper.speeds import QUICK, Speed, measure, significant

BEYOND = ("repvgg_d2se", "repvgg_l2pse", "repvgg_micro", "repvgg_mini")  # not of the paper; timed when asked for
PAPER_GAIN = next(row.speed for row in TABLE4 if row.model == "repvgg_b0") / TABLE6[-1].speed


def run(settings: PaperSettings) -> Result:
    engine = settings.one_engine
    members = _members(settings)
    forms = [(Candidate(m, engine, settings.precision), Candidate(m, engine, settings.precision, "training")) for m in members]
    structures = [Candidate("repvgg_b0", engine, settings.precision, "training", row.block) for row in TABLE6]
    found = measure([*forms, *((structure, structures[0]) for structure in structures)], settings)
    folded, speeds = dict(zip(members, found, strict=False)), found[len(members) :]
    gains = [speed.ratio.value for speed in folded.values()]
    return Result(
        "Training form and deploy form, and Table 6's speeds",
        [_forms(folded), _structures(speeds)],
        f"Folding makes the members timed here {min(gains):.2f} to {max(gains):.2f} times as fast; in the paper B0 becomes "
        f"{PAPER_GAIN:.2f} times as fast. The branches themselves cost little arithmetic (a 1x1 has a ninth of the "
        "multiply-adds of its 3x3); what folding takes away is mostly memory traffic: three batch norms, two additions and a "
        "second convolution, each of which reads and writes whole feature maps. So the gain depends on how much slower a "
        "machine is at moving data than at multiplying, and on whether an engine fuses such operators (torch.compile does). "
        "In Table 6 the 1x1 branch costs more than the identity, for the same reason.",
        {
            "forms": {model: {**asdict(s), **interval(s.ratio)} for model, s in folded.items()},
            "structures": [{"block": row.block, **asdict(s), **interval(s.ratio)} for row, s in zip(TABLE6, speeds, strict=True)],
        },
    )


def _members(settings: PaperSettings) -> list[str]:
    """Return the members asked for; all of the paper's where none are."""
    names = [resolve_name(name) for name in settings.models or (QUICK if settings.quick else ())]
    found = [name for name in FAMILY if (name in names if names else name not in BEYOND)]
    if not found:
        raise NothingChosenError(f"{' and '.join(names)} have one form only: the members are {', '.join(FAMILY)}")
    return found


def _forms(speeds: dict[str, Speed]) -> Table:
    header = ("model", "training form, examples/s", "deploy form", "gain (95% interval)", "gain in the paper")
    rows = [
        (
            model,
            significant(speed.reference_per_second),
            significant(speed.images_per_second),
            speed.ratio,
            f"{PAPER_GAIN:.2f}x" if model == "repvgg_b0" else None,
        )
        for model, speed in speeds.items()
    ]
    return Table("What folding gains", header, rows)


def _structures(speeds: list[Speed]) -> Table:
    header = ("identity", "1x1", "top-1, %", "speed relative to neither, paper", "here (95% interval)")
    rows = [
        (
            "yes" if row.identity else "no",
            "yes" if row.pointwise else "no",
            f"{row.top1:.2f}",
            f"{row.speed / TABLE6[0].speed:.2f}x",
            speed.ratio,
        )
        for row, speed in zip(TABLE6, speeds, strict=True)
    ]
    return Table("Table 6: RepVGG-B0's branches, speed in training form", header, rows)
