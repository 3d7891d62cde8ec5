"""fold/onnx*.py: strangers' files fold, stay what they were around it, and are refused where they are damaged or hostile."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import randomize
from official import DEPTHS, Official
from onnx import TensorProto, helper, numpy_helper
from onnx_files import apart, kinds
from rounding import REPORTED
from torch import Tensor, nn

from repvgg.disk import FileError
from repvgg.fold import onnx_file
from repvgg.fold.algebra import ReparamError
from repvgg.fold.blocks import BLOCKS
from repvgg.fold.onnx import fold_onnx
from repvgg.fold.onnx_graph import OnnxGraph

Make = Callable[..., Path]


def exported(model: nn.Module, path: Path, shape: tuple[int, ...] = (2, 3, 16, 16), dynamo: bool = False) -> Path:
    """In training form, as a stranger would with `training=PRESERVE` and no constant folding."""
    model = randomize(model, (8, *shape[1:]))
    if dynamo:
        torch.onnx.export(model, (torch.randn(shape),), path, dynamo=True, optimize=False, external_data=False, verbose=False)
        return path
    torch.onnx.export(
        model,
        (torch.randn(shape),),
        path,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
        opset_version=17,
    )
    return path


pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Branches that meet, a layer scale, a concatenation, a batch norm before a convolution, a side reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.a, self.b, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.randn(8, 1, 1))
        self.left, self.right, self.both = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(8)
        self.before, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.alone = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        x = (self.a(x) + self.b(x) + self.bn(x) * self.gamma).relu()
        x = self.both(torch.cat([self.left(x), self.right(x)], 1)).relu()
        x = self.head(self.before(x))
        return self.alone(x.relu()), x


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_network_of_every_sort_folds(tmp_path: Path, dynamo: bool) -> None:
    file, folded = exported(Net(), tmp_path / "a.onnx", dynamo=dynamo), tmp_path / "b.onnx"
    report = fold_onnx(file, folded)
    assert (kinds(folded)["Conv"], kinds(folded)["BatchNormalization"], kinds(folded)["Concat"]) == (5, 1, 1)
    assert report.convolutions == (6, 5)
    assert report.norms == (5, 1)
    assert list(report.left.values()) == ["a Relu comes before it, and it is read from outside"]
    assert apart(folded, file) < REPORTED
    onnx.checker.check_model(str(folded), full_check=True)


UNKNOWN_TO_THE_EXPORTER = ("relu_in_branch", "dirac", "trivial", "dbb")  # it refuses kernels that are computed


@pytest.mark.parametrize("block", [b for b in BLOCKS if b not in UNKNOWN_TO_THE_EXPORTER])
def test_every_block_folds_into_one_convolution(tmp_path: Path, block: str) -> None:
    file, folded = exported(nn.Sequential(BLOCKS[block](3, 3)), tmp_path / "a.onnx"), tmp_path / "b.onnx"
    fold_onnx(file, folded)
    assert kinds(folded) == {"Conv": 1}
    assert apart(folded, file) < REPORTED


def test_opset_names_and_metadata_stay(tmp_path: Path) -> None:
    file = exported(Net(), tmp_path / "a.onnx")
    model = onnx.load(file)
    model.metadata_props.add(key="who", value="a stranger")
    model.producer_name, model.doc_string = "them", "theirs"
    onnx.save(model, file)
    fold_onnx(file, tmp_path / "b.onnx")
    folded = onnx.load(tmp_path / "b.onnx")
    assert folded.opset_import == model.opset_import
    assert folded.metadata_props == model.metadata_props
    assert (folded.producer_name, folded.doc_string, folded.ir_version) == ("them", "theirs", model.ir_version)
    assert (folded.graph.input, folded.graph.output) == (model.graph.input, model.graph.output)
    assert {i.name for i in folded.graph.initializer} <= {name for node in folded.graph.node for name in node.input}


def one_conv(tmp_path: Path, **attributes: Any) -> Path:
    """Convolution and batch norm, written by hand."""
    random = np.random.default_rng(0)
    weights = {"w": (4, 3, 3, 3), "scale": (4,), "shift": (4,), "mean": (4,), "var": (4,)}
    tensors = [numpy_helper.from_array(random.uniform(0.5, 1, s).astype(np.float32), n) for n, s in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], **attributes),
        helper.make_node("BatchNormalization", ["y", "scale", "shift", "mean", "var"], ["z"]),
        helper.make_node("Relu", ["z"], ["out"]),
    ]
    info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", ["n", 3, "h", "w"]), ("out", ["n", 4, "oh", "ow"]))
    ]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "one.onnx")
    return tmp_path / "one.onnx"


@pytest.mark.parametrize(
    "geometry",
    [
        {"pads": [0, 0, 1, 1], "strides": [2, 2]},
        {"pads": [2, 1, 0, 1], "dilations": [2, 1]},
        {"auto_pad": "SAME_UPPER"},
        {"auto_pad": "VALID"},
    ],
)
def test_uneven_padding_is_kept(tmp_path: Path, geometry: dict[str, Any]) -> None:
    file = one_conv(tmp_path, **geometry)
    fold_onnx(file, tmp_path / "b.onnx")
    assert kinds(tmp_path / "b.onnx") == {"Conv": 1, "Relu": 1}
    assert apart(tmp_path / "b.onnx", file) < REPORTED


def test_what_a_branch_reads_from_outside_stays(tmp_path: Path) -> None:
    file = one_conv(tmp_path)
    model = onnx.load(file)
    value = helper.make_tensor_value_info("o", TensorProto.FLOAT, ["n", 4, "oh", "ow"])
    body = helper.make_graph([helper.make_node("Identity", ["y"], ["o"])], "b", [], [value])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["second"], then_branch=body, else_branch=body))
    model.graph.output.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, ["n", 4, "oh", "ow"]))
    onnx.save(model, file)
    with pytest.raises(ValueError, match="there is nothing to fold"):
        fold_onnx(file, tmp_path / "b.onnx")


def test_external_data_stays_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    plain = exported(Net(), tmp_path / "a.onnx")
    file, folded = tmp_path / "in" / "a.onnx", tmp_path / "out" / "b.onnx"
    onnx.save(onnx.load(plain), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    fold_onnx(file, folded)
    monkeypatch.setattr(onnx_file, "BESIDE", 16)
    fold_onnx(file, folded)
    (beside,) = folded.parent.glob("*.data")  # that of the first time is gone
    assert beside.stat().st_size > 1000
    assert apart(folded, plain) < REPORTED
    fold_onnx(plain, tmp_path / "c.onnx")
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)  # as if it were more than a protobuf holds
    fold_onnx(plain, tmp_path / "out" / "d.onnx")
    assert len(list(folded.parent.glob("d.onnx.*.data"))) == 1
    assert apart(tmp_path / "out" / "d.onnx", tmp_path / "c.onnx") == 0


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "link", ""])
def test_external_data_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 10_000)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(one_conv(tmp_path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    (tmp_path / "in" / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match="outside of the model's folder"):
        fold_onnx(tmp_path / "in" / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def grow(model: Any) -> None:
    model.graph.initializer[0].dims[0] = 1 << 40


def shrink_typed(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0, 2.0])


def negative(model: Any) -> None:
    model.graph.initializer[0].dims[0] = -4


def unknown_operator(model: Any) -> None:
    model.graph.node[0].op_type = "Convolve"


def dangling(model: Any) -> None:
    model.graph.node[1].input[0] = "nobody"


def damaged_variance(model: Any) -> None:
    model.graph.initializer[4].CopyFrom(numpy_helper.from_array(-np.ones(4, np.float32), "var"))


def training(model: Any) -> None:
    model.graph.node[1].attribute.add(name="training_mode", i=1, type=onnx.AttributeProto.INT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (grow, "says .* bytes and holds"),
        (shrink_typed, "says 108 numbers and holds fewer"),
        (negative, "negative size"),
        (unknown_operator, "not a valid ONNX model"),
        (dangling, "not a valid ONNX model|nobody"),
        (damaged_variance, "variance that is not positive"),
        (training, "nothing to fold .*is in training mode|not a valid ONNX model"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, change: Callable[[Any], None], words: str) -> None:
    file = one_conv(tmp_path)
    model = onnx.load(file)
    change(model)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=words) as refused:
        fold_onnx(file, tmp_path / "b.onnx")
    assert "\n" not in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.onnx"]


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(FileError, match="is damaged, or is no ONNX file"):
        fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    with pytest.raises(FileError, match="no such file"):
        fold_onnx(tmp_path / "missing.onnx", tmp_path / "b.onnx")


def test_a_wrong_fold_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of the whole looks at the file, so what goes wrong between a stretch and its tensors is found."""
    file = one_conv(tmp_path)
    right = OnnxGraph.write

    def wrong(self: Any, stretch: Any) -> None:
        stretch.map.kernel[0, 0, 0, 0] *= 1.001
        right(self, stretch)

    monkeypatch.setattr(OnnxGraph, "write", wrong)
    with pytest.raises(ReparamError, match=r"differs by .* so it was not written"):
        fold_onnx(file, tmp_path / "b.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.onnx"]


@pytest.mark.parametrize("kind", ["a0", "plus"])
def test_the_official_networks_fold_to_one_convolution_a_layer(tmp_path: Path, kind: str) -> None:
    """Their training form, exported by somebody; besides, the gates of RepVGGplus have two 1x1 each."""
    layers = 1 + sum(DEPTHS[kind])
    file, folded = exported(Official(kind, width=0.1), tmp_path / "a.onnx", (2, 3, 32, 32)), tmp_path / "b.onnx"
    assert kinds(file)["BatchNormalization"] > 2 * layers
    report = fold_onnx(file, folded)
    assert kinds(folded)["BatchNormalization"] == 0
    assert kinds(folded)["Conv"] == layers * (3 if kind == "plus" else 1)
    assert not report.left
    assert apart(folded, file, (2, 3, 32, 32)) < REPORTED


@pytest.mark.slow
@pytest.mark.parametrize(("name", "convolutions"), [("repvgg_a0", 22), ("mobileone_s0", 43)])
def test_networks_of_timm_fold_as_far_as_timm_folds_them(tmp_path: Path, name: str, convolutions: int) -> None:
    timm = pytest.importorskip("timm")
    file, folded = exported(timm.create_model(name), tmp_path / "a.onnx", (2, 3, 64, 64)), tmp_path / "b.onnx"
    fold_onnx(file, folded)
    assert kinds(folded)["Conv"] == convolutions
    assert kinds(folded)["BatchNormalization"] == 0


def test_a_wrong_fold_of_whole_numbers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a segmenter that ends in its classes."""

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(1)  # type: ignore[no-any-return]

    file = exported(Classes(), tmp_path / "a.onnx")
    fold_onnx(file, tmp_path / "b.onnx")
    right = OnnxGraph.write

    def wrong(self: Any, stretch: Any) -> None:
        stretch.map.kernel[0] *= -1
        right(self, stretch)

    monkeypatch.setattr(OnnxGraph, "write", wrong)
    with pytest.raises(ReparamError, match=r"differs by .* so it was not written"):
        fold_onnx(file, tmp_path / "c.onnx")


def test_tensors_beside_another_file_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets in a name are no pattern."""
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    other = tmp_path / "b1.onnx.000000000000.data"
    other.write_bytes(b"theirs")
    fold_onnx(exported(Net(), tmp_path / "a.onnx"), tmp_path / "b[1].onnx")
    assert other.read_bytes() == b"theirs"
