"""grid.py: cells are trained once, here or on Ray, and what is done stays done."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import centred, randomize, varied
from rich.console import Console
from rounding import REPORTED

from repvgg.data import Source, open_source
from repvgg.disk import FileError, hold
from repvgg.models import zoo
from repvgg.models.load import load
from repvgg.paper import grid as grids
from repvgg.paper.grid import RESNETS, TABLES, VARIANTS, Grid, Outcome, compare_forms, run
from repvgg.train.evaluate import batches, evaluate_model
from repvgg.train.loop import new_model, train
from repvgg.train.recipes import get_recipe
from repvgg.train.session import Session
from repvgg.train.signals import StoppedError

RECIPE = replace(get_recipe("demo"), epochs=1, batch_size=32)


def small(out: Path, **changes: Any) -> Grid:
    arguments: dict[str, Any] = {"arch": "repvgg_micro", "width": 0.125, "limit": 64, "variants": ("plain", "repvgg"), **changes}
    return Grid(out, "digits", RECIPE, **arguments)


def quiet(line: str) -> None:
    pass


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells for which `train` was called."""
    names: list[str] = []
    real = train

    def spy(arch: str, source: Any, recipe: Any, out: Path, **options: Any) -> Any:
        names.append(out.name)
        return real(arch, source, recipe, out, **options)

    monkeypatch.setattr(grids, "train", spy)
    return names


def test_every_variant_with_every_seed_once(tmp_path: Path, trained: list[str]) -> None:
    words: list[str] = []
    outcomes = run(small(tmp_path / "new", seeds=2), words.append)
    assert trained == ["plain-0", "repvgg-0", "plain-1", "repvgg-1"]  # seed by seed
    assert [(o.variant, o.seed) for o in outcomes] == [("plain", 0), ("repvgg", 0), ("plain", 1), ("repvgg", 1)]
    for o in outcomes:
        summary = json.loads((tmp_path / "new" / f"{o.variant}-{o.seed}" / "summary.json").read_text())
        assert (o.top1, o.seconds) == (summary["last_top1"], summary["seconds"])
        assert summary["seed"] == o.seed
        assert o.forms["equal"] == o.forms["images"] == 64
        assert o.forms["max_rel_err"] < REPORTED
        arch = zoo.manifest_of(load(tmp_path / "new" / f"{o.variant}-{o.seed}" / "last.safetensors")).arch
        assert arch is not None
        assert (arch["block"], arch["width"], arch["small_input"]) == (o.variant, 0.125, True)
    assert words[0] == "plain-0 ..."
    assert words[-1].startswith(f"repvgg-1: {outcomes[-1].top1:.2%}; 4 of 4 cells done")
    assert "epoch 1/1" in (tmp_path / "new" / "plain-0.log").read_text()

    trained.clear()
    assert run(small(tmp_path / "new", seeds=2), words.append) == outcomes
    assert trained == []
    more = run(small(tmp_path / "new", seeds=1, variants=("acb", "plain")), words.append)
    assert trained == ["acb-0"]
    assert more[1] == outcomes[0]


def test_settings_of_a_folder_stay(tmp_path: Path, trained: list[str]) -> None:
    run(small(tmp_path, variants=("plain",)), quiet)
    trained.clear()
    others = small(tmp_path, width=0.25, limit=65), replace(small(tmp_path), recipe=replace(RECIPE, lr=0.3))
    with pytest.raises(ValueError, match=r"other settings \(width 0.125 there and 0.25 here, limit 64 there and 65 here\): name"):
        run(others[0], quiet)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.1 there and 0.3 here\)"):
        run(others[1], quiet)
    assert trained == []


def test_a_killed_cell_goes_on_where_it_was(tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the training and the comparison of forms, only that is left to do."""
    grid = small(tmp_path, variants=("plain",))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grids, "compare_forms", killed)
        with pytest.raises(KeyboardInterrupt):
            run(grid, quiet)
    (cell,) = grid.cells
    assert cell.outcome is None
    assert cell.state.startswith("epoch 1: ")
    trained.clear()
    assert run(grid, quiet)[0].top1 is not None
    assert trained == []


def test_a_stopped_cell_is_not_a_finished_one(tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a signal stops leaves a summary too."""
    grid = small(tmp_path, variants=("plain",))
    (cell,) = grid.cells

    def stopped(session: Session, *_: Any) -> None:
        raise StoppedError("stopped", signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_ended", lambda session, course: False)
        patch.setattr(Session, "_go_on", stopped)
        with pytest.raises(StoppedError):
            run(grid, quiet)
    assert not json.loads((cell.folder / "summary.json").read_text())["finished"]
    (cell.folder / "forms.json").write_text("{}")  # what earlier versions made of it
    assert cell.outcome is None
    trained.clear()
    assert run(grid, quiet)[0].top1 is not None
    assert trained == ["plain-0"]


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(FileError, match="works in it already"):
        run(small(tmp_path), quiet)


@pytest.mark.slow
def test_cells_on_ray(tmp_path: Path) -> None:
    """A worker is killed while it trains; every cell is trained once, as on one machine."""
    pytest.importorskip("ray")
    words = (
        "repvgg ablate --data digits --recipe demo --arch repvgg_micro --width 0.125 --limit 400 --variants plain,repvgg --seeds 1"
    )
    words = f"{words} --epochs 3 --batch-size 32 --device cpu --json --out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words.split(), str(tmp_path / "ray"), "--ray", "auto"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None and not (states := list((tmp_path / "ray").glob("*/state/*.safetensors"))):
            time.sleep(0.02)
        killed = states[0].parents[1]
        os.kill(int((killed / ".lock").read_text().split()[1]), signal.SIGKILL)
        _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    subprocess.run([sys.executable, "-m", *words.split(), str(tmp_path / "alone")], check=True, env=environment, timeout=900)
    for name in ("plain-0", "repvgg-0"):
        found, wanted = (load(tmp_path / out / name / "last.safetensors").state_dict() for out in ("ray", "alone"))
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert "goes on after step" in (tmp_path / f"ray/{killed.name}.log").read_text()


def test_a_cell_that_diverges_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def diverge(arch: str, source: Any, recipe: Any, out: Path, **options: Any) -> None:
        calls.append(out)
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(grids, "train", diverge)
    grid = small(tmp_path)
    for _ in range(2):
        assert run(grid, quiet) == [Outcome("plain", 0), Outcome("repvgg", 0)]
    assert [path.name for path in calls] == ["plain-0", "repvgg-0"]
    assert json.loads((tmp_path / "plain-0" / "diverged.json").read_text())["reason"] == "the loss is nan"
    assert grid.cells[0].state == "diverged"


def test_what_training_says_goes_to_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def talk(*_: Any, log: Any, **__: Any) -> None:
        log("a remark")
        print("a warning", file=sys.stderr)
        raise FloatingPointError

    monkeypatch.setattr(grids, "train", talk)
    run(small(tmp_path, variants=("plain",)), lambda line: None)
    assert (tmp_path / "plain-0.log").read_text() == "a remark\na warning\n"
    assert capsys.readouterr() == ("", "")


def test_the_variants() -> None:
    assert len(TABLES) == 11
    grid = Grid(Path("x"), "digits", RECIPE, width=0.5)
    assert grid.variants == TABLES
    assert grid.network("residual") == ("repvgg_b0_residual", {"width": 0.5})
    assert grid.network("acb") == ("repvgg_b0", {"width": 0.5, "block": "acb"})
    assert replace(grid, small_input=False).network("residual")[1] == {"width": 0.5, "small_input": False}
    assert [grid.network(name) for name in RESNETS] == [("resnet50", {}), ("resnet50", {"block": "repvgg"})]
    assert {"dbb", "mobileone", "qarepvgg"} < set(VARIANTS)
    assert Grid(Path("x"), "digits", RECIPE, arch="RepVGG-A0").variants == TABLES[:-1]  # the paper reorganises B0 alone


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"variants": ("plain", "acme")}, "no variant 'acme': there are plain, no_1x1"),
        ({"variants": ("residual",)}, "repvgg_micro has no residual reorganisation"),
        ({"arch": "repvgg_q7"}, "no model 'repvgg_q7'"),
        ({"seeds": 0}, "seeds is 0: at least 1"),
        ({"width": 0.0}, "width is above 0"),
        ({"limit": 0}, "--limit 0"),
    ],
)
def test_refusals_before_any_work(changes: dict[str, Any], reason: str, tmp_path: Path, trained: list[str]) -> None:
    with pytest.raises(ValueError, match=reason):
        run(small(tmp_path / "new", **changes), quiet)
    assert trained == []
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"cannot be a grid.s folder"):
        run(small(tmp_path / "file"), quiet)
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(FileError, match=r"grid.json: cannot be read as JSON"):
        run(small(tmp_path), quiet)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="not under torchrun"):
        run(small(tmp_path), quiet)


def labelling(source: Source) -> torch.nn.Module:
    images, _ = next(batches(source.val, source.preprocessing, 50))
    return centred(randomize(new_model("repvgg_micro", source, log=quiet, width=0.25), (32, 1, 16, 16)), images)


def test_compare_forms() -> None:
    source = open_source("digits").limited(50)
    model = labelling(source)
    assert varied(evaluate_model(model, source).confusion.sum(0))
    forms = compare_forms(model, source, batch_size=20)
    assert (forms["images"], forms["equal"]) == (50, 50)
    assert 0 < forms["max_rel_err"] < REPORTED
    relu = new_model("repvgg_micro", source, log=quiet, width=0.25, block="relu_in_branch")
    assert compare_forms(relu, source)["refused"].startswith("stem.block.conv_kxk.relu: ReLU is not known to be linear")


def test_compare_forms_counts_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("digits").limited(50)
    model = labelling(source)

    def wrong(m: torch.nn.Module) -> torch.nn.Module:
        return randomize(new_model("repvgg_micro", source, log=quiet, width=0.25), (32, 1, 16, 16), seed=1)

    monkeypatch.setattr(grids, "reparameterize", wrong)
    forms = compare_forms(model, source)
    assert forms["equal"] < 50
    assert forms["max_rel_err"] > 0.1


def test_the_board_shows_all_cells(tmp_path: Path) -> None:
    grid = small(tmp_path, seeds=2)
    for name, lines in {"plain-0": ['{"step": 20}', '{"epoch": 2, "val_top1": 0.5}', '{"st'], "plain-1": []}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "repvgg-0").mkdir()
    (tmp_path / "repvgg-0" / "summary.json").write_text('{"finished": true, "last_top1": 0.875, "seconds": 7}')
    (tmp_path / "repvgg-0" / "forms.json").write_text('{"images": 1, "equal": 1}')
    console = Console(file=io.StringIO(), width=200)
    console.print(grids._table(grid))
    shown = [line.split("  ") for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in shown]
    assert ["plain", "epoch 3: 50.0%", "begun"] in cells
    assert ["repvgg", "87.50%"] in cells
    assert any("1 of 4 cells done, 7 s each" in line[0] for line in cells)
