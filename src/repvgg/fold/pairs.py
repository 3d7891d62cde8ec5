"""Find a convolution and a batch norm that are siblings in some module's forward, and fold the two."""

from collections import defaultdict

from torch import fx, nn

from repvgg.fold.algebra import compose
from repvgg.fold.as_linear import (
    CONVOLUTIONS,
    NO_STATISTICS,
    UNEVEN,
    as_conv,
    as_linear,
    is_batch_norm,
    main_tensor,
    pads_unevenly,
    resembles_batch_norm,
    split_activation,
    why_unknown,
)
from repvgg.fold.guards import altered, inside
from repvgg.fold.proof import check_part
from repvgg.fold.report import FoldReport
from repvgg.fold.trace import Traces, refuse_lost


def fold_pairs(model: nn.Module, traces: Traces, report: FoldReport, chosen: frozenset[str] | None = None) -> None:
    """Fold each pair in place: the batch norm's only input is that conv, and the conv has no other user.

    chosen: the paths of the convolutions to fold, by default all that can be.
    """
    for conv_path, norm_path in find_pairs(model, traces):
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        if reason := _unfoldable(conv, conv_path, traces) or _unfoldable(norm, norm_path, traces):
            report.left[norm_path] = reason
            continue
        if chosen is not None and conv_path not in chosen:
            continue
        affine, activation = split_activation(norm)
        with inside(norm_path):
            gain = as_linear.read(affine)
        with inside(conv_path):
            folded = compose(as_linear.read(conv), gain)
            report.errors[conv_path] = check_part(nn.Sequential(conv, affine), folded)
            model.set_submodule(conv_path, as_conv(folded, like=main_tensor(conv)))
        model.set_submodule(norm_path, activation)
        report.pairs.append((conv_path, norm_path))
    if report.errors:
        refuse_lost(model, traces, "folded")
    for path, module in model.named_modules():
        if resembles_batch_norm(module):
            report.left.setdefault(path, traces.hidden.get(path, "no convolution feeds this batch norm alone"))


def find_pairs(model: nn.Module, traces: Traces) -> list[tuple[str, str]]:
    """Return the paths of each conv whose output goes to a batch norm and nowhere else, however called, and of that norm."""
    names = {module: path for path, module in model.named_modules()}
    partners: dict[str, set[str | None]] = defaultdict(set)  # by conv the batch norms that follow, by batch norm the convs before
    for parent, path in names.items():

        def called(node: object, parent: nn.Module = parent) -> str | None:
            is_call = isinstance(node, fx.Node) and node.op == "call_module"
            return names[parent.get_submodule(str(node.target))] if is_call else None  # type: ignore[attr-defined]

        for node in (node for graph in traces.graphs.get(path, ()) for node in graph.nodes if node.op == "call_module"):
            here = called(node)
            assert here is not None
            module, source = model.get_submodule(here), called(node.args[0]) if node.args else None
            if resembles_batch_norm(module):
                alone = source is not None and len(node.args[0].users) == 1
                partners[here].add(source if alone else None)
            elif isinstance(module, nn.Conv2d):
                partners[here].add(called(next(iter(node.users))) if len(node.users) == 1 else None)
    return [
        (conv, norm)
        for norm, sources in partners.items()
        if resembles_batch_norm(model.get_submodule(norm))
        for conv in sources
        if conv is not None and isinstance(model.get_submodule(conv), nn.Conv2d) and norm in partners[conv]
        if len(sources) == len(partners[conv]) == 1 or max(traces.uses[conv], traces.uses[norm]) > 1
    ]


def _unfoldable(module: nn.Module, path: str, traces: Traces) -> str | None:
    """Return why this conv or batch norm cannot be half of a pair, if so."""
    cls = type(module).__name__
    if reason := altered(module):
        return f"its {cls} {reason}"
    if type(module) not in CONVOLUTIONS and not is_batch_norm(module):
        return f"its {why_unknown(module)}"
    if isinstance(module, nn.Conv2d) and pads_unevenly(module):
        return f"its {cls} {UNEVEN}"
    if is_batch_norm(module) and module.running_mean is None:
        return f"its {cls} {NO_STATISTICS}"
    reason = traces.why_not_replaced(path)
    return f"its {cls} {reason}" if reason else None
