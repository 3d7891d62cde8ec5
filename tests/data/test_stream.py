"""data/stream.py: WebDataset shards and streamed parquet, near and on a small server of our own."""

import http.server
import threading
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tars import png, write_shards

from repvgg.api.training import resolved
from repvgg.data import DataError, Source, open_source
from repvgg.data import stream as stream_module
from repvgg.data.images import ImageError
from repvgg.data.stream import Plan, Stream, expanded, open_wds
from repvgg.train.batches import Feed
from repvgg.train.distributed import World
from repvgg.train.loop import train
from repvgg.train.recipes import Keeping, Recipe

pytestmark = pytest.mark.usefixtures("own_cache")
RECIPE = Recipe(epochs=2, batch_size=6, crop="shift", flip=False)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", {"train": [7, 7, 7, 7], "val": [5, 4]})


def seen(stream: Stream, plan: Plan) -> list[int]:
    """The grey levels of a plan's batches, in their order."""
    lanes = [plan.examples(lane) for lane in range(len(plan.lanes))]
    batches = [list(islice(lanes[j % len(lanes)], plan.size(j))) for j in range(plan.first, plan.batches)]
    return [int(stream[e][0][0, 0, 0]) for batch in batches for e in batch]


def greys(stream: Stream, seed: int = 0, start: int = 0, size: int = 1, batches: int = 28, first: int = 0) -> list[int]:
    return seen(stream, stream.shuffled(seed, start, [size], batches, first))


def train_stream(source: Source) -> Stream:
    assert isinstance(source.train, Stream)
    return source.train


def test_a_folder_of_shards(shards: Path) -> None:
    source = open_source(f"wds:{shards}")
    recipe = resolved("", source, "", {}, str)
    assert recipe is not None  # not auto, which looks at images here and there
    assert recipe.epochs == 120
    assert (source.classes, len(source.train), len(source.val)) == (["0", "1", "2", "3"], 28, 9)
    stream = train_stream(source)
    assert sorted(greys(stream)) == list(range(28))
    examples = list(stream.shuffled(0, 0, [28], 1).examples(0))
    assert all(stream[e][1] == int(stream[e][0][0, 0, 0]) % 4 for e in examples)
    assert sorted(e.position for e in examples) == list(range(28))
    assert isinstance(source.val, Stream)
    assert seen(source.val, source.val.in_order(0, 1, 9)) == list(range(28, 37))
    shares = [seen(source.val, source.val.in_order(rank, 2, 2)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(28, 37))


@pytest.mark.parametrize("size", [1, 3])
def test_the_order_is_a_function_of_the_seed_and_goes_on_anywhere(shards: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHUNK", 4)
    stream = train_stream(open_source(f"wds:{shards}"))
    count = 28 // size
    whole = greys(stream, 3, size=size, batches=count)
    assert len(set(whole)) == count * size
    assert whole != greys(stream, 4, size=size, batches=count)
    assert whole != sorted(whole)
    for first in range(count):
        assert greys(stream, 3, size=size, batches=count, first=first) == whole[first * size :]


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_every_image_is_read_by_one_process(shards: Path, processes: int) -> None:
    """Also where the number of processes does not divide that of the shards."""
    stream = train_stream(open_source(f"wds:{shards}"))
    each = 28 // processes
    read = [greys(stream, 1, rank * each, 1, each) for rank in range(processes)]
    assert [len(some) for some in read] == [each] * processes
    assert len({grey for some in read for grey in some}) == each * processes


def test_shards_of_unequal_size(tmp_path: Path) -> None:
    stream = train_stream(open_source(f"wds:{write_shards(tmp_path / 's', {'train': [2, 8, 1, 5], 'val': [4]})}"))
    read = [greys(stream, 1, rank * 8, 2, 4) for rank in range(2)]
    assert sorted(read[0] + read[1]) == list(range(16))


def test_going_on_reads_no_more_than_the_shards_that_it_is_in(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHUNK", 1)
    stream = train_stream(open_source(f"wds:{shards}"))
    read: list[int] = []
    real = Stream._rows

    def counted(self: Stream, table: Any, first: int, position: int) -> Any:
        for number, example in real(self, table, first, position):
            read.append(number)
            yield number, example

    monkeypatch.setattr(Stream, "_rows", counted)
    assert len(greys(stream, 1, first=24)) == 4
    assert len(read) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_gives_the_same_batches(shards: Path) -> None:
    source = open_source(f"wds:{shards}")
    runs = [list(Feed(source, RECIPE, workers=workers).epoch(1, first=1)) for workers in (0, 1, 3)]
    assert len(runs[0]) == 3
    for run in runs[1:]:
        assert all(torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(runs[0], run, strict=True))
    shares = [list(Feed(source, RECIPE, world=World(rank, 2)).epoch(0)) for rank in range(2)]
    assert [len(y) for share in shares for _, y in share] == [3] * 8
    uneven = [list(Feed(source, replace(RECIPE, accumulate=2), world=World(rank, 2)).epoch(0)) for rank in range(2)]
    assert [len(y) for share in uneven for _, y in share] == [1, 2] * 8
    assert len({int(x.max()) for share in uneven for batch, _ in share for x in batch}) == 24


def test_a_run_on_shards(shards: Path, tmp_path: Path) -> None:
    run = train("repvgg_micro", open_source(f"wds:{shards}"), RECIPE, tmp_path / "run", width=0.25, log=str)
    assert run.last.images == 9
    assert run.last.confusion.sum(1).tolist() == [3, 2, 2, 2]
    limited = open_source(f"wds:{shards}").limited(6)
    assert (len(limited.train), len(limited.val)) == (6, 6)
    drawn = greys(train_stream(limited), batches=6)
    assert len(set(drawn)) == 6
    assert drawn != greys(train_stream(open_source(f"wds:{shards}").limited(6, seed=1)), batches=6)


def test_shards_on_a_server(shards: Path) -> None:
    with server(shards) as url:
        source = open_wds(f"{url}/train-{{000..003}}.tar;{url}/val-{{000..001}}.tar")
        assert (len(source.train), len(source.val)) == (28, 9)
        assert sorted(greys(train_stream(source))) == list(range(28))


class server:
    def __init__(self, root: Path) -> None:
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


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
    assert sorted(greys(train_stream(source), batches=10)) == list(range(10))


def test_streamed_image_files(tmp_path: Path) -> None:
    """The hub's commonest layout: each image is a file, in a folder of its class."""
    for number in range(8):
        path = tmp_path / "set" / ("test" if number > 5 else "train") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    source = open_source(f"hf-stream:{tmp_path / 'set'}")
    assert (source.classes, len(source.train), len(source.val)) == (["a", "b"], 6, 2)
    assert sorted(greys(train_stream(source), batches=6)) == list(range(6))


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
