"""Fold a trained network into its deploy form, exactly.

deploy = reparameterize(model.eval(), images)  # a new module; each folded part verified alone in float64, and the whole on `images`
print(deploy.fold_report)                      # what was folded, what was left and why
print(verify(model, deploy, (3, 224, 224)))    # the whole model, against a float64 reference
"""

from typing import Any, TypeVar, overload

import torch
from torch import nn

from repvgg.fold.as_linear import Branches, as_conv, as_linear, is_foldable, main_tensor, why_unknown
from repvgg.fold.call import Call
from repvgg.fold.guards import (
    copied,
    inside,
    parts,
    refuse_nonfinite,
    refuse_train_mode,
    refuse_uncopyable,
    refuse_without_numbers,
    refuse_wrapper,
)
from repvgg.fold.proof import check_part
from repvgg.fold.report import Folded, FoldReport
from repvgg.fold.seen import Traces
from repvgg.fold.stretches import fold_stretches
from repvgg.fold.trace import trace
from repvgg.fold.whole import as_inputs, check_whole, example_of

F = TypeVar("F", bound=Folded)


@overload
def reparameterize(model: F, example: Any = None) -> F: ...
@overload
def reparameterize(model: nn.Module, example: Any = None) -> Folded: ...
@torch.no_grad()
def reparameterize(model: nn.Module, example: Any = None) -> nn.Module:
    """Return a new module in deploy form: every foldable block and linear stretch of `model` is one convolution.

    Works on any module tree; what cannot be folded stays as it is. `fold_report` of the result lists both. Each folded part
    was compared with the original alone, in float64, on an input made for its channels and kernel. Children that a module names in
    its `training_only` (an auxiliary head) become None. `model` is not changed.

    The model is followed as it is called with its required arguments, or as `example` calls it. Where it takes others besides, its
    own forward is not written anew. Other methods than `forward` are not followed.

    example: an input of the model, or a tuple of its arguments; with it the whole is compared with the original as well. A model of
    ours needs none, it knows its input size.

    Raises `ReparamError` if a module is in train mode, a block contains something that is not linear, a parameter is not
    finite or has no numbers yet, a running variance is negative, a folded kernel does not fit the parameters' dtype, the model is
    compiled or holds what cannot be copied, or the folded model computes something else than the original.
    """
    refuse_wrapper(model)
    refuse_train_mode(model)
    refuse_uncopyable(model)
    refuse_without_numbers(model)
    for name, parameter in model.named_parameters():
        refuse_nonfinite(name, parameter)
    inputs = example_of(model) if example is None else as_inputs(example)
    call = None if example is None else Call.by_example(as_inputs(example))
    folded, report = _fold(model, call)
    done = [*report.blocks, *(names[0] for names in report.stretches.values())]
    if inputs is not None and done:
        report.whole = check_whole(model, folded, inputs, done, lambda chosen: _fold(model, call, chosen)[0])
    folded.fold_report = report  # type: ignore[assignment]
    return folded


def _fold(model: nn.Module, call: Call | None, chosen: frozenset[str] | None = None) -> tuple[nn.Module, FoldReport]:
    """Return a folded copy. call: how it is called, if that is known. chosen: the blocks, and the first operators of stretches, to
    fold; by default all."""
    report = FoldReport()
    deployed = copied(model)
    for module in deployed.modules():
        for name in getattr(module, "training_only", ()):
            setattr(module, name, None)
    traces = trace(deployed, call)
    report.untraceable = traces.untraceable.get("", "")
    folded = _Blocks(traces, report, chosen).fold(deployed, "")
    for path in traces.below(report.blocks):
        del traces.graphs[path]
    return fold_stretches(folded, traces, report, chosen), report


class _Blocks:
    """Fold the blocks of a tree, in place."""

    def __init__(self, traces: Traces, report: FoldReport, chosen: frozenset[str] | None) -> None:
        self.traces, self.report, self.chosen = traces, report, chosen
        self.done: dict[nn.Module, nn.Module] = {}

    def fold(self, module: nn.Module, path: str) -> nn.Module:
        """Return the convolution that `module` folds into; or, if it is no block, itself with the blocks inside it folded."""
        if module in self.done:  # one module in two places stays one
            return self.done[module]
        self.done[module] = module
        if is_foldable(module) and self._may_fold(path):
            with inside(path):
                m = as_linear.read(module)
                self.report.errors[path] = check_part(module, m)
                self.done[module] = as_conv(m, like=main_tensor(module))
            self.report.blocks.append(path)
            return self.done[module]
        if isinstance(module, Branches) and not is_foldable(module):
            self.report.left[path] = why_unknown(module)
        for name, child in parts(module):
            module._modules[name] = self.fold(child, f"{path}.{name}" if path else name)
        return module

    def _may_fold(self, path: str) -> bool:
        """Tell whether a block may fold. It declares what it computes, so not all its uses must be seen; none may be of a part."""
        if reason := self.traces.exposed.get(path):
            self.report.left[path] = f"is not only called as a whole: {reason}"
        return reason is None and (self.chosen is None or path in self.chosen)
