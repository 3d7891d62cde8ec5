"""Fold the linear stretches of a module tree, wherever its forwards can be read."""

from torch import nn

from repvgg.fold.as_linear import resembles_batch_norm
from repvgg.fold.flow import check
from repvgg.fold.guards import inside
from repvgg.fold.report import FoldReport
from repvgg.fold.torch_graph import ModuleFlow
from repvgg.fold.torch_write import ModuleWriter
from repvgg.fold.trace import Traces

UNSEEN = "its parent's forward cannot be traced"


def fold_stretches(model: nn.Module, traces: Traces, report: FoldReport, chosen: frozenset[str] | None = None) -> nn.Module:
    """Return the model with a convolution in the place of each linear stretch; what is left of its batch norms is reported.

    chosen: the first operators of the stretches to fold, by default of all.
    """
    tops = [path for path in traces.graphs if not any(path.startswith(f"{p}." if p else p) and p != path for p in traces.graphs)]
    left: dict[str, str] = {}
    done: set[str] = set()
    while tops:
        top = tops.pop(0)
        if top in done or len(traces.graphs[top]) > 1:
            continue
        done.add(top)
        read = ModuleFlow(model, traces, top)
        tops += read.apart
        writer = ModuleWriter(model, read)
        read.flow.refuse = writer.refuse
        for stretch in read.flow.stretches():
            names = [writer.name_of(v) for v in stretch.inside]
            if chosen is not None and names[0] not in chosen:
                continue
            with inside(names[0]):
                error = check(stretch)
            path = writer.write(stretch)
            report.stretches[path] = names
            report.errors[path] = error
        left |= read.norms | {writer.name_of(v): why for v, why in read.flow.left.items()}
        model = writer.finish()
    for path, module in model.named_modules():
        if resembles_batch_norm(module):
            report.left.setdefault(path, left.get(path) or traces.hidden.get(path, UNSEEN))
    return model
