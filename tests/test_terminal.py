"""terminal.py: what is shown cannot steer the terminal."""

import io
import sys

import pytest

from repvgg.terminal import Progress, live, print_table, printable


def test_control_characters_are_spelled_out() -> None:
    assert printable("cat\n\x1b[2Jdog\r") == r"cat\n\x1b[2Jdog\r"
    assert printable("größe 猫 🐱") == "größe 猫 🐱"
    assert printable("\u202etxt.exe") == r"\u202etxt.exe"  # the order of reading turned round
    assert printable("a\udcffb") == r"a\udcffb"  # a file name that is not UTF-8


def test_a_table_of_hostile_names(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("class\x1b[2J", "n"), [("cat\n\x1b[31m", 5), ("[bold]dog", 7)])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"cat\n\x1b[31m" in text
    assert "[bold]dog" in text
    assert len(text.strip().splitlines()) == 4


@pytest.mark.parametrize("closed", [True, False])
def test_without_stderr(monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    """A daemon may have none, or a closed one: nothing is shown."""
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if closed else None)
    with Progress(1, print) as progress, live() as show:
        show("a line")
        progress.add(1, lambda: "a line", "things")


def test_where_the_terminal_is_narrow_the_count_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    with Progress(5460, print, before=1000, left=lambda share: (1 - share) ** 2) as progress:
        progress.add(28, lambda: "epoch 2/14  " + "a long line " * 9, "step")
    assert "1028/5460" in stream.getvalue()
    assert "epoch 2/14" in stream.getvalue()
    assert "…" in stream.getvalue()
