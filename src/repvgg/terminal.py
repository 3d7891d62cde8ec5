"""What is shown in a terminal: tables, and strangers' words."""

import json
from collections.abc import Iterable, Sequence
from typing import Any


def printable(text: str) -> str:
    """Return text as one line without control characters: newlines, escapes and broken encodings are spelled out (\\n, \\x1b).

    Names of files, classes and tensors are strangers' words, and a terminal obeys some of them.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """Print a table as wide as it needs to be in a file or pipe, as the terminal allows in one; numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    rows = [[printable(str(cell)) for cell in row] for row in rows]
    for i, name in enumerate(header):
        numbers = i > 0 and all(row[i].replace(",", "")[:1].isdigit() or row[i] in ("", ".") for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 400
    console.print(table)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))


def millions(n: int) -> str:
    return f"{n / 1e6:.2f} M"


def billions(n: int) -> str:
    return f"{n / 1e9:.2f} G"
