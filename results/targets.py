"""Compare the targets of the native engine with what its records say was reached: the table of docs/engine.md.

A ratio is kept or missed by its value, whatever its interval.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import outdated
from layout import measured, table
from records import stamps
from rivals import RUNS, Figures, Run, named, over, own, rivals, times_as_fast

Record = dict[str, Any]
WHERE = {"a0": "", "avx2": ", AVX2 alone"}


@dataclass(frozen=True)
class Ratio:
    """A target for the speed of RepVGG-A0 over a rival's, in a run of engine.json.

    ours: the first words of our entries that count, of which the fastest is taken. theirs: a rival, "" for the fastest in float32.
    error: what ours may be at most, as a multiple of the rival's.
    """

    part: str
    batch: int
    ours: str
    theirs: str
    wanted: float
    error: float = float("inf")


RATIOS = (
    Ratio("a0", 32, "int", "openvino int8", 1.15, 0.1),
    Ratio("avx2", 32, "int", "openvino int8", 1.4, 0.1),
    Ratio("a0", 1, "int", "openvino int8", 1.0, 0.1),
    Ratio("a0", 1, "int", "openvino int8", 1.0, 1),
    Ratio("avx2", 1, "int", "openvino int8", 1.0, 0.1),
    Ratio("avx2", 1, "int", "openvino int8", 1.0, 1),
    Ratio("a0", 1, "bf16 high", "openvino bf16", 1.55),
    Ratio("a0", 32, "fp32 fast", "openvino", 2.7),
    Ratio("a0", 32, "fp32 high", "", 2.0),
    Ratio("avx2", 32, "fp32 high", "", 2.0),
    Ratio("a0", 1, "fp32 high", "", 1.6),
    Ratio("avx2", 1, "fp32 high", "", 1.6),
)
COLD_SECONDS, A0_MIB = 3.0, 200
SHARES = {0.1: ", at most a tenth of its error", 1: ", at most its error"}


def targets(engine: Record, predictions: Record, wasm: Record) -> str:
    """Return a row for each target; each record may lack what was not measured."""
    rows = [*(_ratio(engine, t) for t in RATIOS), _predictions(predictions), *_start(engine.get("start", {})), *_wasm(wasm)]
    when = stamps(engine, *RUNS, "start")
    when |= {file: stamp for file, r in (("predictions.json", predictions), ("wasm.json", wasm)) for stamp in stamps(r).values()}
    return f"{table(['wanted', 'at least / at most', 'reached', ''], rows)}\n\n{_spans(engine)}\n\n{measured(when)}\n"


def _spans(engine: Record) -> str:
    """Say in words what holds over all runs of all engines."""
    runs = [run for part in RUNS for run in engine.get(part, {}).values()]

    def span(ours: str, theirs: str, of: Callable[[Figures, Figures], float]) -> str:
        found = [of(run[ours], run[theirs]) for run in runs if ours in run and theirs in run]
        return f"{min(found):.2f} to {max(found):.2f}" if found else "(not measured)"

    def part_of_error(a: Figures, b: Figures) -> float:
        return float(a["rms_error"] / b["rms_error"])

    def speed(a: Figures, b: Figures) -> float:
        return times_as_fast(a, b).value

    int16, int8, floats = "native int16 high", "openvino int8", "native fp32 high"
    return (
        f"Over all runs, `int16` at `high` has {span(int16, int8, part_of_error)} of the error of OpenVINO's INT8 and "
        f"{span(int16, int8, speed)} times its speed; in float32 `fast` is "
        f"{span('native fp32 fast', floats, speed)} times as fast as `high`, in "
        f"`int16` {span('native int16 fast', int16, speed)} times."
    )


def _row(what: str, wanted: str, found: float | None, shown: Callable[[float], str], kept: bool) -> list[str]:
    if found is None:
        return [what, wanted, "", "not measured"]
    return [what, wanted, shown(found), "kept" if kept else "**missed**"]


def _ratio(engine: Record, t: Ratio) -> list[str]:
    run: Run = engine.get(t.part, {}).get(f"batch {t.batch}", {})
    rival = t.theirs or next(iter(rivals(run)), "")
    theirs = run.get(rival)
    ours = {
        name: f
        for name, f in own(run).items()
        if theirs and name.startswith(t.ours) and f["rms_error"] <= t.error * theirs["rms_error"]
    }
    images = "one image at a time" if t.batch == 1 else f"{t.batch} at a time"
    whom = named(t.theirs) if t.theirs else "the fastest other engine"
    what = f"A0 in {t.ours.replace('int', 'integers')} over {whom}, {images}{WHERE[t.part]}{SHARES.get(t.error, '')}"
    best = max(ours, key=lambda name: ours[name]["images_per_second"], default=None)
    if best is None or theirs is None:
        return _row(what, f"{t.wanted:.2f}", None, str, kept=False)
    found = times_as_fast(ours[best], theirs).value
    told = [over(ours[best], theirs), *([best] if best != t.ours else []), *([] if t.theirs else [named(rival)])]
    return _row(what, f"{t.wanted:.2f}", found, lambda _: ", ".join(told), found >= t.wanted)


def _predictions(predictions: Record) -> list[str]:
    found = {name: f["differ_where_clear"] for name, f in predictions.get("engines", {}).items() if name.startswith("int")}
    changed = max(found.values()) if {"int16", "int8"} <= {name.split()[0] for name in found} else None
    what = "clear predictions of 10,000 CIFAR-10 images that int16 and int8 change"
    return _row(what, "0", changed, lambda x: f"{x:.0f}", changed == 0)


def _start(start: Record) -> Iterator[list[str]]:
    cold = {words: f["seconds"] for words, f in start.items() if words.startswith("native cold") and words.endswith("batch 1")}
    worst = max(cold, key=lambda words: cold[words], default=None)
    member = worst.split(", ")[1] if worst and worst.count(",") > 1 else "A0"
    seconds = cold[worst] if worst else None
    what = "seconds from the start of a process to its first prediction, without a plan"
    yield _row(what, f"{COLD_SECONDS:.0f}", seconds, lambda x: f"{x:.2f} ({member})", (seconds or 0) <= COLD_SECONDS)
    for words, when in (("native, batch 32", "with a plan"), ("native cold, batch 32", "without")):
        peak = start[words]["peak_kib"] / 1024 if words in start else None
        what = f"MiB of the whole process at its peak, A0, 32 images at a time, {when}"
        yield _row(what, str(A0_MIB), peak, lambda x: f"{x:.0f}", (peak or 0) <= A0_MIB)


def _wasm(wasm: Record) -> Iterator[list[str]]:
    earlier = ", an earlier build" if "bytes" in wasm and outdated.build(wasm)[1] else ""
    for key, which in (("ratio", "with relaxed SIMD"), ("ratio_without_relaxed_simd", "without")):
        found = wasm[key]["median"] if key in wasm else None
        what = f"A0 as WebAssembly over onnxruntime-web, one thread, {which}{earlier}"
        wanted = wasm.get("target", 2.3)
        yield _row(what, f"{wanted:.2f}", found, lambda x: f"{x:.2f}", (found or 0) >= wanted)
