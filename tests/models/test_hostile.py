"""checkpoint.py against hostile and damaged files: one line each, and nothing runs."""

import json
import os
import pickle
import re
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from small_files import TWO, archive, entry, header, ours, pickled, repacked, tensors, with_attribute
from torch import nn

import repvgg
from repvgg.cli import main
from repvgg.disk import FileError
from repvgg.models.checkpoint import METADATA_KEY


def holds_itself() -> dict[str, Any]:
    wrapper: dict[str, Any] = {}
    wrapper["model"] = wrapper
    return wrapper


class Forged:
    """A pickle of an ordered dictionary of which one method is a number."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __reduce__(self) -> Any:
        return OrderedDict, (), {self.method: 5}, None, iter(tensors().items())


HOSTILE: dict[str, Callable[[], bytes]] = {
    "zero bytes": lambda: b"",
    "one byte": lambda: b"\x80",
    "text": lambda: b"these are not the weights you are looking for\n" * 9,
    "html": lambda: b"<!DOCTYPE html><html>Please log in</html>",
    "git lfs pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "image": lambda: b"\x89PNG\r\n\x1a\n" + bytes(64),
    "zeros": lambda: bytes(1000),
    "truncated in its length": lambda: ours()[:5],
    "truncated before its header": lambda: ours()[:8],
    "truncated in its header": lambda: ours()[:100],
    "truncated in its data": lambda: ours()[:-1],
    "trailing bytes": lambda: ours() + b"more",
    "header length huge": lambda: header({}, length=2**63),
    "header length negative": lambda: header({}, length=2**64 - 1),
    "header length over the limit": lambda: header({}, length=100_000_001),
    "header length beyond the end": lambda: header({"x": entry(0, 8)}, TWO, length=1000),
    "header length zero": lambda: header({"x": entry(0, 8)}, TWO, length=0),
    "header empty": lambda: header({}),
    "header a list": lambda: header([1, 2]),
    "header no JSON": lambda: header(b"{" + b"x" * 63),
    "header no UTF-8": lambda: header(b'{"\xff\xfe": 1}'),
    "header nested deeply": lambda: header(b'{"x":' + b"[" * 200_000),
    "offsets beyond the end": lambda: header({"x": entry(0, 800, shape=(200,))}, TWO),
    "offsets astronomical": lambda: header({"x": entry(0, 2**62, shape=(2**60,))}, TWO),
    "offsets negative": lambda: header({"x": entry(-8, 0)}, TWO),
    "offsets reversed": lambda: header({"x": entry(8, 0)}, TWO),
    "offsets fractional": lambda: header({"x": {**entry(0, 8), "data_offsets": [0, 8.5]}}, TWO),
    "offsets overlapping": lambda: header({"x": entry(0, 8), "y": entry(4, 12)}, TWO + TWO),
    "offsets shared": lambda: header({"x": entry(0, 8), "y": entry(0, 8)}, TWO),
    "offsets with a hole": lambda: header({"x": entry(0, 8), "y": entry(16, 24)}, TWO * 3),
    "names twice": lambda: header(b'{"x":%b,"x":%b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), TWO),
    "names twice apart": lambda: header(
        b'{"x":%b,"x":%b}' % (json.dumps(entry(0, 8)).encode(), json.dumps(entry(8, 16)).encode()), TWO + TWO
    ),
    "shape overflowing": lambda: header({"x": entry(0, 8, shape=(2**33, 2**33))}, TWO),
    "shape negative": lambda: header({"x": entry(0, 8, shape=(-2,))}, TWO),
    "shape too small": lambda: header({"x": entry(0, 8, shape=(1,))}, TWO),
    "dtype unknown": lambda: header({"x": entry(0, 8, dtype="F31")}, TWO),
    "dtype complex": lambda: header({"stem.block.weight": entry(0, 8, dtype="C64", shape=(1,))}, TWO),
    "dtype boolean": lambda: header({"stem.block.weight": entry(0, 8, dtype="BOOL", shape=(8,))}, TWO),
    "dtype of eight bits": lambda: header({"running_var": entry(0, 8, dtype="F8_E4M3", shape=(8,))}, TWO),
    "metadata no strings": lambda: header({"__metadata__": {"a": 1}, "x": entry(0, 8)}, TWO),
    "names hostile": lambda: header({"\n\x1b[2Jok\n": entry(0, 8)}, TWO),
    "tensors of nothing": lambda: header(
        {"stem.block.weight": entry(0, 0, shape=(0, 0, 0, 0)), "head.weight": entry(0, 0, shape=(0, 0))}
    ),
    "zip truncated": lambda: pickled(tensors())[:-30],
    "zip halved": lambda: pickled(tensors())[:2000],
    "zip of text": lambda: archive(readme_txt=b"hello"),
    "zip of TorchScript": lambda: archive(constants_pkl=b"\x80\x02.", data_pkl=b"\x80\x02}.", version=b"3\n"),
    "zip compressed": lambda: repacked(pickled({"x": torch.zeros(10_000_000)}), zipfile.ZIP_DEFLATED),
    "legacy truncated": lambda: pickled(tensors(), legacy=True)[:-30],
    "legacy halved": lambda: pickled(tensors(), legacy=True)[:300],
    "bare pickle": lambda: pickle.dumps({"a": 1}),
    "pickle of a list": lambda: pickled([torch.zeros(2)]),
    "pickle of a tensor": lambda: pickled(torch.zeros(2)),
    "pickle of numbers": lambda: pickled({"lr": 0.1, "state_dict": {}}),
    "pickle with other keys": lambda: pickled({1: torch.zeros(2)}),
    "pickle that holds itself": lambda: pickled(holds_itself()),
    "pickle of a module": lambda: pickled(nn.Linear(2, 2)),
    "tensor expanded": lambda: pickled({"stem.block.weight": torch.zeros(1).expand(10**7, 10**7)}),
    "tensor sparse": lambda: pickled({"stem.block.weight": torch.eye(3).to_sparse()}),
    "tensor of no memory": lambda: pickled({"stem.block.weight": torch.zeros(10**12, device="meta")}),
    "tensor nested": lambda: pickled({"stem.block.weight": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}),
    "attribute items": lambda: pickled(Forged("items")),
    "attribute get": lambda: pickled({"model": Forged("get")}),
    "attribute manifest": lambda: pickled(with_attribute(METADATA_KEY, {"form": "deploy"})),
    "attribute manifest empty": lambda: pickled(with_attribute(METADATA_KEY, "{}")),
}


REASONS = {  # of guards of our own, without which a file would be refused for holding no RepVGG
    "zip compressed": "unpacks to more than its own size",
    "zip of text": "a zip archive, but no checkpoint of PyTorch",
    "zip of TorchScript": "it is a TorchScript program",
    "tensor expanded": "claims more numbers than the file holds",
    "dtype boolean": "is torch.bool",
    "dtype complex": "is torch.complex64",
    "dtype of eight bits": "is torch.float8",
}


@pytest.mark.filterwarnings("ignore:.*prototype.*:UserWarning")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_gets_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(HOSTILE[kind]())
    assert_one_line(path, capsys, REASONS.get(kind))


def assert_one_line(path: Path, capsys: pytest.CaptureFixture[str], reason: str | None = None) -> None:
    with pytest.raises(FileError, match=reason and re.escape(reason)) as caught:
        repvgg.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) > len(f"{path}: ") + 10
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(path), str(path.with_name("out.safetensors"))])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith(f"repvgg: {path}: ")
    assert len(err.splitlines()) == 1
    assert not path.with_name("out.safetensors").exists()


def test_no_file_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("missing.safetensors", "missing/model.pth", "", "pipe", "loop", "x" * 300):
        assert_one_line(tmp_path / name, capsys)
    assert_one_line(Path("/dev/zero"), capsys)


class Evil:
    """A pickle that runs code when opened."""

    def __init__(self, marker: Path, way: str) -> None:
        self.marker, self.way = marker, way

    def __reduce__(self) -> Any:
        touch = f"touch {self.marker}"
        return {
            "os.system": (os.system, (touch,)),
            "eval": (eval, (f"__import__('os').system({touch!r})",)),
            "subprocess": (subprocess.getoutput, (touch,)),
            "torch.load": (torch.load, (str(self.marker),)),
        }[self.way]


@pytest.mark.parametrize("way", ["os.system", "eval", "subprocess", "torch.load"])
def test_a_pickle_that_would_run_code(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    evil = Evil(marker, way)
    hidden = {"state_dict": tensors(), "epoch": evil}
    for content in (
        pickle.dumps(evil),
        pickled(evil),
        pickled(evil, legacy=True),
        pickled(hidden),
        pickled(with_attribute("x", evil)),
    ):
        path = tmp_path / "model.pth"
        path.write_bytes(content)
        assert_one_line(path, capsys)
        assert not marker.exists()
    if way != "os.system":
        return
    pickle.loads(pickle.dumps(evil))  # the same file, opened as one should not
    assert marker.exists()


def test_the_command_itself_says_one_line(tmp_path: Path, forks: Forks) -> None:
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    path.write_bytes(pickled(Evil(marker, "os.system")))
    said = forks(["info", str(path)], tmp_path)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"repvgg: {path}: holds no dictionary of tensors: save model.state_dict()")
    assert len(said.err.splitlines()) == 1
    assert not marker.exists()
