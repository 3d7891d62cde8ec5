"""pickles.py: what PyTorch writes is read as PyTorch reads it; what a stranger wrote takes neither time, memory nor control."""

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from torch import Tensor, nn

from repvgg.disk import FileError
from repvgg.models import pickles
from repvgg.models.pickles import BLANK, read_pickle


class Node(dict[str, Any]):
    """As yacs has them: a dictionary of a class of its own."""


class Trainer:
    """Anything else that a checkpoint may hold."""

    def __init__(self) -> None:
        self.settings = {"lr": 0.1}


def trained() -> dict[str, Any]:
    """A training checkpoint, as the official code writes them."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    config = Node(model=Node(arch="RepVGG-A0"), sizes=[1, (2, 3)])
    return {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "config": config, "trainer": Trainer(), "epoch": 7}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint(legacy: bool, tmp_path: Path) -> None:
    written = trained()
    torch.save(written, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    read = read_pickle(tmp_path / "a.pth")
    assert list(read["model"]) == list(written["model"])
    for name, tensor in written["model"].items():
        assert read["model"][name].dtype == tensor.dtype
        assert torch.equal(read["model"][name], tensor)
    assert torch.equal(read["optimizer"]["state"][0]["momentum_buffer"], written["optimizer"]["state"][0]["momentum_buffer"])
    assert read["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert read["config"] is read["trainer"] is BLANK
    assert read["epoch"] == 7


def tensors() -> dict[str, Tensor]:
    base = torch.arange(24.0)
    return {
        "view": base.view(2, 3, 4).transpose(0, 2),
        "tail": base[20:],
        "every other": base[::2],
        "parameter": nn.Parameter(torch.randn(3)),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(5),
        **{str(dtype): torch.arange(6).to(dtype) for dtype in pickles.STORAGES.values()},
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_kind_of_tensor(legacy: bool, protocol: int, tmp_path: Path) -> None:
    state = OrderedDict(tensors())
    vars(state)["repvgg"] = "a manifest"
    torch.save(state, tmp_path / "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    read, trusted = read_pickle(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=False)
    assert read.attributes["repvgg"] == "a manifest"
    for name, tensor in trusted.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].stride() == tensor.stride()
        assert torch.equal(read[name], tensor), name


class Calls:
    """What it holds would be called by pickle.load."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_nothing_is_called(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for call in (Calls(os.system, f"touch {mark}"), Calls(eval, f"open({str(mark)!r}, 'w')"), Calls(Path.touch, mark)):
        torch.save({"model": {"x": torch.ones(2)}, "config": call}, tmp_path / "a.pth")
        read = read_pickle(tmp_path / "a.pth")
        assert read["config"] is BLANK
        assert torch.equal(read["model"]["x"], torch.ones(2))
    assert not mark.exists()


def archive(program: bytes, *more: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in (("a/data.pkl", program), *more):
            file.writestr(name, content)
    return buffer.getvalue()


def nested_key() -> bytes:
    """A tuple of two of the tuple before, sixty times over, as a dictionary's key: to hash it takes 2 ** 60 steps."""
    return b"\x80\x02}K\x00" + b"\x86".join([b"2"] * 60) + b"\x86K\x01s."


# The same tuple as the name of a storage: to write it out takes as long.
NESTED_NAME = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)" + b"2\x86" * 60 + b"X\x03\x00\x00\x00cpuK\x02tQ"


def legacy(loaded: bytes, keys: bytes) -> bytes:
    """Return a file as PyTorch wrote them before 1.6: five pickles in a row."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    return magic + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + b"\x80\x02" + loaded + b"\x80\x02" + keys


def claims(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 2) -> bytes:
    """A tensor of any shape, on two numbers."""

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Stored(), offset, size, stride, False, OrderedDict())

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(thing, Stored) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"x": Rebuilt()})
    return archive(buffer.getvalue(), ("a/data/0", struct.pack("<2f", 1, 2)))


HOSTILE: dict[str, bytes] = {
    "a key that is hashed for ever": archive(nested_key()),
    "a storage whose name is written for ever": archive(b"\x80\x02" + NESTED_NAME + b"."),
    "a storage whose name is written for ever, before 1.6": legacy(NESTED_NAME + b".", b"]."),
    "a list of storages that is written for ever": legacy(b"}.", b"])" + b"2\x86" * 60 + b"a."),
    "six gigabytes in thirty bytes": archive(
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (6 * 10**9).to_bytes(5, "little") + b"\x85R."
    ),
    "dictionaries of one another": archive(b"\x80\x02}q\x00" + b"}q\x01(K\x01h\x00K\x02h\x00uq\x00" * 100_000 + b"."),
    "more instructions than any checkpoint": archive(b"\x80\x02" + b"N0" * 3_000_000 + b"N."),
    "a view of more numbers": claims((10**7, 10**7), (0, 0)),
    "a view beyond the end": claims((2,), (1,), offset=1),
    "a view of negative stride": claims((2,), (-1,), offset=1),
    "a view of half a number": claims((2,), (0.5,)),  # type: ignore[arg-type]
    "a storage larger than the file": claims((2,), (1,), count=10**9),
    "no stack": archive(b"\x80\x02."),
    "no mark": archive(b"\x80\x02t."),
    "no memo": archive(b"\x80\x02h\x05."),
    "no end": archive(b"\x80\x02}"),
    "an extension": archive(b"\x80\x02\x82\x01."),
    "pairs of a hundred thousand, all one": archive(
        b"\x80\x02(" + b"N" * 100_000 + b"tq\x000ccollections\nOrderedDict\n](" + b"h\x00" * 100_000 + b"e\x85R."
    ),
    "a list of itself": archive(b"\x80\x02]q\x00h\x00a."),
    "a number of a million digits": archive(b"\x80\x02I" + b"9" * 1_000_000 + b"\n."),
}


REASONS = {  # of guards of our own, without which a file would be refused for holding no tensors
    "more instructions than any checkpoint": "is too long a program for a checkpoint",
    "a view of more numbers": "claims more numbers",
    "a view beyond the end": "claims more numbers",
    "a view of negative stride": "claims more numbers",
    "a view of half a number": "claims more numbers",
    "a storage larger than the file": "holds fewer numbers than it claims",
    "an extension": "holds an instruction that no checkpoint of PyTorch has",
}
READ = """
import re, resource
from pathlib import Path
from repvgg.disk import FileError
from repvgg.models.checkpoint import read
held = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + (600 << 20), resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for path in {}:
    try:
        read(path)
    except FileError as error:
        print(error)
    else:
        print("READ", path)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_hostile_programs_take_neither_time_nor_memory(tmp_path: Path, forks: Forks) -> None:
    """All in one process, which may take 600 MiB more of data than it begins with, and two minutes of the processor."""
    paths = [tmp_path / f"{kind}.pth" for kind in HOSTILE]
    for path, content in zip(paths, HOSTILE.values(), strict=True):
        path.write_bytes(content)
    with forks.start(READ.format(list(map(str, paths))), tmp_path) as process:
        done = process.wait()
    assert done.code == 0, done.out + done.err
    for path, line in zip(paths, done.out.splitlines(), strict=True):
        assert line.startswith(f"{path}: ")
        assert REASONS.get(path.stem, "") in line


def test_of_an_archive_behind_another_the_last_is_read(tmp_path: Path) -> None:
    """Readers differ in which directory they believe; this one takes no tensor of the first and no program of the second."""
    first, last = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.zeros(2), "y": torch.zeros(2)}, first)
    torch.save({"x": torch.ones(2)}, last)
    (tmp_path / "a.pth").write_bytes(first.getvalue() + last.getvalue())
    read = read_pickle(tmp_path / "a.pth")
    assert list(read) == ["x"]
    assert torch.equal(read["x"], torch.ones(2))


def test_a_program_cut_anywhere(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(2), "n": [1, (2, 3)]}, buffer)
    with zipfile.ZipFile(buffer) as file:
        name = next(name for name in file.namelist() if name.endswith("data.pkl"))
        program, numbers = file.read(name), file.read(name.replace("data.pkl", "data/0"))
    path = tmp_path / "a.pth"
    for end in range(len(program)):
        path.write_bytes(archive(program[:end], ("a/data/0", numbers)))
        with pytest.raises(FileError):
            read_pickle(path)


def test_dictionaries_are_found_once_each() -> None:
    inner: dict[str, Any] = {"x": 1}
    outer = {"model": inner, "ema": inner}
    outer["self"] = outer
    assert [name for name, _ in pickles.dictionaries(outer)] == ["", ".ema"]
