"""files.py against files that are damaged, hostile or interrupted.

python tests/test_files.py COUNT SEED FOLDER      the fuzz test by hand; what it finds is left in FOLDER
"""

import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import repvgg
from repvgg.cli import main
from repvgg.disk import FileError, atomically
from repvgg.models import checkpoint, keys, zoo
from repvgg.models.checkpoint import METADATA_KEY
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.plain import PlainNet

LAYERS: list[dict[str, Any]] = [
    {
        "op": "conv2d",
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": [3, 3],
        "stride": [2, 2],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "activation": "relu",
        "weight": "stem.block.weight",
        "bias": "stem.block.bias",
    },
    {"op": "squeeze_excite", "channels": 4, "activation": "relu", "path": "stem.se"},
    {"op": "global_avg_pool"},
    {"op": "linear", "in_features": 4, "out_features": 2, "weight": "head.weight", "bias": "head.bias"},
]
SMALL = Preprocessing((3, 16, 16), 16)
MANIFEST = Manifest(None, "deploy", ["cat", "dog"], SMALL, {"epochs": 1}, LAYERS)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return PlainNet(LAYERS).state_dict()


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------------------- manifests


def test_a_manifest_there_and_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    whole = Manifest({"name": "repvgg_a0", "num_classes": 2, "in_chans": 3, "width": 0.1}, "training", ["cät", "дог"])
    assert Manifest.from_json(whole.to_json()) == whole
    assert json.loads(whole.to_json())["format_version"] == 1


@pytest.mark.parametrize("text", ["", "null", "5", "[]", "{}", '"text"', "{" * 100_000, "[" * 100_000, '{"format_version": 1}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(FileError, match="manifest cannot be used"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_size": (3, 0, 224)},
        {"input_size": (3, 224, 8193)},
        {"input_size": (3, 224)},
        {"input_size": (1, 224, 224)},
        {"input_size": (3, 224.0, 224)},
        {"resize": 0},
        {"interpolation": "area"},
        {"mean": (0.5, 0.5)},
        {"mean": (0.5, 0.5, float("nan"))},
        {"std": (0.5, 0.5, 0.0)},
        {"std": (0.5, float("nan"), 0.5)},
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="preprocessing"):
        replace(Preprocessing(), **wrong)


def test_an_error_is_one_printable_line() -> None:
    assert str(FileError("a\nb\r\x1b[31m\u202ec\udc80 \t d")) == "a b [31m c d"
    assert len(str(FileError("x" * 10_000))) == 500


# --------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ""])
def test_there_and_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    checkpoint.write(path, tensors(), MANIFEST)
    back, manifest = checkpoint.read(path)
    assert manifest == MANIFEST
    assert {name: t.tolist() for name, t in back.items()} == {name: t.tolist() for name, t in tensors().items()}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_bare_state_dict_is_what_pytorch_expects(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "model.pth", tensors(), MANIFEST)
    bare = torch.load(tmp_path / "model.pth", weights_only=True)
    assert type(bare) is OrderedDict
    assert bare.keys() == tensors().keys()
    PlainNet(LAYERS).load_state_dict(bare, strict=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_views_are_written_alone(suffix: str, tmp_path: Path) -> None:
    whole = torch.arange(1_000_000.0)
    path = tmp_path / f"model{suffix}"
    checkpoint.write(path, {"x": whole[:2], "y": whole[:2], "z": whole[:6].view(2, 3).T}, MANIFEST)
    assert path.stat().st_size < 10_000
    assert {name: t.tolist() for name, t in checkpoint.read(path)[0].items()} == {
        "x": [0, 1],
        "y": [0, 1],
        "z": [[0, 3], [1, 4], [2, 5]],
    }


def test_any_length_of_header_is_read(tmp_path: Path) -> None:
    """A safetensors file begins with that length, and a pickle with the byte 128."""
    first_bytes = set()
    for words in range(40):
        path = tmp_path / "model.safetensors"
        checkpoint.write(path, tensors(), replace(MANIFEST, training={"word": "x" * 8 * words}))
        first_bytes.add(path.read_bytes()[0])
        assert checkpoint.read(path)[1] is not None
    assert 0x80 in first_bytes


def test_writing_leaves_no_trace_of_failure(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        atomically(tmp_path / "old", fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old", "old")]


def test_a_folder_that_is_missing_or_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place, reason in (("nowhere/model.safetensors", "no folder"), ("file/model.safetensors", "no folder"), ("folder", ".")):
        with pytest.raises(FileError, match=rf"{place}: cannot be written \(.*{reason}"):
            checkpoint.write(tmp_path / place, tensors(), MANIFEST)
    with pytest.raises(FileError, match="File name too long"):
        checkpoint.write(tmp_path / f"{'x' * 300}.safetensors", tensors(), MANIFEST)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def start(action: Callable[[], object]) -> int:
    """Run it in a process of its own, whose number this is."""
    if (child := os.fork()) == 0:
        try:
            action()
        finally:
            os._exit(1)
    return child


def in_child(action: Callable[[], object]) -> str:
    """What `action` raises, as text, in a process of its own."""
    reader, writer = os.pipe()

    def report() -> None:
        try:
            action()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())

    child = start(report)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_full_disk(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    checkpoint.write(path, tensors(), MANIFEST)
    before = path.read_bytes()

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoint.write(path, {"x": torch.zeros(100_000)}, MANIFEST)

    assert in_child(write) == f"FileError: {path}: cannot be written (File too large)"
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_disk_that_is_really_full(suffix: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def write(temporary: Path) -> None:
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"x" * 100_000)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        with pytest.raises(FileError, match=r"cannot be written \(No space left on device\)"):
            atomically(path, write)
        assert not list(Path(folder).iterdir())


def test_a_folder_and_a_file_without_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        checkpoint.write(path, tensors(), MANIFEST)
        path.chmod(0)
        Path(folder).chmod(0o555)

        def as_nobody(action: Callable[[], object]) -> str:
            def run() -> None:
                if os.geteuid() == 0:
                    os.setuid(65534)
                action()

            return in_child(run)

        denied = as_nobody(lambda: checkpoint.write(path, tensors(), MANIFEST))
        assert denied == f"FileError: {path}: cannot be written (Permission denied)"
        assert as_nobody(lambda: repvgg.load(path)) == f"FileError: {path}: cannot be read (Permission denied)"
        Path(folder).chmod(0o600)
        assert as_nobody(lambda: repvgg.load(path)) == f"FileError: {path}: cannot be read (Permission denied)"
        Path(folder).chmod(0o700)


def test_a_kill_at_any_time_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    moments = random.Random(0)
    checkpoint.write(path, {"x": torch.zeros(1_000_000)}, MANIFEST)
    seen = set()
    for first in range(0, 12_000, 1000):

        def write_on(first: int = first) -> None:
            for number in range(first, first + 1000):
                checkpoint.write(path, {"x": torch.full((1_000_000,), float(number))}, MANIFEST)

        child = start(write_on)
        time.sleep(moments.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        read, manifest = checkpoint.read(path)
        assert manifest == MANIFEST
        assert read["x"].shape == (1_000_000,)
        assert bool((read["x"] == read["x"][0]).all())
        seen.add(float(read["x"][0]))
    assert len(seen) > 1


def test_a_kill_between_writing_and_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.write(path, tensors(), MANIFEST)
    before = path.read_bytes()
    reader, writer = os.pipe()

    def tell_and_hang(_: int) -> None:
        os.write(writer, b"written")
        time.sleep(600)

    def write() -> None:
        monkeypatch.setattr(os, "fsync", tell_and_hang)
        checkpoint.write(path, {"x": torch.ones(5)}, MANIFEST)

    child = start(write)
    assert os.read(reader, 7) == b"written"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() == before
    assert isinstance(repvgg.load(path), PlainNet)
    checkpoint.write(path, tensors(), replace(MANIFEST, training={}))
    assert zoo.manifest_of(repvgg.load(path)).training == {}


# ---------------------------------------------------------------------------------------------------------- hostile files


def header(fields: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def ours() -> bytes:
    return save(tensors(), {METADATA_KEY: MANIFEST.to_json()})


def pickled(value: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def archive(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name.replace('_', '.')}", content)
    return buffer.getvalue()


def repacked(whole: bytes, compression: int) -> bytes:
    """A checkpoint of PyTorch, packed again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def holds_itself() -> dict[str, Any]:
    wrapper: dict[str, Any] = {}
    wrapper["model"] = wrapper
    return wrapper


def with_attribute(name: str, value: Any) -> OrderedDict[str, Tensor]:
    state = OrderedDict(tensors())
    vars(state)[name] = value
    return state


class Forged:
    """A pickle of an ordered dictionary of which one method is a number."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __reduce__(self) -> Any:
        return OrderedDict, (), {self.method: 5}, None, iter(tensors().items())


TWO = struct.pack("<2f", 1, 2)
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


@pytest.mark.filterwarnings("ignore:.*prototype.*:UserWarning")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_gets_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(HOSTILE[kind]())
    assert_one_line(path, capsys)


def assert_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileError) as caught:
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


def test_the_command_itself_says_one_line(tmp_path: Path) -> None:
    path, marker = tmp_path / "model.pth", tmp_path / "marker"
    path.write_bytes(pickled(Evil(marker, "os.system")))
    said = subprocess.run([sys.executable, "-m", "repvgg", "info", path], capture_output=True, text=True, timeout=300)
    assert said.returncode == 2
    assert said.stdout == ""
    assert said.stderr.startswith(f"repvgg: {path}: is refused: it holds more than tensors")
    assert len(said.stderr.splitlines()) == 1
    assert not marker.exists()


# --------------------------------------------------------------------------------------------------------------- the fuzz

NASTY: list[Any] = [
    -1,
    0,
    1,
    2,
    3,
    255,
    2**31,
    2**32,
    2**63,
    10**30,
    0.5,
    1e308,
    None,
    True,
    "",
    "x",
    "relu",
    [],
    [0],
    {},
    {"x": 1},
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "?"]


def seeds() -> list[bytes]:
    """Small valid files of every kind."""
    torch.manual_seed(0)
    micro = {form: zoo.create_model("repvgg_micro", num_classes=2, width=1 / 64, deploy=form) for form in (True, False)}
    timm = keys.to_foreign(micro[False].state_dict(), "timm")
    official = keys.to_foreign(micro[True].state_dict(), "official")
    with_manifest = save(
        micro[True].state_dict(), {METADATA_KEY: replace(zoo.manifest_of(micro[True]), preprocessing=SMALL).to_json()}
    )
    bare = with_attribute(METADATA_KEY, MANIFEST.to_json())
    return [
        ours(),
        ours(),
        save(timm),
        with_manifest,
        pickled(bare),
        pickled(bare, True),
        pickled(official),
        pickled({"model": official}, True),
    ]


def mutate(data: bytes, rng: random.Random) -> bytes:
    if data[8:9] == b"{" and rng.random() < 0.6:
        return edit_header(data, rng)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        # Structure is at the beginning and at the end; in between are numbers, of which any will do.
        span = min(len(out), rng.choice((len(data), len(data), 600, 64)))
        at = rng.randrange(span) if rng.random() < 0.7 else len(out) - 1 - rng.randrange(span)
        size = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.choice((0, 0, 0, 0, 1, 1, 2, 3, 4, 5)):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"9", b"}", b'"')) * size
            case 2:
                out[at:at] = rng.randbytes(size)
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = out[rng.randrange(len(out)) :][:size]
            case 5:
                del out[at:]
        if len(out) < 2:
            return bytes(out)
    return bytes(out)


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Other values, names or types at some place of the header, or of the manifest in it."""
    (length,) = struct.unpack("<Q", data[:8])
    fields = json.loads(data[8 : 8 + length])
    metadata = fields.get("__metadata__", {})
    if METADATA_KEY in metadata and rng.random() < 0.8:
        manifest = json.loads(metadata[METADATA_KEY])
        spoil(manifest, rng)
        metadata[METADATA_KEY] = json.dumps(manifest)
    else:
        spoil(fields, rng)
    return header(fields, data[8 + length :])


def spoil(tree: Any, rng: random.Random) -> None:
    branch: Any = tree
    while True:
        places: list[Any] = list(branch) if isinstance(branch, dict) else list(range(len(branch)))
        place = rng.choice(places)
        if not isinstance(branch[place], dict | list) or not branch[place] or rng.random() < 0.1:
            break
        branch = branch[place]
    match rng.randrange(5):
        case 0:
            del branch[place]
        case 1 if isinstance(branch, dict):
            branch[rng.choice(("x", "name", place + "x"))] = branch.pop(place)
        case 2 if isinstance(branch, list):
            branch.append(branch[place])
        case 3 if place == "dtype":
            branch[place] = rng.choice(DTYPES)
        case _:
            branch[place] = rng.choice(NASTY)


def fuzz(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Load `count` mutated files; what loads must run. Raises whatever is neither; the file is then left in `folder`."""
    rng, whole = random.Random(seed), seeds()
    counts = {"loaded": 0, "refused": 0}
    path = folder / "mutated"
    for i in range(count):
        path.write_bytes(mutate(whole[i % len(whole)], rng))
        try:
            model = repvgg.load(path)
        except FileError:
            counts["refused"] += 1
            continue
        size = zoo.manifest_of(model).preprocessing.input_size
        if max(size) <= 64:
            with torch.no_grad():
                model(torch.zeros(1, *size, dtype=next(model.parameters()).dtype))
        counts["loaded"] += 1
    return counts


def test_five_thousand_mutated_files(tmp_path: Path) -> None:
    """In a process of its own, so that a crash or a hang is seen as one."""
    command = [sys.executable, __file__, "5000", "1", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["loaded"] + counts["refused"] == 5000
    assert min(counts.values()) > 500, counts  # neither all valid nor all rubbish


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
