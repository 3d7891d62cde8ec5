"""data/index.py: shards are counted once, and the index is found by whoever sees the data."""

import json
from pathlib import Path

import datasets
import pytest
from tars import write_shards

from repvgg.data import DataError, index, open_source
from repvgg.data.stream import Stream, write_index

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", {"train": [7, 6], "val": [5]})


def sizes(spec: str) -> list[int]:
    stream = open_source(spec).train
    assert isinstance(stream, Stream)
    return [len(piece.rows) for piece in stream.pieces]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_is_written_beside_the_data_and_found_there(shards: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert write_index(f"wds:{shards}", workers, said.append) == shards / "_index.json"
    assert said == ["train: 13 images in 2 shards", "val: 5 images in 1 shards"]
    monkeypatch.setattr(index, "_counted", lambda *_: pytest.fail("counted again"))
    monkeypatch.setattr(index, "MANY", 0)
    assert sizes(f"wds:{shards}") == [7, 6]
    there = shards.rename(shards.with_name("elsewhere"))
    assert sizes(f"wds:{there}") == [7, 6]


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, '{"files": [], "counts": 3}'])
def test_an_index_that_is_none_is_made_again(text: str, shards: Path) -> None:
    (shards / "_index.json").write_text(text)
    assert sizes(f"wds:{shards}") == [7, 6]


def test_few_shards_are_counted_once_without_being_asked(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(f"wds:{shards}") == [7, 6]
    assert not (shards / "_index.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(index, "_counted", lambda *_: pytest.fail("counted again"))
        assert sizes(f"wds:{shards}") == [7, 6]
    write_shards(shards, {"train": [3]})  # which is another file now
    assert sizes(f"wds:{shards}") == [3, 6]


def test_of_many_shards_an_index_is_asked_for(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MANY", 2)
    with pytest.raises(DataError, match=f"3 shards and no index of them: repvgg index wds:{shards}$"):
        sizes(f"wds:{shards}")
    (shards / "_index.json").write_text("[")  # damaged: as if it were not there
    with pytest.raises(DataError, match="no index"):
        sizes(f"wds:{shards}")


def test_where_the_data_cannot_be_written_the_cache_holds_it(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (shards / "_index.json").mkdir()
    path = write_index(f"wds:{shards}", log=str)
    assert path.parent == tmp_path / "cache/repvgg"
    monkeypatch.setattr(index, "MANY", 0)
    assert sizes(f"wds:{shards}") == [7, 6]


def test_an_index_that_is_wrong_is_noticed(shards: Path) -> None:
    path = write_index(f"wds:{shards}", log=str)
    found = json.loads(path.read_text())
    found["counts"]["train"][1] = {"0": 9}
    path.write_text(json.dumps(found))
    stream = open_source(f"wds:{shards}").train
    assert isinstance(stream, Stream)
    with pytest.raises(DataError, match="shard 1: ends before image 6; it has changed since it was counted"):
        list(stream.read(stream.pieces))


def test_labels_that_were_changed_since_are_noticed(shards: Path) -> None:
    """A shard that was written again with other labels may have the size that it had."""
    path = write_index(f"wds:{shards}", log=str)
    found = json.loads(path.read_text())
    found["counts"] = {split: [{"0": sum(shard.values())} for shard in counts] for split, counts in found["counts"].items()}
    path.write_text(json.dumps(found))
    stream = open_source(f"wds:{shards}").train
    assert isinstance(stream, Stream)
    with pytest.raises(DataError, match=r"has the label \d; it has changed since it was counted: repvgg index"):
        list(stream.read(stream.pieces))


@pytest.mark.parametrize(("labels", "complaint"), [([0, None], "images without a label"), ([0, -1], "label -1")])
def test_images_without_labels_are_of_a_data_set_that_is_named(labels: list[int | None], complaint: str, tmp_path: Path) -> None:
    table = {"image": [{"bytes": b"", "path": None}] * 2, "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    spec = f"hf-stream:{tmp_path}"
    for used in (open_source, write_index):
        with pytest.raises(DataError, match=f"^{spec}, train: holds {complaint}$"):
            used(spec)


def test_what_has_no_index(tmp_path: Path) -> None:
    for spec in ("digits", "hf:x", "wds:"):
        with pytest.raises(DataError, match="only wds: and hf-stream: have an index"):
            write_index(spec)
