"""paths.py: which images files, folders and globs name."""

import os
from pathlib import Path

import pytest

from repvgg.data.images import ImageError
from repvgg.predict.paths import expand, targets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, two more below them, and files that are none."""
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.jpg", "deep/c.png", "deep/d.GIF", "notes.txt", "b.cam.png", "._a.jpg"):  # macOS left the last
        (tmp_path / name).write_text("no matter")
    return tmp_path


def names(paths: list[str], folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in paths]


def test_files_folders_and_globs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ["a.jpg", "b.png", "deep/c.png", "deep/d.GIF"]
    assert names(expand([str(folder)]), folder) == every
    assert names(expand([f"{folder}/*.png"]), folder) == ["b.cam.png", "b.png"]
    assert names(expand([f"{folder}/**/*.png"]), folder) == ["b.cam.png", "b.png", "deep/c.png"]
    assert names(expand([f"{folder}/deep", f"{folder}/b.png"]), folder) == ["deep/c.png", "deep/d.GIF", "b.png"]
    assert names(expand([f"{folder}/d*"]), folder) == ["deep/c.png", "deep/d.GIF"]  # a glob that fits a folder
    assert names(expand([f"{folder}/notes.txt"]), folder) == ["notes.txt"]  # named: its error comes when it is read
    monkeypatch.chdir(folder)
    assert expand(["b.png", "./b.png", "b*g", "."]) == [every[1], "b.cam.png", every[0], *every[2:]]  # each once
    (folder / "[1].png").touch()
    assert expand(["[1].png"]) == ["[1].png"]  # a file's name before a pattern


def test_a_strangers_masks_json_is_no_device_and_not_deep(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    every = expand([str(folder)])
    (folder / "masks.json").write_text("[" * 100_000)
    assert expand([str(folder)]) == every
    (folder / "masks.json").unlink()
    os.mkfifo(folder / "masks.json")
    assert expand([str(folder)]) == every


def test_links_to_folders_are_followed_but_none_leads_back(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "e.png").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "deep/back").symlink_to(folder)
    (elsewhere / "back").symlink_to(elsewhere)
    (elsewhere / "there").symlink_to(folder / "deep")
    (folder / "deep/there").symlink_to(elsewhere)
    assert names(expand([str(folder)]), folder) == [
        *("a.jpg", "b.png", "deep/c.png", "deep/d.GIF", "deep/there/e.png"),
        *("linked/e.png", "linked/there/c.png", "linked/there/d.GIF"),
    ]


@pytest.mark.parametrize("pattern", ["missing.png", "no/*.png", "empty"])
def test_a_pattern_that_fits_nothing(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"no such file, and no file fits it|a folder without images"):
        expand([str(tmp_path / pattern)])


def test_what_is_made_of_images_has_names_of_its_own() -> None:
    paths = ["x/a.jpg", "x/a.png", "x/b.png", "y/c.jpg"]
    assert targets(paths) == dict(zip(paths, map(Path, ("x/a.jpg", "x/a.png", "x/b", "y/c")), strict=True))
    assert targets(paths, Path("out")) == dict(zip(paths, map(Path, ("out/a.jpg", "out/a.png", "out/b", "out/c")), strict=True))
    assert len(targets(["x/a.png", "y/a.png"])) == 2
    for alike in (["x/a.png", "y/a.jpg"], ["x/a.png", "x/a.jpg", "y/a.png.jpg"]):
        with pytest.raises(ValueError, match=r"has the same name: give each folder an --out of its own"):
            targets(alike, Path("out"))
