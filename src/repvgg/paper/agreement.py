"""Tables 6 and 7: how far the order found here is the paper's, in plain words. Importable without PyTorch."""

import math
import statistics
from collections.abc import Mapping, Sequence

from repvgg.paper.numbers import RESNET50, RESNET50_WITH_BLOCKS, TABLE6, TABLE7

PLAIN, FULL = "plain", "repvgg"
# The paper's name and top-1 of each of its variants of B0; and beside them, of ResNet-50.
B0S: dict[str, tuple[str, float]] = {
    "plain": ("Neither (plain)", TABLE6[0].top1),
    "no_1x1": ("Identity alone", TABLE6[1].top1),
    "no_identity": ("1x1 alone", TABLE6[2].top1),
    **{("residual" if v.model.endswith("residual") else v.block): (v.printed, v.top1) for v in TABLE7},
}
PRINTED: dict[str, tuple[str, float]] = {
    **B0S,
    "resnet50": ("ResNet-50", RESNET50),
    "resnet50_repvgg": ("ResNet-50 with RepVGG blocks", RESNET50_WITH_BLOCKS),
}
SEEDS = 3  # of each variant are wanted; a standard error of fewer tells nothing

Cells = Mapping[str, Sequence[float | None]]  # of each variant, the top-1 of its seeds in percent, None where training diverged
# Of each variant, seed 0's share by learning rate, or "diverged"; None of a training that is not finished.
Pilot = Mapping[str, Mapping[str, float | str | None]]


def words(cells: Cells, pilot: Pilot) -> str:
    """Return what a grid shows, in sentences: what is finished, the orders, the full block against the plain one, how rates were
    chosen."""
    top1 = {name: [value for value in values if value is not None] for name, values in cells.items()}
    known = {name: values for name, values in top1.items() if name in B0S and values}
    return " ".join(filter(None, (_finished(cells, pilot), _orders(known), _lead(known), _chosen(pilot))))


def correlation(cells: Cells) -> tuple[int, float]:
    """Return how many of the paper's variants of B0 there are, and the rank correlation of their mean top-1 with the paper's."""
    top1 = {name: [value for value in values if value is not None] for name, values in cells.items() if name in B0S}
    both = [(B0S[name][1], statistics.mean(values)) for name, values in top1.items() if values]
    return len(both), spearman([p for p, _ in both], [h for _, h in both])


def rates_of(pilot: Pilot) -> list[str]:
    """Return the learning rates of a pilot, the smallest first."""
    return sorted({rate for by_rate in pilot.values() for rate in by_rate}, key=float)


def trained(pilot: Pilot) -> tuple[int, int]:
    """Return how many trainings of a pilot are finished, and how many there are to be."""
    found = [top1 for by_rate in pilot.values() for top1 in by_rate.values()]
    return sum(top1 is not None for top1 in found), len(found)


def percent(top1: float | str | None) -> str:
    """Write what a pilot's training came to."""
    return f"{100 * top1:.2f}" if isinstance(top1, float) else top1 or ""


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation, ties sharing their mean rank; NaN of fewer than two values, or where all are equal."""
    try:
        return statistics.correlation(_ranks(a), _ranks(b))
    except statistics.StatisticsError:
        return math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


# --------------------------------------------------------------------------------------------------------------- sentences


def _finished(cells: Cells, pilot: Pilot) -> str:
    done, planned = trained(pilot)
    more, wanted = sum(max(0, len(cells.get(name, ())) - 1) for name in pilot), len(pilot) * (SEEDS - 1)
    if done == planned and more >= wanted:
        return ""
    return (
        f"Finished so far: {done} of {planned} trainings of the pilot (each variant at each learning rate, seed 0), {more} of "
        f"{wanted} with further seeds."
    )


def _orders(top1: Mapping[str, Sequence[float]]) -> str:
    count, rank = correlation(top1)
    if math.isnan(rank) or count < 3:
        return ""
    means = {name: statistics.mean(values) for name, values in top1.items()}
    there, here = _places({name: B0S[name][1] for name in means}), _places(means)
    moved = {name: f"{name} (place {there[name]} in the paper, {here[name]} here)" for name in there}
    groups = {
        "Within one place of the paper's": [name for name in there if abs(there[name] - here[name]) <= 1],
        "Two places or more higher here": [moved[name] for name in there if there[name] - here[name] > 1],
        "Two places or more lower here": [moved[name] for name in there if here[name] - there[name] > 1],
    }
    agreed = f"By mean top-1, the order of {count} variants has a rank correlation of {rank:.2f} with the paper's (1: the same)."
    few = "Places of fewer than three seeds may be luck." if min(map(len, top1.values())) < SEEDS else ""
    return " ".join(filter(None, [agreed, few, *(f"{what}: {', '.join(names)}." for what, names in groups.items() if names)]))


def _places(values: Mapping[str, float]) -> dict[str, int]:
    """Return the place of each, the best first and in that order."""
    return {name: 1 + sum(v > values[name] for v in values.values()) for name in sorted(values, key=lambda name: -values[name])}


def _lead(top1: Mapping[str, Sequence[float]]) -> str:
    """Compare the full block with the plain one, against two standard errors of the difference of means."""
    if not top1.get(FULL) or not top1.get(PLAIN):
        return ""
    full, plain = top1[FULL], top1[PLAIN]
    lead, printed = statistics.mean(full) - statistics.mean(plain), B0S[FULL][1] - B0S[PLAIN][1]
    told = f"{FULL} minus {PLAIN}: {lead:+.2f} points ({printed:+.2f} in the paper), n = {len(full)} and {len(plain)}"
    if min(len(full), len(plain)) < SEEDS:
        return f"{told}: too few seeds to tell whether that is more than chance."
    bound = 2 * math.hypot(*(statistics.stdev(values) / math.sqrt(len(values)) for values in (full, plain)))
    if abs(lead) <= bound:
        return f"{told}: within two standard errors ({bound:.2f}), which shows no difference."
    other_way = ", the other way round" if lead < 0 else ""
    return f"{told}: more than two standard errors ({bound:.2f}){other_way}."


def _chosen(pilot: Pilot) -> str:
    rates, (done, planned) = rates_of(pilot), trained(pilot)
    if len(rates) < 2:
        return ""
    which = "finished " if done < planned else ""
    return (
        f"Each variant has the best {which}of the learning rates {', '.join(rates)} for seed 0, by accuracy on the "
        "same images that top-1 is told of, and seed 0 counts among the n: that favours every variant a little."
    )
