"""onnx_graph.py: what a graph says is constant, and what it does not."""

import re
import resource
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import apart, kinds, pair
from rounding import REPORTED

from repvgg.fold.algebra import ReparamError
from repvgg.fold.flow import check
from repvgg.fold.onnx import fold_onnx
from repvgg.fold.onnx_file import OnnxFile
from repvgg.fold.onnx_graph import OnnxGraph

CONSTANT: dict[str, tuple[list[str], dict[str, Any]]] = {
    "Conv": (["k", "w"], {}),
    "Split": (["k", "s"], {"axis": 1}),
    "Pad": (["k", "p"], {}),
    "AveragePool": (["k"], {"kernel_shape": [2, 2]}),
}


@pytest.mark.parametrize("operator", CONSTANT)
def test_a_linear_operator_on_a_constant_is_none(tmp_path: Path, operator: str) -> None:
    inputs, attributes = CONSTANT[operator]
    node = helper.make_node(operator, inputs, ["z", "z2"] if operator == "Split" else ["z"], **attributes)
    known = {"k": np.ones((1, 3, 5, 5)), "s": np.array([1, 2]), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    given: dict[str, Any] = {name: known[name] for name in inputs if name in known}
    file = pair(tmp_path, node, **given)
    fold_onnx(file, tmp_path / "b.onnx")
    assert kinds(tmp_path / "b.onnx") == Counter(kinds(file)) - Counter({"BatchNormalization": 1})
    assert apart(tmp_path / "b.onnx", file, (1, 3, 9, 9)) < REPORTED


SIDE = np.ones(100_000, np.float32)
HOSTILE: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "a product of two long constants": (
        [helper.make_node("Mul", ["a", "row"], ["p"]), helper.make_node("Gather", ["n", "p"], ["z"], axis=1)],
        {"a": SIDE[:, None], "row": SIDE[None]},
    ),
    "a constant expanded by another": (
        [helper.make_node("Expand", ["a", "e"], ["p"])],
        {"a": SIDE[:, None], "e": np.array([1, 100_000])},
    ),
    "a million rows of a thousand": (
        [helper.make_node("Gather", ["a", "e"], ["p"])],
        {"a": np.ones((1000, 1000), np.float32), "e": np.zeros(1_000_000, np.int64)},
    ),
    "a constant behind itself": ([helper.make_node("Concat", ["a"] * 50_000, ["p"], axis=0)], {"a": SIDE}),
    "two milliards of channels": (
        [helper.make_node("Slice", ["n", "s", "e", "o"], ["p"])],
        {"s": np.array([0]), "e": np.array([2_147_483_646]), "o": np.array([1])},
    ),
    "a part of a billion channels": ([helper.make_node("Split", ["n", "e"], ["p"], axis=1)], {"e": np.array([2**40])}),
    "a window of a milliard": ([helper.make_node("AveragePool", ["n"], ["p"], kernel_shape=[40_000, 40_000])], {}),
    "a border of a hundred thousand": (
        [helper.make_node("Pad", ["n", "e"], ["p"])],
        {"e": np.array([0, 0, 100_000, 100_000] * 2)},
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_small_file_does_not_ask_for_all_memory(kind: str, tmp_path: Path) -> None:
    nodes, tensors = HOSTILE[kind]
    path = pair(tmp_path, *nodes, **tensors)
    held = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + (600 << 20), held[1]))
    try:
        graph = OnnxGraph(OnnxFile(path))
        for stretch in graph.flow.stretches():
            with suppress(ReparamError):
                check(stretch)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, held)
    assert graph.constant("p") is None


def test_files_that_list_their_tensors_as_inputs(tmp_path: Path) -> None:
    """All did until IR version 4; since, it means that others may be given."""
    file = pair(tmp_path, ir=3, listed=True)
    fold_onnx(file, tmp_path / "b.onnx")
    assert kinds(tmp_path / "b.onnx") == {"Conv": 1, "Relu": 1}
    assert apart(tmp_path / "b.onnx", file, (1, 3, 9, 9)) < REPORTED
    onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
    with pytest.raises(ValueError, match=r"reads v, an input of the graph that has a default: take it out of graph\.input first"):
        fold_onnx(pair(tmp_path, listed=True), tmp_path / "c.onnx")
