"""Words of the command line into a command, by tyro; and its complaints in one line of our own."""

import contextlib
import difflib
import io
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

import tyro

C = TypeVar("C")


class UsageError(ValueError):
    """Words that make no command."""


def parse(command: type[C], name: str, words: list[str], **defaults: Any) -> C:
    """Return the command that these words (those after its name) describe.

    defaults: of fields of the command, in place of its own. Raises `UsageError`; --help prints the page and exits.
    """
    given = [word for word in words if word.startswith("--") and len(word) > 2]
    known = sorted(flags(command)) if given else []
    for word in given:
        flag = word.partition("=")[0].replace("_", "-")
        if flag not in known and flag not in ("--help", "--tyro-print-completion", "--tyro-write-completion"):
            raise UsageError(f"{name} {flag}: {suggestion(flag, known) or f'no such flag; see repvgg {name} --help'}")
    default: Any = tyro.MISSING
    if defaults:
        default = command(**{f.name: tyro.MISSING for f in fields(command) if _required(f)}, **defaults)  # type: ignore[arg-type]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            how: Any = {"default": default} if defaults else {}
            parsed: C = tyro.cli(command, prog=f"repvgg {name}", args=words, **how)
            return parsed
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        raise UsageError(f"{name}: {_flat(complaint.getvalue())}; see repvgg {name} --help") from None


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the closest of the known words; nothing where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else ""


def flags(command: Any) -> set[str]:
    """Return the flags of a command, those of its groups too."""
    found: set[str] = set()
    for f in fields(command):
        if f.name == "given":  # what is not shown
            continue
        value = f.default_factory() if f.default_factory is not MISSING else f.default
        if is_dataclass(value):
            found |= flags(value)
        else:
            flag = f.name.replace("_", "-")
            found |= {f"--{flag}", f"--no-{flag}"} if isinstance(value, bool) else {f"--{flag}"}
    return found


def _required(f: "Field[Any]") -> bool:
    return f.default is MISSING and f.default_factory is MISSING


# What tyro says of a word, and how we say it.
SAID: tuple[tuple[str, str], ...] = (
    (r"Unrecognized options: (.*)", r"not understood: \1"),
    (r"Missing value for argument '(.*?)'.*", r"\1: its value is missing"),
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'", r"\1 \2: a whole number is needed"),
    (r"Error parsing (\S+): could not convert string to float: '(.*)'", r"\1 \2: a number is needed"),
    (r"Error parsing (\S+): no type matching \{?(.*?)\}? could be instantiated from \['(.*?)'\].*", r"\1 \3: \2 is needed"),
    (r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*?)\)\.", r"\2 \1: there is \3"),
)


def _flat(box: str) -> str:
    """Return tyro's box of complaints as one line: what is missing, or its lines without the help texts below them."""
    told: dict[str, list[str]] = {"": [], "Missing": [], "Unrecognized": []}
    part = ""
    for line in box.splitlines()[1:]:  # its frame is of other characters where the terminal's encoding has no lines
        inner = line.strip("│|")
        text = inner.strip(" ")
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        if text.startswith("Missing from") or text == "Unrecognized options:":
            part = text.split()[0]
        elif text.strip("─-+╭╮╰╯ ") and len(inner) - len(inner.lstrip()) < 8:
            told[part].append(text)
    if told["Missing"]:
        strange = f"; not understood: {', '.join(told['Unrecognized'])}" if told["Unrecognized"] else ""
        return f"missing: {', '.join(told['Missing'])}{strange}"
    line = re.sub(r"\{None\}\||'None', |, 'None'", "", " ".join(told[""])) or "these words make no command"
    return next((found.expand(ours) for theirs, ours in SAID if (found := re.fullmatch(theirs, line))), line)
