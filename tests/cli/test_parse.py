"""parse.py: words that make no command get one line that says which ones, and what was meant."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import OmitArgPrefixes, Positional, arg

from repvgg.cli import entry
from repvgg.cli.parse import UsageError, parse
from repvgg.train.recipes import FIELDS, Augmentation, Machine, Optimization, Schedule


@dataclass(frozen=True)
class Group:
    """Flags together."""

    epochs: int = 3
    """Passes."""
    flip: bool = True
    """Mirror."""
    share: float = 0.5
    """Of them."""
    size: tuple[int, int] | None = None
    """Height and width."""
    form: Literal["deploy", "training"] | None = None
    """Of the model."""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A command.

    Example: repvgg toy x
    """

    model: Annotated[str, Positional, arg(metavar="MODEL", help="A model.")]
    out: Path
    """A folder."""
    group: OmitArgPrefixes[Group] = field(default_factory=Group)


def test_words_make_a_command() -> None:
    assert parse(Toy, "toy", ["m", "--out", "x", "--no-flip", "--epochs=5"]) == Toy(model="m", out=Path("x"), group=Group(5, False))
    assert parse(Toy, "toy", ["m", "--out", "x"], group=Group(9)).group.epochs == 9


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("m --out x --epoch 5", "toy --epoch: did you mean --epochs?"),
        ("m --outt=x", "toy --outt: did you mean --out?"),
        ("m --out x --no-flop", "toy --no-flop: did you mean --no-flip?"),
        ("m --out x --colour", "toy --colour: no such flag; see repvgg toy --help"),
        ("m", "toy: missing: --out PATH; see repvgg toy --help"),
        ("", "toy: missing: MODEL, --out PATH; see repvgg toy --help"),
        ("m stray", "toy: missing: --out PATH; not understood: stray; see repvgg toy --help"),
        ("m --out x more", "toy: not understood: more; see repvgg toy --help"),
        ("m --out", "toy: --out: its value is missing; see repvgg toy --help"),
        ("m --out x --epochs many", "toy: --epochs many: a whole number is needed; see repvgg toy --help"),
        ("m --out x --share half", "toy: --share half: a number is needed; see repvgg toy --help"),
        ("m --out x --size 4", "toy: --size 4: INT INT is needed; see repvgg toy --help"),
    ],
)
def test_a_usage_error_is_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as refused:
        parse(Toy, "toy", words.split())
    assert str(refused.value) == line
    assert capsys.readouterr() == ("", "")


def test_a_choice_that_there_is_not_lists_them() -> None:
    line = "^toy: --form plain: there is ('deploy', 'training'|'training', 'deploy'); see repvgg toy --help$"
    with pytest.raises(UsageError, match=line):
        parse(Toy, "toy", ["m", "--out", "x", "--form", "plain"])


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_help_has_an_example_and_names_its_positionals(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(entry._command(name), name, ["--help"])
    assert stop.value.code in (0, None)
    page = capsys.readouterr().out
    usage, example = page.splitlines()[0], next(line for line in page.splitlines() if line.startswith("Example: "))
    assert example.startswith(f"Example: repvgg {name}")
    positionals = re.sub(r"\[[^]]*\]|--\S+ \S+", "", usage)
    assert not re.search("STR|PATH|INT", positionals)
    entry._command(name)  # and the example is one that it takes:
    words = example.removeprefix("Example: repvgg ").split()[1:]
    assert callable(parse(entry._command(name), name, words).run)


@pytest.mark.parametrize("name", entry.WITH_RECIPE)
def test_the_recipes_fields_are_in_groups(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # on a wide terminal groups stand side by side
    with pytest.raises(SystemExit):
        parse(entry._command(name), name, ["--help"])
    parts = re.split(r"^\W+([\w-]+) options\W*$", capsys.readouterr().out, flags=re.MULTILINE)
    shown = {
        title: re.findall(r"^\W*?(--[a-z][\w-]+)", text, re.MULTILINE) for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    for kind in (Schedule, Optimization, Augmentation, Machine):
        assert shown[kind.__name__.lower()] == [f"--{f.name.replace('_', '-')}" for f in fields(kind)]
    assert "settings" not in shown
    assert [f.name for kind in (Schedule, Optimization, Augmentation, Machine) for f in fields(kind)] == list(FIELDS)


def test_fields_of_every_group_change_the_recipe_that_is_named() -> None:
    words = "train --data digits --out x --recipe cifar --no-flip --epochs 3 --lr 0.5 --precision fp32 --seed 2"
    settings = entry.understood(words.split()).settings
    assert settings.changes == {"flip": False, "epochs": 3, "lr": 0.5, "precision": "fp32"}
    assert settings.optimization.nesterov  # as in cifar
