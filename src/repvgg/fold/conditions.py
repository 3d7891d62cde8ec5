"""Find what a condition has to be so that a forward does not raise: `assert x.shape[1] == 3`, `if x.shape[1] != 3: raise ...`."""

import dis
import operator
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from torch import fx
from torch.overrides import handle_torch_function, has_torch_function_unary

NOTHING = {"CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN"}  # instructions that do nothing of their own
COMPARED = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@fx.has_side_effect
def demand(value: Any, truth: bool, where: str) -> None:
    """Raise AssertionError where the truth of a value is not this: in a forward that is written anew, in place of its own error."""
    if has_torch_function_unary(value):  # a value of a trace
        handle_torch_function(demand, (value,), value, truth, where)
    elif bool(value) is not truth:
        raise AssertionError(f"the input is not what {where} demands")


def needed_truth(frame: FrameType, asked: Callable[..., Any] | str) -> bool | None:
    """Return what a value, of whose truth this frame asks, has to be so that the frame does not raise at once.

    asked: the function that made the value. None where both outcomes go on, and where it asks for another reason.
    """
    code = [i for i in dis.get_instructions(frame.f_code) if i.opname not in NOTHING]
    at = next(n for n, i in enumerate(code) if i.offset == frame.f_lasti)
    here = code[at]
    compares = here.opname == "COMPARE_OP"  # it asks on behalf of two tuples, or (from Python 3.13 on) of what follows
    jump = at + (compares or here.opname == "TO_BOOL")
    if "JUMP" not in (name := code[jump].opname) or not name.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    there = next(n for n, i in enumerate(code) if i.offset >= code[jump].argval)
    raises = [_raises(frame.f_code, code[start:]) for start in (jump + 1, there)]
    if raises[0] == raises[1]:
        return None
    truth = name.endswith("IF_TRUE") == raises[0]  # it jumps where the other way raises
    return _of_parts(here.argval, truth, asked) if compares else truth


def catches(frame: FrameType) -> bool:
    """Tell whether this frame may catch what the function that it calls raises."""
    return _caught(frame.f_code, frame.f_lasti)


def _of_parts(how: str, truth: bool, asked: Callable[..., Any] | str) -> bool | None:
    """Return what a value has to be for a comparison to come out so, if it is its outcome or that of any part of it."""
    if (how, truth) in (("==", True), ("!=", False)):  # all parts are equal
        return {operator.eq: True, operator.ne: False}.get(asked)  # type: ignore[arg-type]
    return truth if how not in ("==", "!=") and COMPARED.get(how) is asked else None


def _caught(code: CodeType, offset: int) -> bool:
    return any(entry.start <= offset < entry.end for entry in dis.Bytecode(code).exception_entries)  # type: ignore[attr-defined]


def _raises(whole: CodeType, code: list[dis.Instruction]) -> bool:
    """Tell whether the instructions raise, whatever the values are, and nothing in this function catches it."""
    for instruction in code:
        if instruction.opname == "RAISE_VARARGS":
            return not _caught(whole, instruction.offset)
        if "JUMP" in instruction.opname or instruction.opname.startswith(("RETURN", "YIELD", "FOR_ITER", "SEND", "RERAISE")):
            return False
    return False
