"""completion.py: what bash itself completes; and the words that make the command louder or quieter."""

import os
import pty
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import Captured, refused, repvgg

from repvgg import terminal


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "repvgg"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert repvgg("--print-completion", "bash") == 0
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["tr"], ["train"]),
        (["bench-"], ["bench-data"]),
        (["train", "--image"], ["--image-size"]),
        (["export", "--any"], ["--any-size"]),
        (["export", "mod"], []),  # a file's name, which bash completes by itself
    ],
)
def test_bash_completes(typed: list[str], offered: list[str], completion: Path) -> None:
    words = " ".join(["repvgg", *typed])
    code = f'source {completion}; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _repvgg; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
@pytest.mark.parametrize(("typed", "completed"), [("repvgg tra", "repvgg train"), ("repvgg train --image", "--image-size")])
def test_zsh_completes(typed: str, completed: str, tmp_path: Path, capsys: Captured) -> None:
    """At a prompt, as a person types it. The words themselves: the test above, in bash."""
    assert repvgg("--print-completion", "zsh") == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    shell, terminal = pty.fork()
    if shell == 0:
        os.execvp("zsh", ["zsh", "-f", "-i"])
    os.write(terminal, f"autoload -Uz compinit && compinit -u -D && source {tmp_path}/completion && echo rea''dy\n".encode())
    try:
        assert "ready" in _shown(terminal, "ready")
        os.write(terminal, f"{typed}\t".encode())
        assert completed in _shown(terminal, completed)
    finally:
        os.kill(shell, signal.SIGKILL)
        os.waitpid(shell, 0)
        os.close(terminal)


def _shown(terminal: int, wanted: str) -> str:
    """Return what a terminal shows until the wanted word is in it, or for a while."""
    shown, end = b"", time.monotonic() + 60
    while wanted.encode() not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 65536)
    return shown.decode(errors="replace")


def test_zsh_reads_the_same_and_others_do_not(capsys: Captured) -> None:
    assert repvgg("--print-completion", "zsh") == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit && bashcompinit\n_repvgg()")
    assert refused(capsys, "--print-completion", "fish") == "--print-completion fish: bash or zsh"


def test_quiet_and_verbose(run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "quiet", False)
    monkeypatch.setenv("REPVGG_DEBUG", "")
    words = ("convert", run / "run/best.safetensors", tmp_path / "x.safetensors")
    assert repvgg(*words, "-q") == 0
    assert capsys.readouterr().err == ""
    assert "no such file" in refused(capsys, "convert", tmp_path / "no.pth", tmp_path / "y.safetensors", "--quiet")
    assert repvgg(*words) == 0
    assert capsys.readouterr().err
    with pytest.raises(ValueError, match="no recipe 'nope'"):
        repvgg("-v", "recipe", "nope")
