"""train/mirror.py: a run goes on from its copy on a machine that has nothing, and a store that fails stops nothing."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
import torch
from PIL import Image

import repvgg
from repvgg.data import DataError, open_source
from repvgg.disk import FileError
from repvgg.models.load import load
from repvgg.train.loop import train
from repvgg.train.mirror import Mirror
from repvgg.train.recipes import Keeping, get_recipe


def run(out: Path, mirror: str, said: list[str]) -> None:
    recipe = replace(get_recipe("demo"), epochs=2, batch_size=32)
    source, keeping = open_source("digits").limited(64), Keeping(mirror=mirror)
    train("repvgg_micro", source, recipe, out, keeping=keeping, log=said.append, width=0.125)


def test_a_run_goes_on_where_there_is_only_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run(tmp_path / "whole", "", said)
    url, send = (tmp_path / "store/run").as_uri(), Mirror.send

    def lost(mirror: Mirror) -> None:
        send(mirror)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "send", lost)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "lost", url, said)
    shutil.rmtree(tmp_path / "lost")
    run(tmp_path / "new", url, said)
    assert f"{tmp_path / 'new'}: goes on from {url}" in said
    assert f"{tmp_path / 'new'}: goes on after step 2 of 4" in said
    found, wanted = (load(tmp_path / out / "last.safetensors").state_dict() for out in ("new", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    here, there = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name[0] != "."}
        for root in (tmp_path / "new", tmp_path / "store/run")
    )
    assert here == there  # states that are no more are not there either


@pytest.mark.slow  # the test above proves the point on a disk
def test_an_object_store(bucket: str, tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path / "run", f"{bucket}/run", said)
    Mirror(f"{bucket}/run", tmp_path / "new", said.append).fetch()
    here, there = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name[0] != "."}
        for root in (tmp_path / "new", tmp_path / "run")
    )
    assert here == there
    assert sorted(name for name in here if name.startswith("state/")) == [
        "state/000000002.safetensors",
        "state/000000004.safetensors",
    ]


def test_a_copy_that_was_left_behind_overwrites_nothing(tmp_path: Path) -> None:
    """The store could not be reached for two states: the one that it has is here no more."""
    out, copy, said = tmp_path / "run", tmp_path / "store/run", list[str]()
    for root, states, best in ((copy, (2, 4), b"old"), (out, (6, 8), b"new")):
        (root / "state").mkdir(parents=True)
        for step in states:
            (root / f"state/{step:09d}.safetensors").write_bytes(best)
        (root / "best.safetensors").write_bytes(best)
    (copy / "recipe.json").write_text("{}")
    mirror = Mirror(copy.as_uri(), out, said.append)
    mirror.fetch()
    assert (out / "best.safetensors").read_bytes() == b"new"
    assert sorted(path.name for path in (out / "state").iterdir()) == ["000000006.safetensors", "000000008.safetensors"]
    assert (out / "recipe.json").exists()  # what is not here is taken
    mirror.send()
    assert (copy / "best.safetensors").read_bytes() == b"new"
    assert sorted(path.name for path in (copy / "state").iterdir()) == ["000000006.safetensors", "000000008.safetensors"]


def test_another_runs_copy_is_neither_taken_nor_lost(tmp_path: Path) -> None:
    """A slip in a URL."""
    copy = tmp_path / "store/run"
    mirrors = [Mirror(copy.as_uri(), tmp_path / name, str) for name in ("one", "other")]
    for step, mirror in enumerate(mirrors, 1):
        (mirror.out / "state").mkdir(parents=True)
        (mirror.out / f"state/{step:09d}.safetensors").write_text(mirror.out.name)
    mirrors[0].send()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for call in (mirrors[1].fetch, mirrors[1].begin):
        with pytest.raises(FileError, match=r"holds another run than .*/other: name another --mirror"):
            call()
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert [path.name for path in mirrors[1].out.rglob("*")] == ["state", "000000002.safetensors"]
    mirrors[0].fetch()
    mirrors[0].begin()  # --resume never
    (fresh := Mirror(copy.as_uri(), tmp_path / "fresh", str)).fetch()
    fresh.begin()


def test_only_states_are_let_go_of(tmp_path: Path) -> None:
    copy, out = tmp_path / "store", tmp_path / "run"
    (copy / "state/000000001.safetensors").mkdir(parents=True)
    strange = [copy / "state" / name for name in ("terraform.tfstate", "0001.safetensors", "000000001.safetensors/x")]
    for path in (*strange, copy / "state/000000002.safetensors"):
        path.touch()
    (out / "state").mkdir(parents=True)
    Mirror(copy.as_uri(), out, str).send()
    assert {path for path in copy.rglob("*") if path.is_file()} == {*strange, copy / "run_id"}


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an object store may have it."""
    mirror = Mirror((tmp_path / "store").as_uri(), tmp_path / "run", str)
    for name in ("../.bashrc", "state/../../.bashrc"):
        found = [SimpleNamespace(path=f"{mirror.root}/{name}", type=pyarrow.fs.FileType.File)]
        monkeypatch.setattr(mirror, "store", SimpleNamespace(get_file_info=lambda _, found=found: found))
        with pytest.raises(FileError, match="which leads out of a run folder"):
            mirror.fetch()


def test_auto_goes_on_as_the_copy_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has nothing, the recipe and the division are the copy's: nothing is chosen anew."""
    heap = tmp_path / "photos"
    for i in range(12):
        path = heap / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(path)
    how: dict[str, Any] = {"epochs": 1, "batch_size": 4, "image_size": 32, "width": 0.125, "report": False, "log": str}
    keeping = Keeping(mirror=(tmp_path / "store").as_uri())
    repvgg.train("repvgg_micro", heap, tmp_path / "one", recipe="light", seed=3, keeping=keeping, **how)
    monkeypatch.setattr("repvgg.train.auto.choose", None)  # would fail
    repvgg.train("repvgg_micro", heap, tmp_path / "two", recipe="auto", seed=3, keeping=keeping, **how)
    assert (tmp_path / "two/split.csv").read_bytes() == (tmp_path / "one/split.csv").read_bytes()


def test_a_store_that_fails_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    said: list[str] = []
    Mirror((tmp_path / "file/run").as_uri(), tmp_path / "run", said.append).send()
    assert len(said) == 1
    assert "cannot be written" in said[0]
    assert said[0].endswith("training goes on")
    with pytest.raises(DataError, match="cannot be opened"):
        Mirror("nonsense://bucket", tmp_path)
