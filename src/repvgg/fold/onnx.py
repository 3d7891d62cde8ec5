"""Fold an ONNX file: a model exported in training form by anybody, without its source, comes out in deploy form.

    report = fold_onnx("official_train_form.onnx", "folded.onnx")
    print(report)                                   # what was folded, what was left and why, and the proof

Opset, metadata, names of inputs and outputs, and all other operators stay. Each stretch is proved alone in float64, and the whole
by ONNX Runtime on random inputs, before anything is written.
"""

import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto

from repvgg.disk import FileError, describe
from repvgg.fold.algebra import ReparamError
from repvgg.fold.flow import check as check_stretch
from repvgg.fold.onnx_file import OnnxFile
from repvgg.fold.onnx_graph import OnnxGraph

SIDES = 224  # pixels of an image whose size the file leaves open
SEEDS = (0, 1)
WORSE = 10  # times the original's own rounding: two ways of computing the same may differ by that
CAP = 0.01  # relative rounding beyond which nothing is proved


@dataclass
class OnnxReport:
    """The report of `fold_onnx`: convolutions and batch norms before and after, what went into each stretch, and what was left."""

    convolutions: tuple[int, int] = (0, 0)
    norms: tuple[int, int] = (0, 0)
    stretches: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    part_error: float = 0.0
    error: float = 0.0
    own: float = 0.0
    whole_numbers: bool = False

    def __str__(self) -> str:
        lines = [
            f"convolutions: {self.convolutions[0]} -> {self.convolutions[1]}, batch norms: {self.norms[0]} -> {self.norms[1]}; "
            f"{len(self.stretches)} stretches folded, largest error of one {self.part_error:.1e}"
        ]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        if self.whole_numbers:
            return "\n".join([*lines, f"its outputs are whole numbers, of which {self.error:.2%} differ in ONNX Runtime"])
        lines.append(f"equal in ONNX Runtime: relative error {self.error:.1e} (the original's own rounding {self.own:.1e})")
        return "\n".join(lines)


@torch.no_grad()
def fold_onnx(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> OnnxReport:
    """Write to `target` the model of `source` with each linear stretch as one Conv, proved to compute the same.

    Raises `FileError` for files that are missing, damaged or hostile, or that ONNX Runtime does not run; `ReparamError` where the
    folded model would differ; ValueError where there is nothing to fold. Nothing is written then.
    """
    file = OnnxFile(source)
    if not Path(target).parent.is_dir():
        raise FileError(f"{target}: cannot be written (there is no folder {Path(target).parent})")
    graph, report = OnnxGraph(file), OnnxReport()
    before = _count(graph)
    for stretch in graph.flow.stretches():
        report.part_error = max(report.part_error, check_stretch(stretch))
        graph.write(stretch)
        report.stretches[stretch.target.name] = [v.name for v in stretch.inside]
    report.left = graph.norms | {v.name: why for v, why in graph.flow.left.items()}
    if not report.stretches:
        why = next((f" (the batch norm {name} is left: {why})" for name, why in report.left.items()), "")
        raise ValueError(f"{source}: there is nothing to fold{why}")
    graph.finish()
    report.convolutions, report.norms = zip(before, _count(graph), strict=True)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(dir=Path(target).parent, prefix=".fold-") as folder:
        trial = Path(folder) / "folded.onnx"
        file.write(trial)
        report.error, report.own = _compare(file.path, trial)
        report.whole_numbers = not any(out.type.tensor_type.elem_type in FLOATS for out in graph.graph.output)
    if report.own > CAP:
        raise ReparamError(f"{source}: its own rounding is {report.own:.0e} of its outputs, so nothing can be proved of its fold")
    if not report.error <= max(WORSE * report.own, JUMP if report.whole_numbers else 1e-6):
        raise ReparamError(f"{source}: the folded model differs by {report.error:.1e}, so it was not written; please report this")
    file.write(target)
    return report


def _count(graph: OnnxGraph) -> tuple[int, int]:
    kinds = [node.op_type for node in graph.graph.node]
    return kinds.count("Conv"), kinds.count("BatchNormalization")


# -------------------------------------------------------------------------------------------------------------------- proof


def _compare(source: Path, folded: Path) -> tuple[float, float]:
    """Largest relative error of any output on random inputs; and the original's own rounding: what another order of the same
    operations, and one unit in the last place of the inputs, do to its outputs."""
    levels = onnxruntime.GraphOptimizationLevel
    plain, fast = (_session(source, level) for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL))
    new = _session(folded, levels.ORT_ENABLE_ALL)
    error = own = 0.0
    for seed in SEEDS:
        inputs = _random_inputs(plain, seed)
        nudged = {name: x * (1 + np.finfo(x.dtype).eps).astype(x.dtype) if x.dtype.kind == "f" else x for name, x in inputs.items()}
        wanted = _run(plain, inputs, source)
        own = max(own, _apart(_run(fast, inputs, source), wanted), _apart(_run(plain, nudged, source), wanted))
        error = max(error, _apart(_run(new, inputs, folded), wanted))
    return error, own


def _session(path: Path, level: Any) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = level
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base but this
        raise FileError(f"{path}: ONNX Runtime does not open it, so nothing can be proved ({describe(error)})") from None


def _random_inputs(session: onnxruntime.InferenceSession, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    inputs = {}
    for given in session.get_inputs():
        dtype = TYPES.get(given.type)
        if dtype is None:
            raise FileError(f"its input {given.name} is {given.type}, for which there are no random numbers")
        open_sizes = [2, *[SIDES] * 9] if len(given.shape) == 4 else [2] * len(given.shape)
        shape = [n if isinstance(n, int) and n > 0 else open_sizes[i] for i, n in enumerate(given.shape)]
        if math.prod(shape) > 2**28:
            raise FileError(f"its input {given.name} has {math.prod(shape)} numbers, too many to try")
        kind = np.dtype(dtype).kind
        x = random.standard_normal(shape) if kind == "f" else random.integers(0, 256 if given.type == "tensor(uint8)" else 2, shape)
        inputs[given.name] = x.astype(dtype)
    return inputs


FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
JUMP = 1e-3  # share of whole numbers (classes of pixels) that rounding may change
TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, Any], path: Path) -> list[Any]:
    try:
        found: list[Any] = session.run(None, inputs)
    except Exception as error:
        raise FileError(f"{path}: ONNX Runtime does not run it, so nothing can be proved ({describe(error)})") from None
    return found


def _apart(got: list[Any], wanted: list[Any]) -> float:
    """Return the largest relative error of an output; where all are whole numbers, the share of those that differ."""
    arrays = [(a, b) for a, b in zip(got, wanted, strict=True) if isinstance(b, np.ndarray)]
    floats = [(a, b) for a, b in arrays if b.dtype.kind == "f"]
    if not floats:
        return max((float((a != b).mean()) if a.shape == b.shape else math.inf for a, b in arrays if b.size), default=0.0)
    worst = 0.0
    for a, b in floats:
        if a.shape != b.shape or not np.isfinite(b).all():
            return math.inf
        a, b = a.astype(np.float64), b.astype(np.float64)
        size = float(np.abs(b).max(initial=0))
        off = float(np.abs(a - b).max(initial=0))
        worst = max(worst, off / size if size else off and math.inf)
    return worst
