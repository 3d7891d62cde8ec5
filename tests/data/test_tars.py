"""data/tars.py: what a stranger's tar may ask for and does not get."""

import gzip
import tarfile
from pathlib import Path

import pytest
from tars import png, write_shards

from repvgg.data import DataError, open_source, tars
from repvgg.data.shards import open_shards

pytestmark = pytest.mark.usefixtures("own_cache")


def sparse(name: str, size: int) -> bytes:
    """The header of a file of which the tar holds nothing: a hole."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % size + b"%011o\0" % 0
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf() + content + bytes(-len(content) % 512)


END = bytes(1024)
HOSTILE = {
    "sparse": (sparse("00000.png", 200 << 30) + END, "sparse, or larger than"),
    "large": (member("00000.png", bytes(2000)) + END, "sparse, or larger than 1,000 bytes"),
    "compressed": (gzip.compress(bytes(5000)) + bytes(512), "is no plain tar: if it is compressed, unpack it"),
    "zip": (b"PK\3\4" + bytes(1024), "is no plain tar"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_unpacks_to_any_size_is_refused_in_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "LARGEST", 1000)
    root = write_shards(tmp_path / "shards", {"train": [2], "val": [2]})
    content, reason = HOSTILE[kind]
    (root / "train-000.tar").write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        open_source(f"wds:{root}")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=reason):
        list(open_shards(f"wds:{root}", "train").read(0))


def test_what_lies_beside_an_image_is_neither_unpacked_nor_decoded(tmp_path: Path) -> None:
    """A .pth would go to torch.load, a .json.gz to gzip and a reader of JSON."""
    root = write_shards(tmp_path / "shards", {"train": [2], "val": [2]})
    beside = {"pth": b"no pickle", "npy": b"no array", "json.gz": b"no gzip", "json": b"[" * 100_000, "txt": b"\xff"}
    for name in ("train", "val"):
        parts = {"png": png(7), "cls": b"1", **beside}
        text = b"".join(member(f"0000{i}.{suffix}", data) for i in range(3) for suffix, data in parts.items())
        (root / f"{name}-000.tar").write_bytes(text + END)
    source = open_source(f"wds:{root}")
    assert (len(source.train), len(source.classes)) == (3, 2)
    assert [item.label for item in open_shards(f"wds:{root}").read(0)] == [1, 1, 1]


def test_a_file_of_this_machine_is_not_read_in_place_of_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a member whose name is a file's here, `datasets` reads the file."""
    monkeypatch.chdir(tmp_path)
    root = write_shards(tmp_path / "shards", {"train": [4], "val": [4]})
    for name in ("00000.png", "00001.png"):
        Path(name).write_bytes(png(200))
    bytes_of = [item.image for item in open_shards(f"wds:{root}", "train").read(0)]
    assert bytes_of == [png(grey) for grey in range(4)]


def test_a_class_that_is_no_number_is_refused(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", {"train": [2], "val": [2]})
    (root / "train-000.tar").write_bytes(member("00000.png", png(7)) + member("00000.cls", b"cat") + END)
    with pytest.raises(DataError, match=r"train-000.tar: 00000: its .cls is no number"):
        open_source(f"wds:{root}")
