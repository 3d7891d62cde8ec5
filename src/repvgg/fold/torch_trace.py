"""Temporary: how the modules of a tree call each other."""
import copy
from collections import Counter
import inspect
from torch import fx, nn
import torch
from repvgg.fold.guards import parts
from repvgg.fold.trace import _called_by, _defaults, _SiblingTracer
from repvgg.fold.torch_graph import Calls


def see_calls(model: nn.Module) -> Calls:
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    names = {module: path for path, module in model.named_modules()}
    found = Calls()
    for parent, path in names.items():
        if type(parent).forward is nn.Module.forward or type(parent).__module__.startswith("torch.nn.modules") and not parts(parent):
            continue
        try:
            graph = _SiblingTracer().trace(parent, _defaults(parent))
            _clean(graph, parent)
        except Exception as e:
            found.hidden.update({names[child]: "its parent's forward cannot be traced" for child in _called_by(parent)})
            continue
        found.graphs[path] = graph
        for node in graph.nodes:
            if node.op == "get_attr" and "." in node.target:
                child = parent.get_submodule(node.target.rpartition(".")[0])
                found.uses[names[child]] += 1
            elif node.op == "call_module":
                found.uses[names[parent.get_submodule(str(node.target))]] += 1
    found.uses |= Counter(names[child] for parent in names for _, child in parts(parent))
    return found


def _clean(graph, module):
    required = [p.name for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    for node in list(graph.nodes):
        if node.op == "call_function" and (node.target is torch._assert or node.target.__name__ == "_assert_is_none"):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" and node.target not in required and not node.users:
            graph.erase_node(node)
        elif not node.users and node.op == "call_function" and node.target.__name__ == "eq":
            graph.erase_node(node)
