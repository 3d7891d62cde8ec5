"""Fold a trained network into its deploy form, exactly.

deploy = reparameterize(model.eval())          # a new module; each folded part verified alone in float64
print(deploy.fold_report)                      # what was folded, what was left and why
print(verify(model, deploy, (3, 224, 224)))    # the whole model, against a float64 reference
"""

import copy

import torch
from torch import nn

from repvgg.fold.as_linear import Branches, as_conv, as_linear, is_foldable, main_tensor, why_unknown
from repvgg.fold.guards import copied, inside, parts, refuse_nonfinite, refuse_train_mode, refuse_uncopyable
from repvgg.fold.proof import check_part
from repvgg.fold.report import FoldReport
from repvgg.fold.stretches import fold_stretches
from repvgg.fold.trace import trace


@torch.no_grad()
def reparameterize(model: nn.Module) -> nn.Module:
    """A new module in deploy form: every foldable block and conv+BN pair of `model` is one convolution with bias.

    Works on any module tree; what cannot be folded stays as it is. `fold_report` of the result lists both. Each folded part
    was compared with the original alone, in float64, on an input made for its channels and kernel. Children that a module names in
    its `training_only` (an auxiliary head) become None. `model` is not changed.

    Raises `ReparamError` if a module is in train mode, a block contains something that is not linear, a parameter is not
    finite, a running variance is not positive, a folded kernel does not fit the parameters' dtype, or the model is compiled.
    """
    refuse_train_mode(model)
    refuse_uncopyable(model)
    for name, parameter in model.named_parameters():
        refuse_nonfinite(name, parameter)
    report = FoldReport()
    deployed = copied(model)
    for module in deployed.modules():
        for name in getattr(module, "training_only", ()):
            setattr(module, name, None)
    traces = trace(deployed)
    folded = _fold_blocks(deployed, "", report, {})
    for path in traces.below(report.blocks):
        del traces.graphs[path]
    folded = fold_stretches(folded, traces, report)
    folded.fold_report = report  # type: ignore[assignment]
    return folded


def _fold_blocks(module: nn.Module, path: str, report: FoldReport, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The convolution that `module` folds into; or, if it is no block, itself with the blocks inside it folded."""
    if module in done:  # one module in two places stays one
        return done[module]
    if is_foldable(module):
        with inside(path):
            m = as_linear.read(module)
            report.errors[path] = check_part(module, m)
            done[module] = as_conv(m, like=main_tensor(module))
        report.blocks.append(path)
        return done[module]
    if isinstance(module, Branches):
        report.left[path] = why_unknown(module)
    done[module] = module
    for name, child in parts(module):
        module._modules[name] = _fold_blocks(child, f"{path}.{name}" if path else name, report, done)
    return module
