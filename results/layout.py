"""Markdown: tables, counts in words, intervals, machines."""

import re
from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def interval(ratio: dict[str, float]) -> str:
    """Return a ratio and its 95% interval."""
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def many(count: int, one: str, more: str = "") -> str:
    """Return a count with its noun: 1 core, 2 cores, 3 batches."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {more or one + 's'}"


def machine(m: dict[str, Any]) -> str:
    """Return what a record was measured on: the GPU if there is one, the processor, and versions."""
    if "node" in m:
        return f"{m['processor']}, Node {m['node']}"
    gpu = f"{m['gpu']}, " if m.get("gpu") else ""
    return f"{gpu}{m['processor']}{_kind(m)}, {many(m['cores'], 'core')}, Python {m['python']}, PyTorch {m['versions']['torch']}"


def _kind(m: dict[str, Any]) -> str:
    """Return a processor's family and model, and its instruction sets; nothing of records that do not have them."""
    words = [part.removeprefix("cpu ") for part in m.get("kind", "").split(", ") if re.match("cpu family|model|CPU ", part)]
    told = ", ".join([*words, *m.get("instruction_sets", ())])
    return f" ({told})" if told else ""
