"""datasets.py: every image once, whatever is killed; and nothing else in the folder."""

import json
import os
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from forks import Forks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from predicting import parts, rows, run, words
from roads import make_camvid
from rounding import REPORTED

import repvgg
from repvgg.data import open_source
from repvgg.data.shards import Item, Shards
from repvgg.data.transforms import eval_transform, normalise
from repvgg.disk import FileError, escaped, unescaped
from repvgg.models import zoo
from repvgg.models.views import Views
from repvgg.predict import datasets
from repvgg.predict.job import Job
from repvgg.predict.labels import predict
from repvgg.predict.masks import predict_masks

COLUMNS = ["key", "label", "labels", "probabilities", "error"]


# ------------------------------------------------------------------------------------------------------------- what is written


def test_predictions_against_the_model_itself(job: Job) -> None:
    summary = run(replace(job, top=3))
    assert (summary.parts, summary.images, summary.errors, summary.here) == (8, 360, 0, 360)
    model, val = repvgg.load(job.model), open_source("digits").val
    p = zoo.manifest_of(model).preprocessing
    images = torch.stack([eval_transform(p)(val[i][0]) for i in range(360)])
    with torch.no_grad():
        wanted = model.double()(normalise(images, p).double()).softmax(1)
    found = rows(job.out)
    assert [row["key"] for row in found] == [str(i) for i in range(360)]
    assert [row["label"] for row in found] == [str(val[i][1]) for i in range(360)]
    for row, expected in zip(found, wanted, strict=True):
        best = expected.topk(3)
        assert row["labels"] == [str(i) for i in best.indices.tolist()]
        assert row["probabilities"] == pytest.approx(best.values.tolist(), abs=REPORTED)
    settings = json.loads((Path(job.out) / "_settings.json").read_text())
    assert (settings["data"], settings["engine"], settings["top"]) == ("digits", "pytorch", 3)


def test_an_image_that_cannot_be_read_has_its_reason(files: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), str(tmp_path / "out"), part_size=4, batch_size=3)
    summary = run(job)
    assert (summary.images, summary.errors, summary.parts) == (11, 1, 3)
    found = {row.pop("key"): row for row in rows(job.out)}
    assert found.pop("dog/07.png") == {
        "label": "dog",
        "labels": None,
        "probabilities": None,
        "error": "dog/07.png: not an image, or of a kind that is not known here",
    }
    wanted = predict(repvgg.reparameterize(repvgg.load(job.model)), [str(photos / "val/*/*.png")])
    for answer in (answer for answer in wanted if not answer.error):
        row = found.pop(str(Path(answer.path).relative_to(photos / "val")))
        assert row["labels"] == [name for name, _ in answer.labels]
        assert row["probabilities"] == pytest.approx([x for _, x in answer.labels], abs=REPORTED)
        assert (row["label"], row["error"]) == (Path(answer.path).parent.name, None)
    assert not found


def test_a_table_is_read_image_by_image(files: Path, photos: Path, tmp_path: Path) -> None:
    """What cannot be read has its reason, and a table of other images is other data."""
    table = tmp_path / "photos.csv"
    names = sorted(str(path.relative_to(tmp_path)) for path in (photos / "val").rglob("*.png"))
    assert photos.is_relative_to(tmp_path)
    lines = [f"{name},{Path(name).parent.name},{'val' if i % 2 else 'train'}" for i, name in enumerate(names)]
    table.write_text("\n".join(["path,label,split", *lines]) + "\n")
    (tmp_path / names[1]).write_bytes(b"no photo")
    job = Job(str(files / "colour.safetensors"), str(table), str(tmp_path / "out"), batch_size=3)
    run(job)
    found = rows(job.out)
    assert [(row["key"], row["label"]) for row in found] == [(str(i), Path(n).parent.name) for i, n in enumerate(names[1::2])]
    assert [row["error"] is None for row in found] == [i > 0 and Path(n).name != "07.png" for i, n in enumerate(names[1::2])]
    shutil.copy(tmp_path / names[3], tmp_path / "other.png")
    table.write_text(table.read_text().replace(names[3], "other.png"))
    with pytest.raises(FileError, match="data"):
        run(job)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(files: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), str(tmp_path / "0"), part_size=4, batch_size=3)
    run(job)
    run(replace(job, out=str(tmp_path / "2"), workers=2))
    assert rows(str(tmp_path / "0")) == rows(str(tmp_path / "2"))


def test_a_shard_without_images_and_numbers_for_labels(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    held = {0: [Item("a", 1, pixels)], 1: [], 2: [Item("b", 7, pixels), Item("c", None, pixels)]}
    monkeypatch.setattr(datasets, "open_data", lambda *_: Shards("held", 3, lambda i: iter(held[i]), "x"))
    job = Job(str(files / "colour.safetensors"), "held", str(tmp_path / "out"))
    assert run(job).parts == 3
    assert [(row["key"], row["label"]) for row in rows(job.out)] == [("a", "dog"), ("b", "7"), ("c", None)]  # grey is made colour
    assert pq.read_table(Path(job.out) / "part-00001.parquet").num_rows == 0
    assert run(job).here == 0


def test_memory_does_not_grow_with_the_data(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def read(shard: int) -> Iterator[Item]:
        nonlocal most
        for i in range(200):
            item = Item(f"{shard}/{i}", None, torch.full((1, 16, 16), i, dtype=torch.uint8))
            alive.add(item)
            most = max(most, len(alive))
            yield item
            del item

    monkeypatch.setattr(Item, "__hash__", object.__hash__)
    monkeypatch.setattr(datasets, "open_data", lambda *_: Shards("long", 2, read, "x"))
    assert run(Job(str(files / "grey.safetensors"), "long", str(tmp_path / "out"), batch_size=8)).images == 400
    assert most <= 4 * 8


def test_masks(files: Path, tmp_path: Path) -> None:
    root = make_camvid(tmp_path / "camvid", val=3)
    (tmp_path / "photos").mkdir()
    for i, path in enumerate(sorted((root / "val").iterdir())):
        path.rename(tmp_path / f"photos/{i}.png")
    (tmp_path / "photos/bad.png").write_bytes(b"damaged")
    views = Views(flip=True)
    job = Job(str(files / "masks.safetensors"), str(tmp_path / "photos"), str(tmp_path / "out"), part_size=2, views=views)
    assert (run(job).images, run(job).errors) == (4, 1)
    found = {row["key"]: row for row in rows(job.out)}  # the masks do not hinder readers of the table
    assert found["bad.png"]["mask"] is None
    assert "not an image" in found["bad.png"]["error"]
    model = repvgg.reparameterize(repvgg.load(job.model))
    for answer in predict_masks(model, [str(tmp_path / "photos/?.png")], views=views):
        row = found[Path(answer.path).name]
        assert answer.mask is not None
        assert np.array_equal(np.array(Image.open(Path(job.out) / row["mask"])), answer.mask.numpy())
    with pytest.raises(FileError, match="was begun with the views"):
        run(replace(job, views=Views()))


def test_any_reader_of_parquet_reads_the_folder(job: Job) -> None:
    pandas = pytest.importorskip("pandas")
    hugging = pytest.importorskip("datasets")
    run(job)
    assert pandas.read_parquet(job.out).key.nunique() == 360
    assert (
        hugging.load_dataset("parquet", data_files=str(Path(job.out) / "*.parquet"), streaming=True)["train"].column_names
        == COLUMNS
    )
    assert pq.read_table(job.out).column_names == COLUMNS


# ------------------------------------------------------------------------------------------------------------------ going on


@pytest.mark.slow  # test_interruptions_give_the_same proves the point
@settings(max_examples=6)
@given(st.lists(st.integers(0, 3), max_size=4))
def test_any_interruption_gives_the_same(tmp_path_factory: pytest.TempPathFactory, files: Path, stops: list[int]) -> None:
    _assert_the_same(tmp_path_factory, files, stops)


def test_interruptions_give_the_same(tmp_path_factory: pytest.TempPathFactory, files: Path) -> None:
    """Before the first part, between two, and twice at one place."""
    _assert_the_same(tmp_path_factory, files, [0, 2, 2])


def _assert_the_same(tmp_path_factory: pytest.TempPathFactory, files: Path, stops: list[int]) -> None:
    """stops: after how many parts each run is interrupted."""
    whole = Job(str(files / "grey.safetensors"), "digits", str(tmp_path_factory.getbasetemp() / "whole"), part_size=70)
    if not Path(whole.out).exists():
        run(whole)
    out = tmp_path_factory.mktemp("split")
    job = replace(whole, out=str(out))
    for stop in stops:
        before = parts(out)
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(datasets, "atomically", _stops(stop, out))
            run(job)
        assert before.items() <= parts(out).items()  # nothing is made twice
    assert run(job).images == 360
    assert rows(out) == rows(whole.out)


def _stops(after: int, out: Path) -> Any:
    from repvgg.disk import atomically

    def write(path: Path, write_to: Any) -> None:
        if path.suffix == ".parquet" and len(list(out.glob("part-*"))) >= after:
            raise KeyboardInterrupt
        atomically(path, write_to)

    return write


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_process_that_is_ended_goes_on(sent: signal.Signals, code: int, job: Job, forks: Forks, tmp_path: Path) -> None:
    job = replace(job, part_size=3, batch_size=1)
    with forks.start(words(job), tmp_path) as process:
        while process.poll() is None and not (Path(job.out) / "part-00005.parquet").exists():
            time.sleep(0.005)
        os.kill(process.pid, sent)
        ended = process.wait()
    assert ended.code == code
    assert all("img/s" in line for line in ended.err.splitlines())  # progress, on a busy machine; nothing else
    before = parts(job.out)
    assert 5 < len(before) < 120
    assert len(rows(job.out)) == 3 * len(before)
    (Path(job.out) / ".part-00100.parquet.1.tmp").touch()  # as a process leaves it that is killed while it writes
    summary = run(job)
    assert summary.here == 360 - 3 * len(before)
    assert before.items() <= parts(job.out).items()
    assert [row["key"] for row in rows(job.out)] == [str(i) for i in range(360)]
    assert {path.name for path in Path(job.out).iterdir()} - set(parts(job.out)) <= {"_settings.json", ".lock"}


def test_the_fastest_engine_is_chosen_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = iter(["eager"])
    monkeypatch.setattr("repvgg.deploy.load.fastest", lambda *_: next(chosen))
    for _ in range(3):
        run(replace(job, engine="auto"))
    assert json.loads((Path(job.out) / "_settings.json").read_text())["engine"] == "eager"
    assert len(rows(job.out)) == 360
    with pytest.raises(FileError, match="was begun with the engine eager, not pytorch: give another --out"):
        run(job)


# ------------------------------------------------------------------------------------------------- names of files are bytes


def test_file_names_that_are_no_utf8(files: Path, photos: Path, tmp_path: Path) -> None:
    folder = os.fsencode(photos / "val/cat")
    picture = (photos / "val/cat/00.png").read_bytes()
    names = [b"caf\xe9.png", b"new\nline.png", b"back\\x41slash.png", b"esc\x1b[31m.png", "\u00fcber.png".encode()]
    for name in names:
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(picture)
    (photos / "val/dog").rename(os.fsdecode(os.fsencode(photos / "val") + b"/d\xf6g"))  # a class in Latin-1
    job = Job(str(files / "colour.safetensors"), str(photos), str(tmp_path / "out"), part_size=4, workers=0)
    run(job)
    found = {row["key"]: row for row in rows(job.out)}
    keys = {os.fsencode(unescaped(key)) for key in found}
    assert {b"cat/" + name for name in names} <= keys
    assert found["cat/caf\\xe9.png"]["labels"] == found["cat/00.png"]["labels"]
    assert {row["label"] for row in found.values()} == {"cat", "d\\xf6g"}
    assert all(key.isprintable() and (row["error"] or "").isprintable() for key, row in found.items())


@given(st.binary(min_size=1, max_size=12))
def test_escaping_is_undone(name: bytes) -> None:
    text = escaped(os.fsdecode(name))
    assert text.isprintable()
    text.encode()
    assert os.fsencode(unescaped(text)) == name


# --------------------------------------------------------------------------------------------- numbers that are no predictions


def test_nan_is_refused_and_its_layer_named(files: Path, tmp_path: Path) -> None:
    model = repvgg.reparameterize(repvgg.load(files / "grey.safetensors"))
    with torch.no_grad():
        weight = model.get_parameter("stages.1.0.block.weight")
        weight.mul_(6e4 / weight.abs().max())
    repvgg.save(model.half(), tmp_path / "half.safetensors")
    job = Job(str(tmp_path / "half.safetensors"), "digits", str(tmp_path / "out"), part_size=100)
    wanted = r"NaN or infinite, first after the layer stages\.1\.0\.block \(float16\); float16 reaches only 65,504: --engine eager"
    with pytest.raises(ValueError, match=wanted):
        run(job)
    assert not parts(job.out)
    assert run(replace(job, engine="eager", out=str(tmp_path / "eager"))).images == 360
