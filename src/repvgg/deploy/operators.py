"""What an exported file is made of: the proof that a deploy form is plain.

read("exported/a0.onnx")          # [Operator("Conv", (3, 3), ...), Operator("Relu"), ...]
summary(read("exported/a0.onnx")) # "22 x (3x3 convolution, ReLU) and no other operator, then ReduceMean, Gemm"
"""

import importlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repvgg.deploy import engines
from repvgg.deploy.engines import Operator
from repvgg.deploy.export import FORMATS
from repvgg.deploy.load import SUFFIXES
from repvgg.disk import describe


def read(path: str | os.PathLike[str]) -> list[Operator]:
    """Operators of an exported file, ours or not, in order. Raises ValueError where it cannot be read, or is of a format that does
    not tell."""
    path = Path(path)
    wanted = FORMATS.get(SUFFIXES.get(path.suffix, ""))
    module: Any = None
    if wanted is not None:
        engines.check(wanted.engine, "fp32")
        module = importlib.import_module(f"repvgg.deploy.engines.{wanted.module}")
    if not hasattr(module, "operators"):
        raise ValueError(f"{path}: operators are listed of .onnx, .xml (OpenVINO) and .param (ncnn) files")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        found: list[Operator] = module.operators(path)
    except Exception as error:  # of any runtime
        raise ValueError(
            f"{path}: cannot be read, it is damaged or of another version ({describe(error).splitlines()[0]})"
        ) from None
    return found


def summary(operators: Sequence[Operator]) -> str:
    """One line: whether they are a plain stack, and what there is beside it."""
    first = next((i for i, operator in enumerate(operators) if operator.kernel), 0)
    depth, end = plain_stack(operators, first)
    before, after = operators[:first], operators[end:]
    if depth and not any(operator.kernel for operator in after):
        words = [f"{_listed(before)}, then "] if before else []
        words.append(f"{depth} x (3x3 convolution, ReLU) and no other operator")
        return "".join(words) + (f", then {_listed(after)}" if after else "")
    counted = Counter(_named(operator) for operator in operators)
    return "not a plain stack: " + ", ".join(f"{count} {name}" for name, count in counted.most_common())


def plain_stack(operators: Sequence[Operator], first: int = 0) -> tuple[int, int]:
    """How many 3x3 convolutions, each with its bias and a ReLU and nothing between, follow from number `first` on; and the
    number of the operator after them."""
    depth = 0
    while first < len(operators) and operators[first].kernel == (3, 3):
        after = first + 1
        if after < len(operators) and operators[after].note == "bias":
            after += 1
        if operators[first].note != "with ReLU":
            if after == len(operators) or operators[after].name.lower() != "relu":
                break
            after += 1
        first, depth = after, depth + 1
    return depth, first


def _named(operator: Operator) -> str:
    return " ".join([operator.name, "x".join(map(str, operator.kernel))]).rstrip()


def _listed(operators: Sequence[Operator]) -> str:
    return ", ".join(_named(operator) for operator in operators)
