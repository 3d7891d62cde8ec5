"""staged.py: files appear together and whole, also where a process is killed or the disk is full."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import randomize

from repvgg.deploy import engines
from repvgg.deploy.export import export
from repvgg.deploy.formats import FORMATS
from repvgg.deploy.staged import refuse_strangers, staged
from repvgg.disk import FileError
from repvgg.models import zoo


def test_all_or_nothing(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        for name in ("a.json", "b.bin"):
            (folder / name).write_text(name)
        assert not list((tmp_path / "out").glob("[!.]*"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "b.bin"]
    with suppress(ValueError), staged(tmp_path / "other") as folder:
        (folder / "a.json").write_text("x")
        raise ValueError
    assert not (tmp_path / "other").exists()


def test_a_page_of_somebody_elses_stays(tmp_path: Path) -> None:
    refuse_strangers(tmp_path, "ours.json", "index.html")
    (tmp_path / "index.html").write_text("precious")
    with pytest.raises(FileError, match=r"holds the index\.html of something else"):
        refuse_strangers(tmp_path, "ours.json", "index.html")
    (tmp_path / "ours.json").touch()
    refuse_strangers(tmp_path, "ours.json", "index.html")


def test_files_of_somebody_elses_stay_and_our_own_are_replaced(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with staged(tmp_path, "a.xml.json") as folder:
            for name in ("a.bin", "a.xml", "a.xml.json"):
                (folder / name).write_text(text)

    (tmp_path / "a.bin").write_text("precious")
    with pytest.raises(FileError, match=r"holds the a\.bin of something else"):
        write("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.bin", "precious")]
    (tmp_path / "a.bin").unlink()
    for text in ("new", "newer"):
        write(text)
        assert {path.read_text() for path in tmp_path.iterdir()} == {text}


def test_what_is_renamed_was_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.replace

    def flushed(file: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        sync(file)

    def renamed(path: Path, to: Path) -> Path:
        done.append(f"rename {path.name}")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    with staged(tmp_path) as folder:
        (folder / "a.bin").write_text("x")
    assert [Path(word).name for word in done] == ["a.bin", "rename a.bin", tmp_path.name]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    code = """
import os, sys
from repvgg.deploy.staged import staged
with staged(sys.argv[1]) as folder:
    (folder / "x").write_text("x")
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with staged(tmp_path) as mine, staged(tmp_path) as other:
        assert sorted(tmp_path.iterdir()) == sorted([mine, other])  # of a process that lives
    assert not list(tmp_path.iterdir())


@pytest.fixture
def little(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, nearly full."""
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


QUICK = ("ncnn", "pt2")  # one writes by itself, one by its library


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=[] if to in QUICK else pytest.mark.slow) for to in FORMATS if to != "aotinductor"]
)
def test_a_full_disk_is_named(to: str, little: Path) -> None:
    if not all(map(find_spec, engines.ENGINES[FORMATS[to].engine].packages)):
        pytest.skip("is not installed")
    model = randomize(zoo.create_model("repvgg_micro", num_classes=3, small_input=True), (8, 3, 32, 32))
    with pytest.raises(FileError, match=r"disk/out: cannot be written \(No space left on device\)"):
        export(model, to, little / "out", log=str)
    assert not list(little.iterdir())
