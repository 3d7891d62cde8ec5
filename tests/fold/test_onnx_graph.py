"""onnx_graph.py: what a graph says is constant, and what it does not."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import apart, kinds, pair
from rounding import REPORTED

from repvgg.fold.onnx import fold_onnx

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


def test_files_that_list_their_tensors_as_inputs(tmp_path: Path) -> None:
    """All did until IR version 4; since, it means that others may be given."""
    file = pair(tmp_path, ir=3, listed=True)
    fold_onnx(file, tmp_path / "b.onnx")
    assert kinds(tmp_path / "b.onnx") == {"Conv": 1, "Relu": 1}
    assert apart(tmp_path / "b.onnx", file, (1, 3, 9, 9)) < REPORTED
    onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
    with pytest.raises(ValueError, match=r"reads v, an input of the graph that has a default: take it out of graph\.input first"):
        fold_onnx(pair(tmp_path, listed=True), tmp_path / "c.onnx")
