"""The command run in the process of a test."""

from typing import Any

import pytest

from repvgg import cli

Captured = pytest.CaptureFixture[str]
TRAIN = "train --arch repvgg_micro --width 0.25 --data digits --limit 320 --device cpu --no-report"


def repvgg(*words: Any) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def refused(capsys: Captured, *words: Any) -> str:
    """The one line that a command which cannot work leaves on stderr, after its remarks; nothing on stdout."""
    capsys.readouterr()
    assert repvgg(*words) == 2
    shown = capsys.readouterr()
    *_, line = shown.err.splitlines()
    assert line.startswith("repvgg: ")
    assert shown.err.count("repvgg: ") == 1
    assert "Traceback" not in shown.err
    assert shown.out == ""
    return line.removeprefix("repvgg: ")
