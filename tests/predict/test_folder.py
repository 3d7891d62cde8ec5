"""folder.py: a folder is for one thing and one process, and what is in it is whole."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import Forks
from predicting import parts, run, words

import repvgg
from repvgg import cli
from repvgg.data import DataError
from repvgg.data.shards import Item, Shards
from repvgg.disk import FileError
from repvgg.models.views import Views
from repvgg.predict import datasets
from repvgg.predict.job import Job

Captured = pytest.CaptureFixture[str]


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
    assert run(replace(job, model=str(tmp_path / "same.safetensors"), batch_size=7)).here == 0  # moved: the same
    repvgg.save(other, tmp_path / "same.safetensors")
    job = replace(job, out=str(tmp_path / "new"), model=str(tmp_path / "same.safetensors"))
    run(job)
    repvgg.save(repvgg.load(files / "grey.safetensors"), job.model)
    with pytest.raises(FileError, match=r"same.safetensors, which has changed since"):
        run(job)


def test_data_that_has_changed_is_refused(files: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), str(tmp_path / "out"))
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
            run(replace(job, out=str(out)))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_damaged_part_is_named_and_made_again(job: Job) -> None:
    run(job)
    part = Path(job.out) / "part-00002.parquet"
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
        ({"part_size": 0}, "--part-size 0: at least 1"),
        ({"data": "nowhere"}, "no data 'nowhere'"),
        ({"out": "s3://bucket/preds"}, "--out s3://bucket/preds: an object store is written by --ray"),
        ({"engine": "tpu"}, "no engine 'tpu'"),
        ({"precision": "bf16"}, "--precision bf16 is an engine's: name one, such as --engine eager"),
        ({"model": str(files / "masks.safetensors"), "engine": "eager"}, "are made by PyTorch: leave out --engine"),
    ):
        with pytest.raises(ValueError, match=complaint):
            run(replace(job, **{"out": str(tmp_path / "new"), **change}))  # type: ignore[arg-type]
    for given in (["--data", "digits"], ["photo.jpg", "--data", "digits", "--out", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["predict", job.model, *given])
        assert stop.value.code == 2
        assert "--data D --out FOLDER" in capsys.readouterr().err


def test_a_damaged_shard_stops_and_keeps_what_is_done(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(shard: int) -> Iterator[Item]:
        yield Item(f"{shard}", None, torch.zeros(1, 16, 16, dtype=torch.uint8))
        if shard == 1:
            raise DataError("shard 1: cannot be read on")

    monkeypatch.setattr(datasets, "open_data", lambda *_: Shards("damaged", 3, read, "x"))
    job = Job(str(files / "grey.safetensors"), "damaged", str(tmp_path / "out"))
    with pytest.raises(DataError, match="shard 1: cannot be read on"):
        run(job)
    assert {path.name for path in Path(job.out).iterdir()} - {".lock"} == {"_settings.json", "part-00000.parquet"}


def test_one_process_works_in_a_folder(job: Job, forks: Forks, tmp_path: Path) -> None:
    job = replace(job, part_size=3, batch_size=1)
    with forks.start(words(job), tmp_path) as process:
        while process.poll() is None and not (Path(job.out) / "part-00002.parquet").exists():
            time.sleep(0.005)
        with pytest.raises(FileError, match=rf"process {process.pid} on .* works in it: wait for it, or name another folder"):
            run(job)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert run(job).images == 360  # a dead holder's lock is none
