"""Fold the linear stretches of a module tree, wherever its forwards can be read."""

from torch import nn

from repvgg.fold.as_linear import resembles_batch_norm
from repvgg.fold.flow import check
from repvgg.fold.guards import inside
from repvgg.fold.report import FoldReport
from repvgg.fold.torch_graph import ModuleFlow
from repvgg.fold.torch_trace import see_calls
from repvgg.fold.torch_write import ModuleWriter


def fold_stretches(model: nn.Module, report: FoldReport) -> nn.Module:
    """Put a convolution in the place of each linear stretch of `model`; what is left of its batch norms, and why, is reported."""
    calls = see_calls(model)
    names = {module: path for path, module in model.named_modules()}
    tops = [path for path in ["", *names.values()] if path in calls.graphs and (not path or path in calls.hidden)]
    left: dict[str, str] = {}
    done: set[str] = set()
    while tops:
        top = tops.pop(0)
        if top in done:
            continue
        done.add(top)
        read = ModuleFlow(model, calls, top, names)
        tops += read.apart
        writer = ModuleWriter(model, read)
        read.flow.refuse = writer.refuse
        for stretch in read.flow.stretches():
            ins = [path for v in stretch.inside if (path := writer.name_of(v))]
            with inside(ins[0]):
                error = check(stretch)
            path = writer.write(stretch)
            report.stretches[path] = ins
            report.errors[path] = error
        left |= read.norms | {read.places[v].path or v.name: why for v, why in read.flow.left.items()}
        model = writer.finish()
    for path, module in model.named_modules():
        if resembles_batch_norm(module):
            report.left[path] = left.get(path) or calls.hidden.get(path) or "its parent's forward cannot be traced"
    return model
