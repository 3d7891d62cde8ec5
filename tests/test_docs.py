"""Every command and every Python block of README and docs runs as it stands; what is not run here says so."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forks

from repvgg.cli.entry import understood

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


# What is on the other pages takes minutes; that its commands are understood is tested always.
QUICK = [page if page.name == "README.md" else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    for line in lines:
        assert line.startswith("$ "), f"{page.name}: a console block holds commands alone, each after a $: {line!r}"
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text()) if kind == language]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """A folder like a user's after `make demo`."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(demo_folder, folder / "demo")
    return folder


def run(command: str, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_of_the_page_are_understood(page: Path) -> None:
    for words in commands(page):
        if words[0] == "repvgg":
            understood(words[1:])


@pytest.mark.parametrize("page", QUICK, ids=lambda p: p.name)
def test_commands_of_the_page_run(page: Path, desk: Path, forks: Forks) -> None:
    """In forks of a process that has PyTorch loaded. A command typed into a shell: tests/cli/test_entry.py."""
    for first, *words in commands(page):
        if first != "repvgg":
            run(shlex.join([first, *words]), desk)
        else:
            ended = forks(words, desk)
            assert ended.code == 0, f"{shlex.join(words)}\n{ended.err[-2000:]}"


@pytest.mark.parametrize("page", QUICK, ids=lambda p: p.name)
def test_python_of_the_page_runs(page: Path, desk: Path, forks: Forks) -> None:
    """One block after the other in one process, as a reader goes on where the last one ended."""
    ended = forks.python("\n\n".join(blocks(page, "python")), desk)
    assert ended.code == 0, ended.err[-2000:]


def test_blocks_that_are_not_run_say_so() -> None:
    assert blocks(PAGES[0], "python")
    assert commands(PAGES[0])
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^\s*```", text, re.MULTILINE)
        assert len(fences) == 2 * len(BLOCK.findall(text)), f"{page.name}: a fence of another kind"
        assert {kind for kind, _ in BLOCK.findall(text)} <= {"", "console", "python", "mermaid", "js"}, page.name
        for match in BLOCK.finditer(text):
            if match[1] == "" and "make demo" not in match[2]:
                before = text[: match.start()].rstrip().rsplit("\n\n", 1)[-1].lower()
                assert "not run here" in before, f"{page.name}: {match[2][:60]!r}"


def test_measured_figures_in_readme_come_from_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "results" / "readme.py", "--check"])
    assert done.returncode == 0, "run python results/readme.py"


def test_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_begins_with_what_it_is_for(page: Path) -> None:
    title, blank, first = page.read_text().split("\n")[:3]
    assert title.startswith("# ")
    assert not blank
    assert first[:1].isupper(), f"{page.name}: begins with {first[:40]!r}, not with a sentence"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:src|tests|results|docs|engine)/[\w/.*-]+)`", page.read_text()):
        inside = [ROOT, ROOT / "engine"] if page.name == "engine.md" else [ROOT]
        assert any(any(folder.glob(name.rstrip("/"))) for folder in inside), f"{page.name}: {name}"


def test_every_block_is_described_and_drawn_as_it_is(tmp_path: Path) -> None:
    from repvgg.fold.blocks import BLOCKS

    runpy.run_path(str(ROOT / "docs" / "draw.py"))["main"](tmp_path)
    for name in ("fold.svg", "layers.svg"):
        assert _texts(ROOT / "docs" / name) == _texts(tmp_path / name), "run python docs/draw.py"
    text = (ROOT / "docs" / "blocks.md").read_text()
    for name in BLOCKS:
        assert re.search(rf"^### .*`{name}`", text, re.MULTILINE), name
        assert f"![{name}](blocks/{name}.svg)" in text
        kept, drawn = (_texts(folder / "blocks" / f"{name}.svg") for folder in (ROOT / "docs", tmp_path))
        assert kept == drawn, "run python docs/draw.py"


def _texts(drawing: Path) -> list[str]:
    return re.findall(r"<text.*>(.*)</text>", drawing.read_text())


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_site_has_every_page_and_every_name(tmp_path: Path) -> None:
    """What `make docs` builds from, and with mkdocs at hand the site itself: a broken link is an error there."""
    subprocess.run([sys.executable, ROOT / "docs" / "pages.py", tmp_path], check=True)
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} | {"index.md", "CONTRIBUTING.md", "docs/api.md"}
    assert named == pages
    assert all((tmp_path / name).exists() for name in named)
    import repvgg

    names = set(re.findall(r"^::: repvgg[\w.]*\.(\w+)$", (tmp_path / "docs" / "api.md").read_text(), re.MULTILINE))
    assert names == set(repvgg.__all__) - {"__version__"}


@pytest.mark.slow
def test_the_site_builds() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    subprocess.run([sys.executable, ROOT / "docs" / "pages.py"], check=True)
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q"], cwd=ROOT, check=True)
    assert "reparameterize" in (ROOT / "build" / "site" / "docs" / "api.html").read_text()
