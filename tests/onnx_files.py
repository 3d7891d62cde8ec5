"""What the tests of ONNX files share: what is in one, what it computes, and a small one that is made by hand."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def run(path: Path, *inputs: np.ndarray[Any, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    found: list[Any] = session.run(None, dict(zip(names, inputs, strict=True)))
    return found


def apart(a: Path, b: Path, shape: tuple[int, ...] = (2, 3, 16, 16)) -> float:
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(run(a, x), run(b, x), strict=True))


def pair(tmp_path: Path, *more: Any, ir: int = 8, listed: bool = False, **tensors: Any) -> Path:
    """A convolution and its batch norm, which is far from the identity, then `more` nodes, from n to y."""
    random = np.random.default_rng(0)
    given: dict[str, Any] = {"w": random.standard_normal((8, 3, 3, 3)), "v": random.uniform(0.3, 2, 8)}
    given |= {name: random.standard_normal(8) for name in ("m", "b")} | tensors
    inits = [numpy_helper.from_array(a.astype(np.float32) if a.dtype.kind == "f" else a, name) for name, a in given.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "v", "b", "m", "v"], ["n"]),
        *more,
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 9, 9])]
    inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in inits] if listed else []
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list("abcd")) for name in ("y", *(n.output[0] for n in more))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, inits),
        opset_imports=[helper.make_opsetid("", 9 if ir < 4 else 13)],
        ir_version=ir,
    )
    onnx.save(model, tmp_path / "a.onnx")
    return tmp_path / "a.onnx"
