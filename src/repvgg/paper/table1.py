"""Table 1: how fast a convolution multiplies, by the size of its kernel."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from repvgg.bench.kernels import Convolution, time_convolutions
from repvgg.measure.timing import Ratio, Times, ratio
from repvgg.paper.numbers import TABLE1
from repvgg.paper.result import PaperSettings, Result, Table, interval
from repvgg.web.drawing import MUTED, RULE, WIDEST, plot

SIZE, CHANNELS, BATCH, RUNS, WARMUP = 56, 2048, 32, 10, 2
SECONDS, QUICK_SECONDS = 60, 10  # what the whole table may take
PILOT = Convolution(256, 256, SIZE, kernel_size=5)


@dataclass(frozen=True)
class Problem:
    """The paper's, or a smaller one."""

    channels: int
    batch_size: int

    @property
    def macs(self) -> int:
        """The multiply-adds of one run of the whole table."""
        return sum(c.macs for c in self.convolutions) * self.batch_size

    @property
    def convolutions(self) -> list[Convolution]:
        return [Convolution(self.channels, self.channels, SIZE, row.kernel_size) for row in TABLE1]


PAPER = Problem(CHANNELS, BATCH)


def run(settings: PaperSettings) -> Result:
    engine, runs = settings.one_engine, settings.rounds or (3 if settings.quick else RUNS)
    options = settings.options(1)
    _, (pilot,) = time_convolutions([PILOT], options, engine=engine, rounds=3, warmup=1, log=settings.log)
    budget = QUICK_SECONDS if settings.quick else SECONDS
    problem = largest(pilot.median / PILOT.macs, budget / (runs + WARMUP + 1), settings.batch_size)
    settings.log(f"{problem.channels} channels, batch {problem.batch_size}: 1/{PAPER.macs / problem.macs:.0f} of the paper's work")
    batch, times = time_convolutions(
        problem.convolutions,
        settings.options(problem.batch_size),
        engine=engine,
        rounds=runs,
        warmup=WARMUP,
        log=settings.log,
    )
    problem = Problem(problem.channels, batch)
    macs = [c.macs * batch for c in problem.convolutions]
    rates = [ratio(_each(times[0], macs[0]), _each(t, m)) for t, m in zip(times, macs, strict=True)]
    size = f"{problem.channels} to {problem.channels} channels, {SIZE}x{SIZE}, batch {batch}"
    return Result(
        "Table 1: speed of a convolution by its kernel",
        [_table(size, macs, times, rates)],
        _why(problem, size, rates),
        {
            "problem": {**asdict(problem), "size": SIZE},
            "share_of_the_papers_work": problem.macs / PAPER.macs,
            "engine": engine,
            "precision": settings.precision,
            "kernels": [
                {"kernel_size": row.kernel_size, "macs": m, "seconds": t.by_round, "rate_over_1x1": interval(r)}
                for row, m, t, r in zip(TABLE1, macs, times, rates, strict=True)
            ],
        },
        {"table1": _draw(rates)},
    )


def largest(seconds_per_mac: float, seconds: float, batch_size: int | None = None) -> Problem:
    """Return the largest problem, up to the paper's, one run of which takes no longer; with that batch size, where it is given.

    The batch is halved first, down to 4, then the channels, down to 128, then the batch again.
    """
    batches = [batch_size] if batch_size else [32, 16, 8, 4]
    problems = [Problem(CHANNELS, batch) for batch in batches]
    problems += [Problem(channels, batches[-1]) for channels in (1024, 512, 256, 128)]
    problems += [] if batch_size else [Problem(128, 2), Problem(128, 1)]
    return next((p for p in problems if p.macs * seconds_per_mac <= seconds), problems[-1])


def _each(times: Times, macs: int) -> Times:
    """Return seconds a multiply-add of each kernel."""
    return Times([[s / macs for s in turn] for turn in times.rounds])


def _table(size: str, macs: Sequence[int], times: Sequence[Times], rates: Sequence[Ratio]) -> Table:
    header = (
        "kernel",
        "GFLOPs, paper",
        "here",
        "ms, paper",
        "here",
        "quartiles",
        "TFLOPS, paper",
        "here",
        "relative to 1x1, paper",
        "here (95% interval)",
    )
    rows = [
        (
            f"{row.kernel_size}x{row.kernel_size}",
            f"{row.gflops:,.1f}",
            f"{m // 10**8 / 10:,.1f}",  # truncated, as the paper does
            f"{row.milliseconds:,.1f}",
            f"{t.median * 1e3:,.1f}",
            " to ".join(f"{q * 1e3:,.1f}" for q in t.quartiles),
            f"{row.tflops:.2f}",
            f"{2 * m / t.median / 1e12:.3g}",
            f"{row.tflops / TABLE1[0].tflops:.2f}x",
            r,
        )
        for row, m, t, r in zip(TABLE1, macs, times, rates, strict=True)
    ]
    return Table(f"Here with {size}", header, rows)


def _why(problem: Problem, size: str, rates: Sequence[Ratio]) -> str:
    three, others = rates[1].value, max(rates[0].value, rates[2].value, rates[3].value)
    scaled = (
        "" if problem == PAPER else f" (here {size}: 1/{PAPER.macs / problem.macs:.0f} of that work, so that it takes a minute)"
    )
    found = (
        f"Here too the 3x3 stands out, at {three:.2f} times the rate of the 1x1."
        if three > 1.25 * others
        else f"Here it does not: the 3x3 has {three:.2f} times the rate of the 1x1, as one expects of a library that multiplies "
        "nine times for nine weights, and needs Winograd to do better."
    )
    return (
        f"2048 to 2048 channels on 56x56 maps at batch 32{scaled}. A multiply-add counts once in GFLOPs and twice in TFLOPS, "
        "as in the paper. Its point is that the 3x3 does about four times as many operations a second as any other kernel, on a "
        "GTX 1080Ti, because cuDNN runs it by Winograd: 4 multiplications instead of 9, and the operations it saves are "
        "counted as done. " + found
    )


def _draw(rates: Sequence[Ratio]) -> Any:
    figure, (axes,) = plot(640, 260)
    for offset, colour, label, values in (
        (-0.19, RULE, "paper, GTX 1080Ti", [row.tflops / TABLE1[0].tflops for row in TABLE1]),
        (0.19, WIDEST[1], "here", [r.value for r in rates]),
    ):
        bars = axes.bar([i + offset for i in range(len(TABLE1))], values, 0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8, color=MUTED)
    axes.set_xticks(range(len(TABLE1)), [f"{row.kernel_size}x{row.kernel_size}" for row in TABLE1])
    axes.set_ylabel("operations a second, of the 1x1's", fontsize=9)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=9)
    return figure
