"""Fold the linear stretches of a module tree, wherever its forwards can be read."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.fold.as_linear import resembles_batch_norm
from repvgg.fold.flow import Flow, Stretch, check
from repvgg.fold.guards import inside
from repvgg.fold.report import FoldReport
from repvgg.fold.seen import Traces
from repvgg.fold.torch_graph import ModuleFlow
from repvgg.fold.torch_write import ModuleWriter
from repvgg.fold.trace import refuse_lost
from repvgg.fold.transposed import fold_transposed

UNSEEN = "its parent's forward cannot be traced"


def fold_stretches(model: nn.Module, traces: Traces, report: FoldReport, chosen: frozenset[str] | None = None) -> nn.Module:
    """Return the model with a convolution in the place of each linear stretch; what is left of its batch norms is reported.

    chosen: the first operators of the stretches to fold, by default of all.
    """
    left: dict[str, str] = {}
    for read in _flows(model, traces):
        writer = ModuleWriter(model, read)
        read.flow.refuse = writer.refuse
        found = read.flow.stretches()
        if chosen is not None:
            found = _with_all_parts(read.flow, [s for s in found if _names(writer, s)[0] in chosen])
        for stretch in found:
            names = _names(writer, stretch)
            with inside(names[0]):
                error = check(stretch)
            path = writer.write(stretch)
            report.stretches[path] = names
            report.errors[path] = error
        left |= read.norms | {writer.name_of(v): why for v, why in read.flow.left.items()}
        model = writer.finish()
        for names, error in fold_transposed(model, read, chosen):
            report.stretches[names[0]], report.errors[names[0]] = names, error
    refuse_lost(model, traces, "folded")
    for path, module in model.named_modules():
        if resembles_batch_norm(module) or isinstance(module, _BatchNorm):
            report.left.setdefault(path, left.get(path) or traces.hidden.get(path) or _why_not(module, path, traces))
    return model


def _names(writer: ModuleWriter, stretch: Stretch) -> list[str]:
    return [writer.name_of(v) for v in stretch.inside if v.operator and v.operator.kind != "same"]


def _with_all_parts(flow: Flow, found: list[Stretch]) -> list[Stretch]:
    """Leave out stretches with a part of a batch norm of which another part is not folded."""
    inside = {v for stretch in found for v in stretch.inside}
    torn = {part for norm in flow.fallen for part in norm.inputs if not inside.issuperset(norm.inputs)}
    kept = [stretch for stretch in found if torn.isdisjoint(stretch.inside)]
    return kept if len(kept) == len(found) else _with_all_parts(flow, kept)


def _why_not(norm: nn.Module, path: str, traces: Traces) -> str:
    parent = next((p for p in _above(path) if p in traces.graphs), None)
    if parent is not None and len(traces.graphs[parent]) > 1:
        return f"{parent or 'its network'} goes {len(traces.graphs[parent])} ways, which its input decides"
    if resembles_batch_norm(norm):
        return UNSEEN
    return f"a {type(norm).__name__}: only those of maps [N, C, H, W] and of features [N, C] are folded"


def _above(path: str) -> Iterator[str]:
    """Yield the modules that hold this one, the innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def partners(model: nn.Module, traces: Traces) -> dict[str, str]:
    """Return the path of each convolution whose output goes to a batch norm and nowhere else -> that of the batch norm."""
    found = {}
    for read in _flows(model, traces):
        for v in read.flow.values:
            if v.is_norm and (conv := v.inputs[0]).operator is not None and conv.operator.kind == "convolution":
                paths = read.places[conv].path, read.places[v].path
                alone = read.flow.readers[conv] == [v] and conv not in read.flow.outputs
                if alone and None not in paths and read.owners([conv, v])[-1] not in traces.open:
                    found[paths[0]] = paths[1]
    return found  # type: ignore[return-value]


def _flows(model: nn.Module, traces: Traces) -> Iterator[ModuleFlow]:
    """The computation of the whole, and of each module that is seen apart: because it is called in several places, say."""
    todo = [path for path in traces.graphs if not any(p != path and (not p or path.startswith(f"{p}.")) for p in traces.graphs)]
    done: set[str] = set()
    while todo:
        path = todo.pop(0)
        if path in done:
            continue
        done.add(path)
        if len(traces.graphs[path]) == 1:
            read = ModuleFlow(model, traces, path)
            yield read
            todo += read.apart
        else:  # what it calls is read all the same
            names = {module: name for name, module in model.named_modules()}
            called = (node.target for graph in traces.graphs[path] for node in graph.nodes if node.op == "call_module")
            inner = (names[model.get_submodule(path).get_submodule(str(target))] for target in called)
            todo += [name for name in dict.fromkeys(inner) if name in traces.graphs]
