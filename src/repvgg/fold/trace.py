"""See how the modules of a tree call each other, by tracing each module's own forward with its children as leaves."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import resembles_batch_norm
from repvgg.fold.guards import parts


@dataclass
class Pairs:
    """Paths of every conv whose output goes to a batch norm and nowhere else, and of that batch norm."""

    pairs: list[tuple[str, str]] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)  # calls seen, or places where it is registered
    hidden: dict[str, str] = field(default_factory=dict)  # modules called by a parent whose forward cannot be traced


def find_pairs(model: nn.Module) -> Pairs:
    """Traces the forward of every module in the tree by itself, on a copy (a forward may store what it sees)."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    names = {module: path for path, module in model.named_modules()}
    found = Pairs()
    for parent, path in names.items():
        if calls_nothing(parent):
            continue
        try:
            graph = _SiblingTracer().trace(parent, _defaults(parent))
        except Exception:
            found.hidden.update({names[child]: path for child in _called_by(parent)})
            continue
        for node in graph.nodes:
            if node.op == "get_attr" and "." in node.target:  # a child's weight used by hand counts as a call of that child
                found.uses[names[parent.get_submodule(node.target.rpartition(".")[0])]] += 1
            elif node.op == "call_module":
                module = parent.get_submodule(str(node.target))
                found.uses[names[module]] += 1
                source = node.args[0] if node.args else None
                if resembles_batch_norm(module) and isinstance(source, fx.Node) and source.op == "call_module":
                    conv = parent.get_submodule(str(source.target))
                    if isinstance(conv, nn.Conv2d) and len(source.users) == 1:
                        found.pairs.append((names[conv], names[module]))
    found.uses |= Counter(names[child] for parent in names for _, child in parts(parent))
    return found


def refuse_lost_pairs(model: nn.Module, found: Pairs, done: str) -> None:
    """Raise `ReparamError` naming a parent whose forward could be traced when `found` was, and now, its parts `done`, cannot."""
    if broken := set(find_pairs(model).hidden.values()) - set(found.hidden.values()):
        raise ReparamError(f"uses a {done} conv or batch norm in another way than calling its own child of that name", min(broken))


def _called_by(parent: nn.Module) -> Iterator[nn.Module]:
    """Its children, and in place of a ModuleList or ModuleDict those that it holds."""
    for _, child in parts(parent):
        if parts(child) and calls_nothing(child):
            yield from _called_by(child)
        else:
            yield child


def calls_nothing(module: nn.Module) -> bool:
    """It has no children, or no forward (a ModuleList)."""
    return not parts(module) or type(module).forward is nn.Module.forward


class _SiblingTracer(fx.Tracer):
    """Traces one module's own forward; every module it calls is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
