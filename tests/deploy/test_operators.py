"""operators.py: a deploy form's body is 3x3 convolutions and ReLU alone, as the files themselves say."""

import json
from pathlib import Path

import pytest
from conftest import randomize
from torch import nn

from repvgg import cli
from repvgg.deploy.engines import ListedOperator, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.deploy.export import Shape, export
from repvgg.deploy.operators import plain_stack, read, summary
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import FAMILY

CONV, RELU = ListedOperator("Conv", (3, 3)), ListedOperator("Relu")


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def model() -> nn.Module:
    net = zoo.create_model("repvgg_micro", num_classes=3, width=0.125)
    randomize(net, (16, 3, 32, 32))
    return zoo.remember(net, Manifest(zoo.manifest_of(net).arch, preprocessing=Preprocessing((3, 32, 32), 32)))


# Tracing the whole family takes a minute.
@pytest.mark.parametrize("name", ["repvgg_a0", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILY if n != "repvgg_a0")])
def test_the_body_of_an_exported_member_is_3x3_and_relu_alone(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    member = reparameterize(zoo.create_model(name, num_classes=3, width=1 / 32).eval())
    (tmp_path / "m.onnx").write_bytes(to_onnx(member, Signature((3, 64, 64))))
    operators = read(tmp_path / "m.onnx")
    depth = 1 + sum(FAMILY[name].depths)
    convolutions = [operator for operator in operators if operator.kernel]
    assert [c.kernel for c in convolutions].count((3, 3)) == depth
    assert max(c.groups for c in convolutions) == FAMILY[name].groups
    if FAMILY[name].squeeze_excite:
        assert summary(operators).startswith("not a plain stack: ")
        return
    assert [operator.name for operator in operators] == ["Conv", "Relu"] * depth + ["ReduceMean", "Gemm"]
    assert plain_stack(operators) == (depth, 2 * depth)
    assert summary(operators) == f"{depth} x (3x3 convolution, ReLU) and no other operator, then ReduceMean, Gemm"


@pytest.mark.parametrize("to", ["openvino", "ncnn", pytest.param("onnx", marks=pytest.mark.slow)])  # the tests beside it read onnx
def test_every_format_tells_the_same(to: str, model: nn.Module, tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino", "ncnn"):
        pytest.importorskip(package)
    operators = read(export(model, to, tmp_path, log=silent))
    depth = 1 + sum(FAMILY["repvgg_micro"].depths)
    assert plain_stack(operators)[0] == depth
    assert [operator.stride for operator in operators if operator.kernel].count((2, 2)) == 5
    assert summary(operators).startswith(f"{depth} x (3x3 convolution, ReLU) and no other operator, then ")


def test_preprocessing_comes_before_the_stack(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    told = summary(read(export(model, "onnx", tmp_path, shape=Shape(pixels=True), log=silent)))
    assert told.startswith("Cast, Sub, Div, then ")
    assert "and no other operator" in told


def test_what_is_no_plain_stack() -> None:
    for operators in (
        [CONV, RELU, CONV],  # a convolution without its ReLU
        [CONV, RELU, ListedOperator("Conv", (1, 1)), RELU],
        [CONV, ListedOperator("Add"), RELU],  # a shortcut, not a bias
        [CONV, RELU, ListedOperator("Add"), CONV, RELU],
        [],
    ):
        assert summary(operators).startswith("not a plain stack")
    assert plain_stack([CONV, ListedOperator("Add", note="bias"), RELU, ListedOperator("Conv", (3, 3), note="with ReLU")]) == (2, 4)
    assert summary([CONV, ListedOperator("Add"), RELU]) == "not a plain stack: 1 Conv 3x3, 1 Add, 1 Relu"


def test_the_command(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ncnn")
    path = export(model, "ncnn", tmp_path, log=silent)
    cli.main(["info", "--graph", str(path)])
    table = capsys.readouterr().out
    assert "Convolution" in table
    assert "and no other operator, then Pooling, InnerProduct" in table
    cli.main(["info", "--graph", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["operators"][0]["kernel"] == [3, 3]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.pt2", "", r"operators are listed of \.onnx, \.xml \(OpenVINO\) and \.param \(ncnn\) files"),
        ("x.onnx", None, "no such file"),
        ("x.onnx", "no protobuf", "cannot be read, it is damaged or of another version"),
        ("x.xml", "<net", "cannot be read, it is damaged or of another version"),
        ("x.param", "7767517\n1 1\nConvolution", "cannot be read, it is damaged or of another version"),
        ("x.param", "hello", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str | None, reason: str, tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino", "ncnn"):
        pytest.importorskip(package)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=reason) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
