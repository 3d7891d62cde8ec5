"""Footnote 3's test: does a library run a 3x3 convolution of stride 1 by Winograd?

The paper times it against a counterpart of stride 2 that does as many multiply-adds: the same channels and output map, the input
of twice the side. Winograd as cuDNN has it, F(2x2, 3x3), exists for stride 1 alone, so where it is used the counterpart is much
slower: up to 2.25 times. But four times the input has to be read too, and that alone takes time. How much, the same pair of
*depthwise* convolutions tells: the same maps in the same engine, next to no multiplications. So what is left for Winograd is

    stride 2 / (stride 1 + what the doubled input costs),     cost of the doubled input = depthwise stride 2 - depthwise stride 1

An engine with a Winograd for stride 2 too, as native, cannot be tested so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from repvgg.bench.kernels import Convolution, time_convolutions
from repvgg.deploy import engines
from repvgg.measure.timing import Ratio, Times, ratio
from repvgg.models.names import FAMILY
from repvgg.paper.result import NothingChosenError, PaperSettings, Result, Table, interval
from repvgg.paper.speeds import Shelf
from repvgg.web.drawing import MUTED, POINTWISE, RULE, WIDEST, plot

# A smaller difference may be one of loops and caches. F(2x2, 3x3) at no cost of its own would give 2.25.
THRESHOLD = 1.25
MEMBERS = ("repvgg_a0", "repvgg_b1", "repvgg_b1g4")
IMAGE = 224
STRIDED = ("native",)  # engines that have a Winograd for stride 2 too


@dataclass(frozen=True)
class Comparison:
    """One 3x3 convolution of the family in one engine. plain: stride 2 over stride 1; memory: what the doubled input explains of
    that; left: what it does not."""

    engine: str
    convolution: Convolution
    batch_size: int
    seconds: dict[str, list[float]]
    plain: Ratio
    memory: Ratio
    left: Ratio

    @property
    def verdict(self) -> str:
        return verdict(self.plain, self.left)


def verdict(plain: Ratio, left: Ratio) -> str:
    """ "yes" or "no" where the whole interval is on one side of the threshold, else "undecided"; as is a difference of which the
    doubled input explains more than there is, so that the depthwise pair is no measure of it."""
    if left.high < 1 and plain.high >= THRESHOLD:
        return "undecided"
    return "yes" if left.low > THRESHOLD else "no" if left.high < THRESHOLD else "undecided"


def run(settings: PaperSettings) -> Result:
    shelf = Shelf(settings)
    tests = [test for engine in _engines(settings) for test in _tests(engine, settings, shelf)]
    conclusions = {
        engine: conclude([t.verdict for t in tests if t.engine == engine]) for engine in dict.fromkeys(t.engine for t in tests)
    }
    found = "; ".join(f"{engine}: {conclusion}" for engine, conclusion in conclusions.items())
    return Result(
        "Footnote 3: is Winograd in use?",
        [_table(tests)],
        f"On {settings.where}, {settings.precision}: {found}. Each 3x3 convolution of stride 1 is timed against one of stride "
        "2 that does as many multiply-adds, on an input of twice the side. Winograd as cuDNN has it, F(2x2), exists for stride "
        "1 only, and makes it up to 2.25 times as fast. Reading four times the input costs time too; how much is measured on "
        "depthwise convolutions of the same maps, which multiply next to nothing. What that leaves is held against "
        f"{THRESHOLD}, since loops and caches differ too: Winograd is in use where the whole 95% interval is above, not in use "
        "where it is below, and it is undecided where the interval straddles, or where reading explains more than there is. One "
        "shape alone proves little, because a stride of 2 can be slow for reasons of its own (rows that are a power of two "
        "apart share a cache set): an engine's verdict is that on most of its shapes. On the paper's GPU most 3x3 convolutions "
        "of stride 1 passed this test; those that did not are why three rows of Tables 4 and 5 count more MULs than the rule "
        "gives.",
        {
            "threshold": THRESHOLD,
            "precision": settings.precision,
            "conclusions": conclusions,
            "tests": [
                {
                    **{name: getattr(t, name) for name in ("engine", "batch_size", "seconds", "verdict")},
                    "convolution": asdict(t.convolution),
                    **{name: interval(getattr(t, name)) for name in ("plain", "memory", "left")},
                }
                for t in tests
            ],
        },
        {"winograd": _draw(tests)},
    )


def conclude(verdicts: Sequence[str]) -> str:
    """Say in one sentence what the test finds for most of an engine's convolutions."""
    words = {"yes": "in use", "no": "not in use", "undecided": "undecided"}
    counts = {verdict: verdicts.count(verdict) for verdict in words}
    most = max(words, key=lambda verdict: counts[verdict])
    if counts[most] == len(verdicts):
        return f"Winograd is {words[most]}, in all of {len(verdicts)} shapes"
    if 2 * counts[most] <= len(verdicts):
        most = "undecided"
    return f"Winograd is {words[most]} (" + ", ".join(f"{verdict} for {n}" for verdict, n in counts.items() if n) + " shapes)"


def shapes(members: Sequence[str]) -> list[Convolution]:
    """Return the 3x3 of stride 1 of stages 2 to 4 of each member: the last layer but one, which is where groups are."""
    found = []
    for name in members:
        member = FAMILY[name]
        for stage in (1, 2, 3):
            channels = member.widths()[stage]
            found.append(Convolution(channels, channels, IMAGE >> (stage + 1), groups=member.groups))
    return list(dict.fromkeys(found))


def counterparts(c: Convolution) -> dict[str, Convolution]:
    """Return the four convolutions that are timed side by side."""
    n, size = c.in_channels, c.size
    return {
        "stride 1": c,
        "stride 2": Convolution(n, n, 2 * size, stride=2, groups=c.groups),
        "depthwise stride 1": Convolution(n, n, size, groups=n),
        "depthwise stride 2": Convolution(n, n, 2 * size, stride=2, groups=n),
    }


def _engines(settings: PaperSettings) -> list[str]:
    """Return the engine asked for; or all that are installed (in a quick look, eager alone)."""
    if settings.named_engine or settings.quick:
        return [settings.one_engine]
    return engines.installed(settings.precision, settings.device, settings.log)


def _tests(engine: str, settings: PaperSettings, shelf: Shelf) -> list[Comparison]:
    """Return the test of every shape; none of an engine that runs whole networks alone, or stride 2 by Winograd too."""
    try:
        return [
            _compare(engine, convolution, settings, shelf) for convolution in shapes(MEMBERS[:1] if settings.quick else MEMBERS)
        ]
    except ValueError as error:
        if settings.named_engine:
            raise
        settings.log(f"left out: {error}")
        return []


def _compare(engine: str, convolution: Convolution, settings: PaperSettings, shelf: Shelf) -> Comparison:
    if engine in STRIDED:
        raise NothingChosenError(f"{engine} runs stride 2 by Winograd too, which this test cannot tell")
    key = f"{engine} {settings.precision}, {convolution}"
    if key not in shelf.convolutions:
        shelf.convolutions[key] = _timed(engine, convolution, settings)
        shelf.save()
    batch, seconds = shelf.convolutions[key]
    found = judge(engine, convolution, batch, seconds)
    settings.log(f"{engine}, {convolution}: {found.plain}, left {found.left}")
    return found


def _timed(engine: str, convolution: Convolution, settings: PaperSettings) -> tuple[int, dict[str, list[float]]]:
    """Return the batch, and each counterpart's seconds by round."""
    protocol = settings.protocol
    four = counterparts(convolution)
    batch, times = time_convolutions(
        list(four.values()),
        settings.options(protocol.batch_size),
        engine=engine,
        rounds=2 * protocol.rounds,
        batches=protocol.batches,
        warmup=protocol.warmup,
        log=settings.log,
    )
    return batch, {name: t.by_round for name, t in zip(four, times, strict=True)}


def judge(engine: str, convolution: Convolution, batch_size: int, by_round: dict[str, list[float]]) -> Comparison:
    """Judge by the four counterparts' seconds."""
    times = {name: Times([[s] for s in seconds]) for name, seconds in by_round.items()}
    extra = [max(0.0, b - a) for a, b in zip(by_round["depthwise stride 1"], by_round["depthwise stride 2"], strict=True)]
    explained = Times([[t + e] for t, e in zip(by_round["stride 1"], extra, strict=True)])
    return Comparison(
        engine,
        convolution,
        batch_size,
        by_round,
        plain=ratio(times["stride 2"], times["stride 1"]),
        memory=ratio(explained, times["stride 1"]),
        left=ratio(times["stride 2"], explained),
    )


def _table(tests: Sequence[Comparison]) -> Table:
    header = (
        "engine",
        "3x3 of stride 1",
        "batch",
        "ms",
        "stride 2, ms",
        "stride 2 / stride 1",
        "the doubled input explains",
        "left (95% interval)",
        "Winograd?",
    )
    rows = [
        (
            t.engine,
            f"{t.convolution.in_channels} channels"
            + (f", {t.convolution.groups} groups" if t.convolution.groups > 1 else "")
            + f", {t.convolution.size} x {t.convolution.size}",
            t.batch_size,
            *(f"{Times([[s] for s in t.seconds[name]]).median * 1e3:.2f}" for name in ("stride 1", "stride 2")),
            t.plain,
            f"{t.memory.value:.2f}x",
            t.left,
            t.verdict,
        )
        for t in tests
    ]
    return Table("A 3x3 of stride 1 against its counterpart of stride 2", header, rows, folded=True)


def _draw(tests: Sequence[Comparison]) -> Any:
    figure, (axes,) = plot(900, 90 + 22 * len(tests))
    names = [f"{t.engine}: {t.convolution}" for t in tests]
    rows = range(len(tests))
    axes.axvline(THRESHOLD, color=MUTED, linewidth=1, linestyle="--")
    axes.axvline(1, color=RULE, linewidth=1)
    axes.plot([t.plain.value for t in tests], rows, "o", color=POINTWISE[1], markerfacecolor="white", label="stride 2 / stride 1")
    spread = [[t.left.value - t.left.low for t in tests], [t.left.high - t.left.value for t in tests]]
    axes.errorbar(
        [t.left.value for t in tests],
        rows,
        xerr=spread,
        fmt="o",
        color=WIDEST[1],
        capsize=3,
        label="left without the cost of the doubled input",
    )
    axes.set_yticks(rows, names, fontsize=8)
    axes.set_ylim(len(tests) - 0.5, -0.5)
    axes.set_xlim(min(0.8, *(t.left.low for t in tests)) - 0.05, max(2.3, *(t.plain.high for t in tests)) + 0.05)
    axes.set_xlabel(f"ratio of times; above {THRESHOLD:.2f}: Winograd", fontsize=9, color=MUTED)
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure
