"""Operators that an exported file is made of: the proof that a deploy form is plain.

read("exported/a0.onnx")          # [ListedOperator("Conv", (3, 3), ...), ListedOperator("Relu"), ...]
summary(read("exported/a0.onnx")) # "22 x (3x3 convolution, ReLU) and no other operator, then ReduceMean, Gemm"
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from repvgg.deploy import engines
from repvgg.deploy.engines import ListedOperator
from repvgg.deploy.formats import FORMATS, SUFFIXES
from repvgg.disk import in_a_line


def read(path: str | os.PathLike[str]) -> list[ListedOperator]:
    """Return the operators of an exported file, ours or not, in order.

    Raises ValueError where it cannot be read, or is of a format that does not tell.
    """
    path = Path(path)
    untold = f"{path}: operators are listed of .onnx, .xml (OpenVINO) and .param (ncnn) files"
    if path.suffix not in SUFFIXES:
        raise ValueError(untold)
    wanted = FORMATS[SUFFIXES[path.suffix]]
    engines.check(wanted.engine, "fp32")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        found = engines.runtime(wanted.module).operators(path)
    except Exception as error:  # of any runtime
        reason = in_a_line(error)
        raise ValueError(f"{path}: cannot be read, it is damaged or of another version ({reason})") from None
    if found is None:
        raise ValueError(untold)
    return found


def summary(operators: Sequence[ListedOperator]) -> str:
    """Say in one line whether the operators are a plain stack, and what there is beside it."""
    first = next((i for i, operator in enumerate(operators) if operator.kernel), 0)
    depth, end = plain_stack(operators, first)
    before, after = operators[:first], operators[end:]
    if depth and not any(operator.kernel for operator in after):
        words = [f"{_listed(before)}, then "] if before else []
        words.append(f"{depth} x (3x3 convolution, ReLU) and no other operator")
        return "".join(words) + (f", then {_listed(after)}" if after else "")
    counted = Counter(_named(operator) for operator in operators)
    return "not a plain stack: " + ", ".join(f"{count} {name}" for name, count in counted.most_common())


def plain_stack(operators: Sequence[ListedOperator], first: int = 0) -> tuple[int, int]:
    """Return how many 3x3 convolutions, each with its bias and a ReLU and nothing between, follow from number `first` on; and the
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


def _named(operator: ListedOperator) -> str:
    return " ".join([operator.name, "x".join(map(str, operator.kernel))]).rstrip()


def _listed(operators: Sequence[ListedOperator]) -> str:
    return ", ".join(_named(operator) for operator in operators)
