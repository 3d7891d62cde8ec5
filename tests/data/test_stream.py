"""data/stream.py: WebDataset shards and streamed parquet, near and on a small server of our own."""

import http.server
import io
import tarfile
import threading
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from repvgg.data import DataError, Source, open_source
from repvgg.data.images import ImageError
from repvgg.data.stream import Stream, expanded, open_wds
from repvgg.train.batches import Feed
from repvgg.train.distributed import World
from repvgg.train.loop import train
from repvgg.train.recipes import Keeping, Recipe

RECIPE = Recipe(epochs=2, batch_size=6, crop="shift", flip=False)


def png(grey: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), grey, dtype=np.uint8)).save(out, "png")
    return out.getvalue()


def write_shards(root: Path, sizes: dict[str, list[int]], bad: int | None = None) -> Path:
    """Shards of images, the n-th of which is grey level n and of class n % 4."""
    root.mkdir(exist_ok=True)
    number = 0
    for split, counts in sizes.items():
        for shard, count in enumerate(counts):
            with tarfile.open(root / f"{split}-{shard:03d}.tar", "w") as tar:
                for _ in range(count):
                    content = b"not an image" if number == bad else png(number)
                    for suffix, data in (("png", content), ("cls", str(number % 4).encode())):
                        info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    number += 1
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_source.cache_clear()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", {"train": [7, 7, 7, 7], "val": [5, 4]})


def greys(stream: Stream, **options: int) -> list[int]:
    return [int(stream[e][0][0, 0, 0]) for e in stream.order(**options)]


def train_stream(source: Source) -> Stream:
    assert isinstance(source.train, Stream)
    return source.train


def test_a_folder_of_shards(shards: Path) -> None:
    source = open_source(f"wds:{shards}")
    assert (source.classes, len(source.train), len(source.val)) == (["0", "1", "2", "3"], 28, 9)
    stream = train_stream(source)
    first = list(stream.order(seed=0, rank=0, processes=1, first=0, last=28))
    assert sorted(int(stream[e][0][0, 0, 0]) for e in first) == list(range(28))
    assert all(stream[e][1] == int(stream[e][0][0, 0, 0]) % 4 for e in first)
    assert isinstance(source.val, Stream)
    assert [int(source.val[e][0][0, 0, 0]) for e in source.val.in_order()] == list(range(28, 37))


def test_the_order_is_a_function_of_the_seed_and_goes_on_anywhere(shards: Path) -> None:
    stream = train_stream(open_source(f"wds:{shards}"))
    whole = greys(stream, seed=3, rank=0, processes=1, first=0, last=28)
    assert whole != greys(stream, seed=4, rank=0, processes=1, first=0, last=28)
    assert whole != sorted(whole)
    for first in (1, 10, 27):
        assert greys(stream, seed=3, rank=0, processes=1, first=first, last=28) == whole[first:]


def test_each_shard_is_read_by_one_process_only(shards: Path) -> None:
    stream = train_stream(open_source(f"wds:{shards}"))
    read = [greys(stream, seed=1, rank=rank, processes=2, first=0, last=14) for rank in range(2)]
    assert sorted(read[0] + read[1]) == list(range(28))
    assert not {grey // 7 for grey in read[0]} & {grey // 7 for grey in read[1]}
    odd = [greys(stream, seed=1, rank=rank, processes=3, first=0, last=9) for rank in range(3)]  # 3 does not divide 4 shards
    assert len({*odd[0], *odd[1], *odd[2]}) == 27


def test_a_process_with_fewer_images_begins_again(tmp_path: Path) -> None:
    stream = train_stream(open_source(f"wds:{write_shards(tmp_path / 's', {'train': [2, 8], 'val': [4]})}"))
    read = [greys(stream, seed=1, rank=rank, processes=2, first=0, last=5) for rank in range(2)]
    assert sorted(len(set(r)) for r in read) == [2, 5]
    assert [len(r) for r in read] == [5, 5]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_gives_the_same_batches(shards: Path) -> None:
    source = open_source(f"wds:{shards}")
    runs = [list(Feed(source, RECIPE, workers=workers).epoch(1, first=1)) for workers in (0, 2)]
    assert len(runs[0]) == 3
    assert all(torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(*runs, strict=True))
    shares = [list(Feed(source, RECIPE, world=World(rank, 2)).epoch(0)) for rank in range(2)]
    assert [len(y) for share in shares for _, y in share] == [3] * 8


def test_a_run_on_shards(shards: Path, tmp_path: Path) -> None:
    run = train("repvgg_micro", open_source(f"wds:{shards}"), RECIPE, tmp_path / "run", width=0.25, log=str)
    assert run.last.images == 9
    assert run.last.confusion.sum(1).tolist() == [3, 2, 2, 2]
    limited = open_source(f"wds:{shards}").limited(6)
    assert (len(limited.train), len(limited.val)) == (6, 6)
    assert len(greys(train_stream(limited), seed=0, rank=0, processes=1, first=0, last=6)) == 6


def test_shards_on_a_server(shards: Path) -> None:
    with server(shards) as url:
        source = open_wds(f"{url}/train-{{000..003}}.tar;{url}/val-{{000..001}}.tar")
        assert (len(source.train), len(source.val)) == (28, 9)
        assert sorted(greys(train_stream(source), seed=0, rank=0, processes=1, first=0, last=28)) == list(range(28))


class server:
    def __init__(self, root: Path) -> None:
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_images_are_counted_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_wds(str(shards))
    monkeypatch.setattr(np, "bincount", lambda *_: pytest.fail("counted again"))
    assert len(open_wds(str(shards)).train) == 28
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "cache"))
    write_shards(shards, {"train": [3]})
    assert len(open_wds(str(shards)).train) == 24


@pytest.fixture
def damaged(tmp_path: Path) -> Source:
    return open_source(f"wds:{write_shards(tmp_path / 'damaged', {'train': [12], 'val': [4]}, bad=5)}")


def test_a_bad_image_is_named_or_listed(damaged: Source, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"train-000\.tar: 00005\.png: not an image"):
        train("repvgg_micro", damaged, RECIPE, tmp_path / "a", width=0.25, log=str)
    said: list[str] = []
    keeping = Keeping(on_bad_image="skip")
    train("repvgg_micro", damaged, RECIPE, tmp_path / "b", width=0.25, log=said.append, keeping=keeping)
    assert said[-1] == f"1 images could not be read: {tmp_path / 'b/bad_images.txt'}"


def test_streamed_parquet(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, count in (("train", 10), ("test", 4)):
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)], "label": [i % 2 for i in range(count)]}
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"set/{split}-00000.parquet")
    source = open_source(f"hf-stream:{tmp_path / 'set'}")
    assert (source.classes, len(source.train), len(source.val)) == (["a", "b"], 10, 4)
    assert sorted(greys(train_stream(source), seed=0, rank=0, processes=1, first=0, last=10)) == list(range(10))


def test_what_cannot_be_read_is_one_line(tmp_path: Path, shards: Path) -> None:
    for spec, complaint in (
        (f"wds:{tmp_path / 'nowhere'}", "no such folder"),
        (f"wds:{tmp_path}", r"has no train\*\.tar"),
        (f"wds:{shards}/train-{{000..009}}.tar;{shards}/val-000.tar", "there is no .*train-004.tar"),
        ("wds:http://127.0.0.1:9/train.tar;http://127.0.0.1:9/val.tar", "cannot be opened"),
        (f"hf-stream:{tmp_path / 'nowhere'}", "cannot be opened"),
    ):
        with pytest.raises(DataError, match=complaint) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)
    (shards / "train-001.tar").write_bytes((shards / "train-001.tar").read_bytes()[:3000])
    with pytest.raises(DataError):
        open_source(f"wds:{shards}")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{0..1}/{5..6}", ["0/5", "0/6", "1/5", "1/6"]),
        ("{3..1}", []),
    ],
)
def test_numbers_in_braces(pattern: str, names: list[str]) -> None:
    assert expanded(pattern) == names


def test_labels_that_are_ids_are_refused(tmp_path: Path) -> None:
    table = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": [2**62, 5, 5]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    with pytest.raises(DataError, match=f"column 'label' holds 2 distinct integers from 5 to {2**62}, which are ids"):
        open_source(f"hf-stream:{tmp_path}")
