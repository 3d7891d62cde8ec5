"""Tables in a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """A table as wide as it needs to be in a file or pipe, as the terminal allows in one; numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    rows = [[str(cell) for cell in row] for row in rows]
    for i, name in enumerate(header):
        numbers = i > 0 and all(row[i].replace(",", "")[:1].isdigit() or row[i] in ("", ".") for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 400
    console.print(table)
