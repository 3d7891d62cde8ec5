"""terminal.py: what is shown cannot steer the terminal."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg.terminal import as_named, print_table, printable, shown


def test_control_characters_are_spelled_out() -> None:
    assert printable("cat\n\x1b[2Jdog\r") == r"cat\n\x1b[2Jdog\r"
    assert printable("größe 猫 🐱") == "größe 猫 🐱"
    assert printable("\u202etxt.exe") == r"\u202etxt.exe"  # the order of reading turned round
    assert printable("a\udcffb") == r"a\udcffb"  # a file name that is not UTF-8


def test_a_table_of_hostile_names(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("class", "n"), [("cat\n\x1b[31m", 5), ("[bold]dog", 7)])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"cat\n\x1b[31m" in text
    assert "[bold]dog" in text
    assert len(text.strip().splitlines()) == 4


@given(st.binary(max_size=30))
def test_any_bytes_are_shown_and_found_again(raw: bytes) -> None:
    name = os.fsdecode(raw)
    text = shown(name)
    assert text.isprintable()
    text.encode("utf-8")
    assert as_named(text) == name


def test_what_is_readable_stays_readable() -> None:
    assert shown("train/épagneul 犬/1.jpg") == "train/épagneul 犬/1.jpg"
    assert shown(os.fsdecode(b"caf\xe9\n")) == "caf\\udce9\\n"
    assert shown("back\\slash") == "back\\\\slash"
