"""Markdown: tables, counts in words, speeds, intervals, machines, and when what was measured."""

import re
import statistics
from typing import Any

NAMED = 12  # parts of a record that are named one by one


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def pace(per_second: float) -> str:
    """Return a speed to three digits: 7.8, 59.4, 1,510."""
    return f"{float(f'{per_second:.3g}'):,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def interval(ratio: dict[str, float]) -> str:
    """Return a ratio and its 95% interval."""
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def mean_and_deviation(values: list[float]) -> str:
    """Return a mean to two decimals, with the standard deviation where there are several values."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def many(count: int, one: str, more: str = "") -> str:
    """Return a count with its noun: 1 core, 2 cores, 3 batches."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {more or one + 's'}"


def machine(m: dict[str, Any]) -> str:
    """Return what a record was measured on: the GPU if there is one, the processor, and versions."""
    if node := m["versions"].get("node"):
        return f"{m['processor']}, Node {node}"
    gpu = f"{m['gpu']}, " if m.get("gpu") else ""
    return f"{gpu}{m['processor']}{_kind(m)}, {many(m['cores'], 'core')}, Python {m['python']}, PyTorch {m['versions']['torch']}"


def measured(stamps: dict[str, dict[str, Any]]) -> str:
    """Return the machine, date and commit of the figures: once if all parts share them, else for each part.

    stamps: by part. If many parts share them, only their number is given.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for part, m in sorted(stamps.items(), key=lambda item: item[1]["date"][:10], reverse=True):
        when = f"{m['date'][:10]}, commit {m['commit'] or 'unknown'}"
        found.setdefault(machine(m), {}).setdefault(when, []).append(part)
    if sum(map(len, found.values())) <= 1:
        return "".join(f"Measured on {where} ({when})." for where, times in found.items() for when in times)
    told = [f"{where}: {'; '.join(f'{_named(parts)} ({when})' for when, parts in times.items())}" for where, times in found.items()]
    return f"Measured on {'. On '.join(told)}."


def _named(parts: list[str]) -> str:
    return ", ".join(f"`{part}`" for part in parts) if len(parts) <= NAMED else f"{len(parts)} others"


def _kind(m: dict[str, Any]) -> str:
    """Return a processor's family and model, and its instruction sets; nothing of records that do not have them."""
    words = [part.removeprefix("cpu ") for part in m.get("kind", "").split(", ") if re.match("cpu family|model|CPU ", part)]
    told = ", ".join([*words, *m.get("instruction_sets", ())])
    return f" ({told})" if told else ""
