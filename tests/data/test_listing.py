"""data/listing.py: images in one heap, divided by name or by a table."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from repvgg.data import DataError, Source, open_source
from repvgg.data.listing import Splitting, held_out, open_table, reopened, write_table


def heap(root: Path, **classes: int) -> Path:
    """Class folders with so many images each, a pixel large; the first is black, the next lighter."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (1, 1), i).save(root / name / f"{i}.png")
    return root


def split_of(source: Source) -> dict[str, str]:
    assert source.rows is not None
    return {name: split for name, _, split in source.rows()}


def test_a_flat_folder_is_divided_class_by_class(tmp_path: Path) -> None:
    root = heap(tmp_path / "photos", cat=20, dog=10, owl=2)
    (root / ".cache").mkdir()
    (root / "__MACOSX").mkdir()
    source = open_source(str(root))
    assert source.classes == ["cat", "dog", "owl"]
    assert source.splitting == (0.2, 0)
    assert Counter(source.val[i][1] for i in range(len(source.val))) == {0: 4, 1: 2, 2: 1}
    assert Counter(source.train[i][1] for i in range(len(source.train))) == {0: 16, 1: 8, 2: 1}
    assert source.rows is not None
    for name, label, split in source.rows():
        images = source.split(split)
        grey, number = int(Path(name).stem), source.classes.index(label)
        assert any((int(x[0, 0, 0]), y) == (grey, number) for x, y in (images[i] for i in range(len(images))))


def test_the_draw_is_of_the_seed_and_the_fraction_and_few_change_sides_when_images_are_added(tmp_path: Path) -> None:
    root = heap(tmp_path / "photos", cat=100, dog=100)
    first = split_of(open_source(str(root), 0.3))
    assert first == split_of(open_source(str(root), 0.3, 0))
    assert Counter(first.values()) == {"train": 140, "val": 60}
    assert first != split_of(open_source(str(root), 0.3, 1))
    Image.new("L", (1, 1)).save(root / "cat" / "new.png")
    again = split_of(open_source(str(root), 0.3))
    assert sum(first[name] != again[name] for name in first) <= 2


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_split_of_its_own(tmp_path: Path, name: str) -> None:
    root = heap(tmp_path / "set", **{"train/a": 3, "train/b": 3, f"{name}/a": 1, "test/b": 2})
    source = open_source(str(root))
    assert (len(source.train), len(source.val), len(source.split("test"))) == (6, 1, 2)
    assert (source.rows, source.splitting) == (None, None)
    with pytest.raises(DataError, match=rf"--val: \S+set has a validation split of its own, {name}/"):
        open_source(str(root), 0.5)


def test_train_alone_is_divided_and_a_class_may_be_called_train(tmp_path: Path) -> None:
    alone = open_source(str(heap(tmp_path / "alone", **{"train/a": 5, "train/b": 5})), 0.4)
    assert (alone.classes, len(alone.train), len(alone.val)) == (["a", "b"], 6, 4)
    vehicles = open_source(str(heap(tmp_path / "vehicles", bus=5, train=5)))
    assert (vehicles.classes, len(vehicles.train), len(vehicles.val)) == (["bus", "train"], 8, 2)


def test_a_test_split_is_kept_where_the_validation_split_is_drawn(tmp_path: Path) -> None:
    root = heap(tmp_path / "set", **{"train/a": 5, "train/b": 5, "test/b": 3})
    source = open_source(str(root))
    assert [len(images) for images in (source.train, source.val, source.split("test"))] == [8, 2, 3]
    assert [source.split("test")[i][1] for i in range(3)] == [1, 1, 1]
    assert source.rows is not None
    (tmp_path / "run").mkdir()
    write_table(tmp_path / "run/split.csv", source.rows())
    assert len(reopened(open_source(str(root)), tmp_path / "run").split("test")) == 3
    heap(root / "train", aa=2)
    assert reopened(open_source(str(root)), tmp_path / "run").test is None  # its classes have other numbers than the run's
    heap(tmp_path / "flat", **{"train/a": 5, "train/b": 5, "test": 3})
    assert open_source(str(tmp_path / "flat")).test is None  # without labels


def test_classes_have_one_order_whatever_they_are_called(tmp_path: Path) -> None:
    """By their names as they are, in a folder, in its test split, and in a run's own table; not by what is shown of them."""
    classes = [os.fsdecode(b"\xe9clair"), "tarte", "the\u0301\u00a0vert", "the\u0301baine"]
    try:
        root = heap(tmp_path / "set", **{f"train/{name}": 5 for name in classes}, **{f"test/{classes[0]}": 1, "test/tarte": 1})
    except OSError:
        pytest.skip("this file system knows UTF-8 alone")
    source = open_source(str(root))
    assert source.rows is not None
    assert sorted(source.split("test")[i][1] for i in range(2)) == sorted(
        source.classes.index(name) for name in ("\\xe9clair", "tarte")
    )
    (tmp_path / "run").mkdir()
    write_table(tmp_path / "run/split.csv", source.rows())
    assert reopened(source, tmp_path / "run").classes == source.classes


def test_names_that_a_spreadsheet_would_compute(tmp_path: Path) -> None:
    source = open_source(str(heap(tmp_path / "photos", **{"=1+1": 3, "@a": 3, "b": 3})))
    assert source.rows is not None
    write_table(table := tmp_path / "split.csv", source.rows())
    cells = [cell for line in table.read_text().splitlines() for cell in line[1:-1].split('","')]
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+", "-"))]
    again = open_table(table, root=tmp_path / "photos", name=source.name)
    assert again.classes == source.classes == ["=1+1", "@a", "b"]
    assert [(again.train[i][0].tolist(), again.train[i][1]) for i in range(6)] == [
        (source.train[i][0].tolist(), source.train[i][1]) for i in range(6)
    ]


def test_a_table(tmp_path: Path) -> None:
    root = heap(tmp_path / "photos", x=6)
    lines = ["label, path", *(f"{'cat' if i % 2 else 'a dog'}, x/{i}.png" for i in range(6))]
    (root / "all.csv").write_text("\n".join(lines))
    source = open_source(str(root / "all.csv"), 0.34)
    assert source.classes == ["a dog", "cat"]
    assert (len(source.train), len(source.val)) == (4, 2)
    assert all(int(x[0, 0, 0]) % 2 == y for x, y in (source.train[i] for i in range(4)))
    assert source.rows is not None
    write_table(tmp_path / "split.csv", source.rows())
    again = open_table(tmp_path / "split.csv", root=root, name=source.name)
    assert again.rows is not None
    assert again.rows() == source.rows()
    assert (again.name, again.classes) == (source.name, source.classes)
    with pytest.raises(DataError, match="has a column split: leave out --val"):
        open_source(str(tmp_path / "split.csv"), 0.5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "needs a first line that names the columns path and label"),
        ("path;label\n0.png;a\n", "path and label, and split if there is one, separated by commas"),
        ("path,label\n", "lists no images"),
        ("path,label\n0.png,\n", "line 2: a cell of path, label or split is empty"),
        ("path,label\n0.png,a\nno.png,a\n", "line 3: there is no image"),
        ("path,label\n\n0.png,a\n\n\nno.png,a\n", "line 6: there is no image"),
        ("path,label\n\n0.png,\n", "line 3: a cell of path, label or split is empty"),
        ("path,label\n0.png,a\n", "no class has two images"),
        ("path,label,split\n0.png,a,nope\n", "split 'nope': there are train, val, test"),
        ("path,label,split\n0.png,a,train\n", "no image has the split val"),
        ("path,label,split\n0.png,a,train\n1.png,b,val\n", "class 'b' has no images to train on"),
    ],
)
def test_tables_that_say_nothing(text: str, complaint: str, tmp_path: Path) -> None:
    heap(tmp_path, x=1)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((tmp_path / "x" / "0.png").read_bytes())
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(complaint)):
        open_source(str(tmp_path / "t.csv"))


def test_space_around_cells_is_no_class(tmp_path: Path) -> None:
    root = heap(tmp_path / "photos", x=4)
    (root / "all.csv").write_text(
        "path,label,split\nx/0.png,cat ,train \nx/1.png, cat,train\nx/2.png,dog,train\nx/3.png,dog , val\n"
    )
    assert open_source(str(root / "all.csv")).classes == ["cat", "dog"]


def test_a_run_goes_on_with_its_own_division(tmp_path: Path) -> None:
    """What it recorded is what it was divided by, whatever is asked for now."""
    root = heap(tmp_path / "photos", **{"back\\slash": 6, "x": 6})
    began = open_source(str(root), 0.34, 1)
    assert began.rows is not None
    run = tmp_path / "run"
    run.mkdir()
    assert reopened(began, run) is began
    write_table(run / "split.csv", began.rows())
    (run / "settings.json").write_text(json.dumps({"splitting": list(began.splitting or ())}))
    again = reopened(open_source(str(root), seed=7), run)
    assert again.rows is not None
    assert (again.rows(), again.classes, again.splitting) == (began.rows(), began.classes, (0.34, 1))
    with pytest.raises(DataError, match=r"holds a run with --val 0.34, not 0.5: another --out"):
        reopened(open_source(str(root), 0.5), run, 0.5)
    gone = root / began.rows()[3][0]
    gone.unlink()
    with pytest.raises(DataError, match=r"line 5: there is no image .*: put it back, or give another --out, or --resume never$"):
        reopened(began, run)


def test_fractions_that_are_none() -> None:
    for val in (0.0, 1.0, -1.0, 20.0):
        with pytest.raises(DataError, match=f"--val {val}: a fraction of the images, above 0 and below 1"):
            Splitting(val)
    assert len(held_out(["a", "b"], [0, 0], Splitting(0.99))) == 1


def test_data_with_splits_takes_no_fraction() -> None:
    with pytest.raises(DataError, match="--val: digits has a validation split of its own"):
        open_source("digits", 0.2)


@pytest.mark.parametrize("second", ["a.png,dog,train", "a.png,cat,val"])
def test_an_image_has_one_row(second: str, tmp_path: Path) -> None:
    """A table of detections has a row for each box."""
    heap(tmp_path, x=2)
    for i, name in enumerate("ab"):
        (tmp_path / f"x/{i}.png").rename(tmp_path / f"{name}.png")
    table = tmp_path / "photos.csv"
    table.write_text(f"path,label,split\na.png,cat,train\nb.png,dog,val\n{second}\n")
    with pytest.raises(DataError, match=r"line 4: line 2 has a.png too, with another label or split: an image has one row"):
        open_table(table)
