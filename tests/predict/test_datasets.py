"""predict_data.py: every image once, whatever is killed, by however many processes; and nothing else in the folder."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from roads import make_camvid
from rounding import REPORTED

import repvgg
from repvgg import cli
from repvgg.data import DataError, open_source
from repvgg.data.shards import Item, Shards
from repvgg.data.transforms import eval_transform, normalise
from repvgg.disk import FileError
from repvgg.models import zoo
from repvgg.models.manifest import Preprocessing
from repvgg.models.views import Views
from repvgg.predict import datasets as predict_data
from repvgg.predict.datasets import Job, Meter, Predictor
from repvgg.predict.labels import predict
from repvgg.predict.masks import predict_masks
from repvgg.train.loop import new_model

Captured = pytest.CaptureFixture[str]
COLUMNS = ["key", "label", "labels", "probabilities", "error"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """grey.safetensors reads digits, colour.safetensors photos of three classes, masks.safetensors roads."""
    folder = tmp_path_factory.mktemp("models")
    grey = randomize(new_model("repvgg_micro", open_source("digits"), log=str, width=0.25), (32, 1, 16, 16))
    repvgg.save(grey, folder / "grey.safetensors")
    colour = randomize(repvgg.create_model("repvgg_micro", num_classes=3, width=0.25, small_input=True), (32, 3, 32, 32))
    p = Preprocessing((3, 32, 32), 36)
    repvgg.save(colour, folder / "colour.safetensors", classes=["cat", "dog", "owl"], preprocessing=p)
    masks = randomize(repvgg.create_model("pspnet_repvgg_micro_fast", num_classes=11, width=0.25), (2, 3, 48, 64))
    repvgg.save(masks, folder / "masks.safetensors", preprocessing=Preprocessing((3, 48, 48), 48))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """val/{cat,dog}/*.png, of which one cannot be read."""
    random = np.random.default_rng(0)
    for i in range(11):
        path = tmp_path / f"photos/val/{('cat', 'dog')[i % 2]}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        smooth.resize((40 + i, 50), Image.Resampling.BICUBIC).save(path)
    (tmp_path / "photos/val/dog/07.png").write_bytes(b"damaged")
    return tmp_path / "photos"


@pytest.fixture
def job(files: Path, tmp_path: Path) -> Job:
    return Job(str(files / "grey.safetensors"), "digits", tmp_path / "preds.parquet", part_size=50, batch_size=16)


def run(job: Job) -> predict_data.Summary:
    return predict_data.predict_data(job, log=str)


def rows(out: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(out).to_pylist())


def parts(out: Path) -> dict[str, tuple[int, int]]:
    """Each with what changes when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(out.glob("part-*"))}


# ------------------------------------------------------------------------------------------------------------- what is written


def test_predictions_against_the_model_itself(job: Job) -> None:
    summary = run(replace(job, top=3))
    assert (summary.parts, summary.of, summary.images, summary.errors, summary.here) == (8, 8, 360, 0, 360)
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
    settings = json.loads((job.out / "_settings.json").read_text())
    assert (settings["data"], settings["engine"], settings["top"]) == ("digits", "pytorch", 3)


def test_an_image_that_cannot_be_read_has_its_reason(files: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), tmp_path / "out", part_size=4, batch_size=3)
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(files: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), tmp_path / "0", part_size=4, batch_size=3)
    run(job)
    run(replace(job, out=tmp_path / "2", workers=2))
    assert rows(tmp_path / "0") == rows(tmp_path / "2")


def test_a_shard_without_images_and_numbers_for_labels(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    held = {0: [Item("a", 1, pixels)], 1: [], 2: [Item("b", 7, pixels), Item("c", None, pixels)]}
    monkeypatch.setattr(predict_data, "open_shards", lambda *_: Shards("held", 3, lambda i: iter(held[i]), "x"))
    job = Job(str(files / "colour.safetensors"), "held", tmp_path / "out")
    assert run(job).complete
    assert [(row["key"], row["label"]) for row in rows(job.out)] == [("a", "dog"), ("b", "7"), ("c", None)]  # grey is made colour
    assert pq.read_table(job.out / "part-00001.parquet").num_rows == 0
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
    monkeypatch.setattr(predict_data, "open_shards", lambda *_: Shards("long", 2, read, "x"))
    assert run(Job(str(files / "grey.safetensors"), "long", tmp_path / "out", batch_size=8)).images == 400
    assert most <= 4 * 8


def test_masks(files: Path, tmp_path: Path) -> None:
    root = make_camvid(tmp_path / "camvid", val=3)
    (tmp_path / "photos").mkdir()
    for i, path in enumerate(sorted((root / "val").iterdir())):
        path.rename(tmp_path / f"photos/{i}.png")
    (tmp_path / "photos/bad.png").write_bytes(b"damaged")
    views = Views(flip=True)
    job = Job(str(files / "masks.safetensors"), str(tmp_path / "photos"), tmp_path / "out", part_size=2, views=views)
    assert (run(job).images, run(job).errors) == (4, 1)
    found = {row["key"]: row for row in rows(job.out)}  # the masks do not hinder readers of the table
    assert found["bad.png"]["mask"] is None
    assert "not an image" in found["bad.png"]["error"]
    model = repvgg.reparameterize(repvgg.load(job.model))
    for answer in predict_masks(model, [str(tmp_path / "photos/?.png")], views=views):
        row = found[Path(answer.path).name]
        assert answer.mask is not None
        assert np.array_equal(np.array(Image.open(job.out / row["mask"])), answer.mask.numpy())
    with pytest.raises(FileError, match="was begun with the views"):
        run(replace(job, views=Views()))


def test_any_reader_of_parquet_reads_the_folder(job: Job) -> None:
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    run(job)
    assert pandas.read_parquet(job.out).key.nunique() == 360
    assert datasets.load_dataset("parquet", data_files=str(job.out / "*.parquet"), streaming=True)["train"].column_names == COLUMNS
    assert pq.read_table(job.out).column_names == COLUMNS


# ------------------------------------------------------------------------------------------------------------------ going on


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)), max_size=4))
def test_any_split_and_any_interruption_give_the_same(
    tmp_path_factory: pytest.TempPathFactory, files: Path, turns: list[tuple[int, int, int]]
) -> None:
    """turns: number of processes, which one has its turn, and after how many parts it is stopped."""
    whole = Job(str(files / "grey.safetensors"), "digits", tmp_path_factory.getbasetemp() / "whole", part_size=70)
    if not whole.out.exists():
        run(whole)
    out = tmp_path_factory.mktemp("split")
    job = replace(whole, out=out)
    for processes, rank, stop in turns:
        before = parts(out)
        if rank < processes:
            with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr(predict_data, "atomically", _stops(stop, out))
                run(replace(job, rank=rank, processes=processes))
        assert before.items() <= parts(out).items()  # nothing is made twice
    assert run(job).complete
    assert rows(out) == rows(whole.out)


def _stops(after: int, out: Path) -> Any:
    from repvgg.disk import atomically

    def write(path: Path, write_to: Any) -> None:
        if path.suffix == ".parquet" and len(list(out.glob("part-*"))) >= after:
            raise KeyboardInterrupt
        atomically(path, write_to)

    return write


def command(job: Job) -> list[str]:
    words = (
        sys.executable,
        "-m",
        "repvgg",
        "predict",
        job.model,
        "--data",
        job.data,
        "--out",
        job.out,
        "--part-size",
        job.part_size,
    )
    return [*map(str, words), "--batch-size", str(job.batch_size), "--device", "cpu"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_process_that_is_ended_goes_on(sent: signal.Signals, code: int, job: Job) -> None:
    job = replace(job, part_size=3, batch_size=1)
    process = subprocess.Popen(command(job), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (job.out / "part-00005.parquet").exists():
        time.sleep(0.005)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, "")
    before = parts(job.out)
    assert 5 < len(before) < 120
    assert len(rows(job.out)) == 3 * len(before)
    (job.out / ".part-00100.parquet.1.tmp").touch()  # as a process leaves it that is killed while it writes
    summary = run(job)
    assert summary.here == 360 - 3 * len(before)
    assert before.items() <= parts(job.out).items()
    assert [row["key"] for row in rows(job.out)] == [str(i) for i in range(360)]
    assert {path.name for path in job.out.iterdir()} - set(parts(job.out)) == {"_settings.json", ".lock"}


def test_processes_as_torchrun_numbers_them(job: Job, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = []
    for rank in (0, 2, 1):
        monkeypatch.setenv("RANK", str(rank))
        cli.main(command(job)[3:])
        said.append(capsys.readouterr().out)
        assert {int(name[5:10]) % 3 for name in parts(job.out)} <= {0, 2, rank}
    assert said[0].startswith("150 images in 3 of 8 parts, others are at work; 150 now, ")
    assert said[1] == ""
    assert said[2].startswith("360 images in 8 parts; 110 now, ")
    assert len({row["key"] for row in rows(job.out)}) == 360


@pytest.mark.slow
def test_torchrun(job: Job) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", *command(job)[1:], "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run(replace(job, out=job.out / "../alone"))
    assert rows(job.out) == rows(job.out / "../alone")


def test_the_fastest_engine_is_chosen_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = iter(["eager"])
    monkeypatch.setattr("repvgg.deploy.load.fastest", lambda *_: next(chosen))
    for rank in range(3):
        run(replace(job, engine="auto", rank=rank, processes=3))
    assert json.loads((job.out / "_settings.json").read_text())["engine"] == "eager"
    assert len(rows(job.out)) == 360
    with pytest.raises(FileError, match="was begun with the engine eager, not pytorch: give another --out"):
        run(job)


# ------------------------------------------------------------------------------------------------------ what cannot work: one line


def test_a_folder_of_something_else_is_refused(job: Job, files: Path, tmp_path: Path) -> None:
    run(job)
    before = parts(job.out)
    other = repvgg.load(job.model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    repvgg.save(other, tmp_path / "other.safetensors")
    (tmp_path / "same.safetensors").write_bytes(Path(job.model).read_bytes())
    for change, complaint in (
        ({"model": str(tmp_path / "other.safetensors")}, r"begun with the model .*grey.safetensors, not .*other.safetensors"),
        ({"split": "train"}, "begun with the split val, not train"),
        ({"part_size": 60}, "begun with the part size 50, not 60"),
        ({"top": 1}, "begun with the top 5, not 1"),
        ({"engine": "eager"}, "begun with the engine pytorch, not eager"),
        ({"views": Views(flip=True)}, "gives labels, not masks"),
    ):
        with pytest.raises(ValueError, match=complaint):
            run(replace(job, **change))  # type: ignore[arg-type]
    assert parts(job.out) == before
    assert run(replace(job, model=str(tmp_path / "same.safetensors"), batch_size=7)).complete  # moved: the same
    repvgg.save(other, tmp_path / "same.safetensors")
    job = replace(job, out=tmp_path / "new", model=str(tmp_path / "same.safetensors"))
    run(job)
    repvgg.save(repvgg.load(files / "grey.safetensors"), job.model)
    with pytest.raises(FileError, match=r"same.safetensors, which has changed since"):
        run(job)


def test_data_that_has_changed_is_refused(files: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), tmp_path / "out")
    run(job)
    (photos / "val/dog/99.png").write_bytes((photos / "val/cat/00.png").read_bytes())
    with pytest.raises(FileError, match=r"begun with the data .*photos, which has changed since"):
        run(job)


def test_folders_that_cannot_be_used(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("precious")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/_settings.json").write_text('{"model": ')
    for out, complaint in (
        (tmp_path / "file", r"file: cannot be a folder of predictions \(File exists\)"),
        (tmp_path / "file/below", r"cannot be a folder of predictions \(Not a directory\)"),
        (Path("/proc/preds"), "cannot be a folder of predictions"),
        (tmp_path / "full", "is a folder of something else, it has no _settings.json: give another --out"),
        (tmp_path / "damaged", "_settings.json: is damaged: delete it together with the parts beside it"),
    ):
        with pytest.raises(FileError, match=complaint):
            run(replace(job, out=out))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_damaged_part_is_named_and_made_again(job: Job) -> None:
    run(job)
    part = job.out / "part-00002.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with pytest.raises(FileError, match=r"part-00002\.parquet: is damaged: delete it, and the same command makes it again"):
        run(job)
    part.unlink()
    assert run(job).here == 50
    assert part.read_bytes() == whole


def test_what_makes_no_sense_is_said(
    job: Job, files: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change, complaint in (
        ({"batch_size": 0}, "--batch-size and --top are at least 1"),
        ({"top": 0}, "--batch-size and --top are at least 1"),
        ({"workers": -1}, "--workers -1: at least 0"),
        ({"rank": 2, "processes": 2}, "RANK=2, WORLD_SIZE=2"),
        ({"part_size": 0}, "--part-size 0: at least 1"),
        ({"data": "nowhere"}, "no data 'nowhere'"),
        ({"engine": "tpu"}, "no engine 'tpu'"),
        ({"precision": "bf16"}, "--precision bf16 is an engine's: name one, such as --engine eager"),
        ({"model": str(files / "masks.safetensors"), "engine": "eager"}, "are made by PyTorch: leave out --engine"),
    ):
        with pytest.raises(ValueError, match=complaint):
            run(replace(job, out=tmp_path / "new", **change))  # type: ignore[arg-type]
    for words in (["--data", "digits"], ["photo.jpg", "--data", "digits", "--out", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["predict", job.model, *words])
        assert stop.value.code == 2
        assert "--data D --out FOLDER" in capsys.readouterr().err


def test_a_damaged_shard_stops_and_keeps_what_is_done(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(shard: int) -> Iterator[Item]:
        yield Item(f"{shard}", None, torch.zeros(1, 16, 16, dtype=torch.uint8))
        if shard == 1:
            raise DataError("shard 1: cannot be read on")

    monkeypatch.setattr(predict_data, "open_shards", lambda *_: Shards("damaged", 3, read, "x"))
    job = Job(str(files / "grey.safetensors"), "damaged", tmp_path / "out")
    with pytest.raises(DataError, match="shard 1: cannot be read on"):
        run(job)
    assert [path.name for path in sorted(job.out.iterdir())] == [".lock", "_settings.json", "part-00000.parquet"]


# ------------------------------------------------------------------------------------------------------------------- progress


def test_progress_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_data, "PLAIN_EVERY", -1.0)
    said: list[str] = []
    with Meter(3000, said.append) as meter:
        meter.add(1000)
        meter.add(1000)
    assert [line.rsplit(", ", 1)[0] for line in said] == [
        "1,000 images of 3,000, 0.0 min left",
        "2,000 images of 3,000, 0.0 min left",
    ]
    assert all(line.endswith(" img/s") for line in said)
    with Meter(None, said.append) as meter:
        meter.add(1000)
    assert said[-1].startswith("1,000 images, ")


# ------------------------------------------------------------------------------------------------------------ other frameworks


def test_predictor_gives_the_same_rows(files: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), tmp_path / "out")
    run(job)
    paths = sorted((photos / "val").rglob("*.png"))
    table = Predictor(job.model)({"path": np.array(list(map(str, paths))), "bytes": [path.read_bytes() for path in paths]})
    assert isinstance(table, pa.Table)
    for got, wanted in zip(table.to_pylist(), rows(job.out), strict=True):
        assert (got["labels"], got["probabilities"]) == (wanted["labels"], wanted["probabilities"])
        assert Path(got["key"]).relative_to(photos / "val").as_posix() == wanted["key"]
        assert (got["error"] is None) == (wanted["error"] is None)


@pytest.mark.slow
def test_the_recipe_for_ray(files: Path, photos: Path, tmp_path: Path) -> None:
    """As docs/predict.md has it, on a cluster of this machine alone."""
    pytest.importorskip("ray")
    page = (Path(__file__).parents[1] / "docs/predict.md").read_text()
    (recipe,) = [block.split("```")[0] for block in page.split("```\n") if block.startswith("import ray")]
    (tmp_path / "best.safetensors").write_bytes((files / "colour.safetensors").read_bytes())
    (photos / "val").rename(tmp_path / "images")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", recipe], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {Path(row["key"]).name: row for row in rows(tmp_path / "preds")}
    answers = list(predict(repvgg.reparameterize(repvgg.load(files / "colour.safetensors")), [str(tmp_path / "images")]))
    assert len(found) == len(answers) == 11
    for answer in answers:
        row = found[Path(answer.path).name]
        assert row["labels"] == ([name for name, _ in answer.labels] or None)
