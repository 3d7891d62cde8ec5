"""Tables, progress and strangers' words in a terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from repvgg.disk import Log

quiet = False  # neither bars nor live lines: set by `repvgg -q`
BAR = 16  # characters
PLAIN_EVERY = 30.0  # seconds between lines where there is no terminal


def _at_a_terminal() -> bool:
    """Say whether somebody reads what is written to standard error; a daemon may have none."""
    return bool(sys.stderr) and not sys.stderr.closed and sys.stderr.isatty()


def alike(share: float) -> float:
    """Return the work that is left after a share of it, where all parts take the same time."""
    return 1 - share


class Progress:
    """A bar with a line that changes in place in a terminal; elsewhere a plain line now and then. Use as a context manager.

    total: how many there are, None where it is not known; before: how many an earlier process did. board: returns what a terminal
    shows above the bar, as rich has it; asked once a second. left: returns the share of the work that is left after a share of the
    total.
    """

    def __init__(
        self,
        total: int | None,
        log: Log = print,
        before: int = 0,
        board: Callable[[], Any] | None = None,
        left: Callable[[float], float] = alike,
    ) -> None:
        self.total, self.log, self.done, self.before, self.board, self.left = total, log, before, before, board, left
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if not quiet and _at_a_terminal():
            self.bar = _bar(self.board)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.total, **self._shown())
        self.spoke = self.mark = time.perf_counter()
        self.seconds = 0.0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def add(self, count: int, line: Callable[[], str], what: str) -> None:
        """Count what has been done since the last call, and show a line. what: the name of what is counted, in plain lines."""
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, description=line(), **self._shown())
        elif now - self.spoke > PLAIN_EVERY:
            self.spoke = now
            rest = "" if self.total is None else f"/{self.total}  {self.minutes_left(self.before, self.seconds):.1f} min left"
            self.log(f"{line()}  {what} {self.done}{rest}")

    def _shown(self) -> dict[str, Any]:
        """Return what the bar shows: it moves with the work, and counts what is done."""
        if self.total is None:
            return {"completed": self.done, "count": f"{self.done}"}
        work = 1 - self.left(self.done / self.total) / self.left(0.0) if self.total else 1.0
        return {"completed": self.total * work, "count": f"{self.done}/{self.total}"}

    def minutes_left(self, since: int, seconds: float) -> float:
        """Return the minutes that the rest takes, if what was done since so many were done took so many seconds."""
        total = self.total or self.done
        left = self.left(self.done / total)
        return seconds / (self.left(since / total) - left) * left / 60

    def say(self, line: str) -> None:
        """Print a line that stays; the time since the last `add` does not count."""
        self.mark = self.spoke = time.perf_counter()
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            self.log(line)


def _bar(board: Callable[[], Any] | None) -> Any:
    """Return a bar of rich, below what `board` returns."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich
    from rich.table import Column

    class Bar(Rich):
        def get_renderables(self) -> Iterator[Any]:
            if board is not None:
                yield board()
            yield from super().get_renderables()

    class Line(TextColumn):
        """Shows a line that is cut where the terminal is narrow, so that count and time left are not."""

        def render(self, task: Any) -> Any:
            text = super().render(task)
            text.no_wrap = True
            return text

    line = Line("{task.description}", table_column=Column(overflow="ellipsis"))
    columns = (line, BarColumn(BAR), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    console = Console(file=sys.stderr)  # today's: it may be a file while something else is at work
    return Bar(*columns, console=console, transient=True, refresh_per_second=1 if board else 10)


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
        table.add_column(printable(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 100_000
    console.print(table)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))


def millions(n: int) -> str:
    return f"{n / 1e6:.2f} M"


def billions(n: int) -> str:
    return f"{n / 1e9:.2f} G"


@contextmanager
def live() -> Iterator[Callable[[str], object]]:
    """Yield what shows one line in a terminal, in place of the last; elsewhere it shows nothing."""
    if quiet or not _at_a_terminal():
        yield str
        return
    from rich.console import Console

    with Console(stderr=True, markup=False, highlight=False).status("") as status:
        yield lambda line: status.update(printable(line))
