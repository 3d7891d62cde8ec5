"""remote.py: images and Parquet files of an object store, against an S3 server on this machine."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from predicting import rows, run

from repvgg.data import DataError
from repvgg.data.stores import filesystem
from repvgg.predict.job import Job
from repvgg.predict.remote import open_data


def put(url: str, data: bytes) -> None:
    store, path = filesystem(url)
    with store.open_output_stream(path) as file:
        file.write(data)


def test_a_folder_of_images(bucket: str, photos: Path, files: Path, tmp_path: Path) -> None:
    for path in sorted((photos / "val").rglob("*.png")):
        put(f"{bucket}/all/{path.relative_to(photos / 'val')}", path.read_bytes())
    for left_behind in ("cat/._00.png", "cat/00.png.cam.png", ".ipynb_checkpoints/00.png"):
        put(f"{bucket}/all/{left_behind}", b"no photo")
    job = Job(str(files / "colour.safetensors"), f"{bucket}/all", str(tmp_path / "out"), part_size=4)
    run(job)
    run(replace(job, data=str(photos), out=str(tmp_path / "local")))
    assert rows(job.out) == rows(tmp_path / "local")


def test_parquet_files(bucket: str, photos: Path, files: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = sorted((photos / "val").rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for number, some in enumerate((pictures[:6], pictures[6:])):
        columns = {
            "image": [{"bytes": path.read_bytes(), "path": None} for path in some],
            "label": [("cat", "dog").index(path.parent.name) for path in some],
        }
        table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
        data = io.BytesIO()
        pq.write_table(table, data)
        put(f"{bucket}/tables/{number}.parquet", data.getvalue())
    job = Job(str(files / "colour.safetensors"), f"{bucket}/tables", str(tmp_path / "out"), part_size=4)
    assert run(job).parts == 2
    run(replace(job, data=str(photos), out=str(tmp_path / "local")))
    for got, wanted in zip(rows(job.out), rows(tmp_path / "local"), strict=True):
        assert (got["label"], got["labels"], got["error"] is None) == (wanted["label"], wanted["labels"], wanted["error"] is None)
    assert rows(job.out)[7]["key"] == "1.parquet/1"


def test_a_url_has_no_splits() -> None:
    with pytest.raises(DataError, match="--split test: all that is below s3://any is predicted"):
        open_data("s3://any", "test", 8)


def test_nothing_there(bucket: str) -> None:
    put(f"{bucket}/none/letter.txt", b"precious")
    with pytest.raises(DataError, match="holds neither Parquet files nor images"):
        open_data(f"{bucket}/none", "val", 8)
    with pytest.raises(DataError, match="cannot be opened"):
        open_data("nonsense://bucket", "val", 8)


class HttpError(Exception):
    """As gcsfs has one, which is no OSError."""


@pytest.mark.parametrize("kind", [OSError, HttpError])
def test_a_store_that_fails_is_not_an_image_that_does(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of what was not reached would stay as they are for good."""
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    url = tmp_path.as_uri()
    store = filesystem(url)[0]

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def open_input_stream(self, path: str) -> Any:
            raise kind("503 Slow Down")

    assert all(len(item.image) for item in open_data(url, "val", 2).read(0))
    monkeypatch.setattr("repvgg.predict.remote.filesystem", lambda url: (Failing(), str(tmp_path)))
    with pytest.raises(DataError, match=r"0\.png: cannot be read \(.*503 Slow Down"):
        list(open_data(url, "val", 2).read(0))
    monkeypatch.undo()
    shards = open_data(url, "val", 2)
    (tmp_path / "0.png").unlink()
    assert [item.image == b"" for item in shards.read(0)] == [True, False]
    with pytest.raises(DataError, match="--part-size 0: at least 1"):
        open_data(url, "val", 0)
