"""Write an ONNX graph down as a computation (flow.py), and write the stretches that became convolutions back into it."""

import math
from typing import Any

import numpy as np
import torch
from onnx import AttributeProto, GraphProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from repvgg.fold.algebra import ReparamError, concat
from repvgg.fold.flow import Flow, Stretch, Value
from repvgg.fold.onnx_file import OnnxFile
from repvgg.fold.onnx_operators import READERS, Node

# Worked out where all that goes in is constant.
FOLDED = frozenset(("Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Cast", "Neg", "Sqrt", "Add", "Sub",
                    "Mul", "Div", "Reciprocal", "Shape", "Gather", "Slice", "Concat", "Expand", "CastLike"))  # fmt: skip
LISTED_TOO = 4  # until this IR version each initializer had to be an input as well; since, one that is may be given from outside
SMALL = 1 << 20  # numbers that a constant which is worked out may have


class OnnxGraph:
    """The main graph of a file as a `Flow`."""

    def __init__(self, file: OnnxFile) -> None:
        self.file, self.graph = file, file.model.graph
        self.tensors = {t.name: t for t in self.graph.initializer}
        self.made: dict[str, NodeProto] = {}
        self.values: dict[str, Value] = {}
        self.norms: dict[str, str] = {}  # batch norms that are no operator, and why
        self.uneven: dict[Value, tuple[str, list[int]]] = {}  # inputs of convolutions that pad more on one side than on the other
        self._constants: dict[str, np.ndarray[Any, Any] | None] = {}
        order: list[Value] = []
        inputs = {i.name for i in self.graph.input}
        if self.file.model.ir_version < LISTED_TOO:
            inputs -= self.tensors.keys()
        self.defaults = inputs & self.tensors.keys()  # what may be given from outside is no constant
        self.tensors = {name: t for name, t in self.tensors.items() if name not in inputs}
        for name in inputs:
            self.values[name] = Value(name, says="an input")
            order.append(self.values[name])
        for proto in self.graph.node:
            self.made.update(dict.fromkeys(proto.output, proto))
            order += self._read(proto)
        outputs = {self.values[o.name] for o in self.graph.output if o.name in self.values}
        outputs |= {self.values[name] for name in _read_inside(self.graph) if name in self.values}
        self.flow = Flow(order, outputs, refuse=self._refuse)

    # ------------------------------------------------------------------------------------------------------------- constants

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """Return the value of a tensor that does not depend on the inputs."""
        if name not in self._constants:
            self._constants[name] = self._constant(name)
        return self._constants[name]

    def _constant(self, name: str) -> np.ndarray[Any, Any] | None:
        if name in self.tensors:
            return self.file.array(self.tensors[name])
        node = self.made.get(name)
        if node is None or node.op_type not in (*FOLDED, "Constant") or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            return _of_attribute(self.file, node.attribute[0])
        inputs = [self.constant(i) if i else None for i in node.input]
        if node.op_type in ("CastLike", "Identity"):
            return inputs[0]
        if any(i and given is None for i, given in zip(node.input, inputs, strict=True)):
            return None
        if node.op_type != "Shape" and any(i is not None and i.size > SMALL for i in inputs):
            return None
        try:
            if _made_numbers(node.op_type, [i for i in inputs if i is not None]) > SMALL:
                return None
            known = {i: given for i, given in zip(node.input, inputs, strict=True) if given is not None}
            domain = [*self.file.model.opset_import]
            types = [helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for i, a in known.items()]
            outs = [helper.make_empty_tensor_value_info(name)]
            model = helper.make_model(helper.make_graph([node], "constant", types, outs), opset_imports=domain)
            found: np.ndarray[Any, Any] = np.asarray(ReferenceEvaluator(model).run([name], known)[0])
        except Exception:  # whatever its own code raises, it is no constant for us
            return None
        return found if found.size <= SMALL else None

    def tensor(self, name: str) -> Tensor | None:
        """Return a constant in float64."""
        found = self.constant(name)
        if found is None or not (np.issubdtype(found.dtype, np.number) or found.dtype.name in ("bfloat16", "float16")):
            return None
        return torch.from_numpy(found.astype(np.float64))

    # --------------------------------------------------------------------------------------------------------------- reading

    def _read(self, proto: NodeProto) -> list[Value]:
        """The values that a node makes; none where it makes constants."""
        if all(o and self.constant(o) is not None for o in proto.output):
            return []
        inputs = tuple(self.values[i] for i in proto.input if i in self.values)
        says, why = f"{'an' if proto.op_type[:1] in 'AEIOU' else 'a'} {proto.op_type}", ""
        reader = READERS.get(proto.op_type) if proto.domain in ("", "ai.onnx") else None
        found: list[Value] = []
        if reader is not None and inputs and all(i in self.values or self.tensor(i) is not None for i in proto.input if i):
            try:
                operators, pads = reader(Node(proto, self.tensor, inputs))
                if pads is not None:  # a convolution that pads unevenly: an unpadded one of what is padded before
                    found.append(Value(f"{proto.output[0]}_padded", inputs, says=inputs[0].says))
                    self.uneven[found[0]] = inputs[0].name, pads
                    inputs = (found[0],)
                found += [Value(o, inputs, how, says) for o, how in zip(proto.output, operators, strict=False)]
            except ReparamError as error:
                if error.path:  # a tensor that is damaged
                    raise
                why = f"its {proto.op_type} {error.reason}"
        if not found and (name := next((i for i in proto.input if i in self.defaults), "")):
            why = f"its {proto.op_type} reads {name}, an input of the graph that has a default: take it out of graph.input first"
        if not found and proto.op_type == "BatchNormalization":
            self.norms[proto.output[0]] = why or "its tensors are computed from the inputs"
        found = found or [Value(o, inputs, says=says, why=why) for o in proto.output if o]
        self.values.update((v.name, v) for v in found)
        return found

    def _refuse(self, stretch: Stretch) -> str | None:
        pads = stretch.source in self.uneven and any(stretch.map.padding)
        if pads or (any(stretch.map.padding) and stretch.map.padding_mode != "zeros"):
            return "a Conv cannot pad so"
        return None

    # --------------------------------------------------------------------------------------------------------------- writing

    def write(self, stretch: Stretch) -> None:
        """Put one Conv in the place of a stretch; `finish` takes what is no longer used out."""
        m = stretch.map
        like = next(t for v in stretch.inside if v.operator and v.operator.kind == "convolution" for t in [self._weight_of(v)])
        source, pads = self.uneven.get(stretch.source, (stretch.source.name, [*m.padding, *m.padding]))
        names = [f"{stretch.target.name}_folded_{what}" for what in ("weight", "bias")]
        for name, tensor in zip(names, (m.kernel, m.bias), strict=True):
            rounded = tensor.numpy().astype(like.dtype)
            if not np.isfinite(rounded.astype(np.float64)).all():
                raise ReparamError(f"its folded {name} does not fit {like.dtype}", stretch.target.name)
            self.graph.initializer.append(numpy_helper.from_array(rounded, name))
        conv = helper.make_node(
            "Conv",
            [source, *names],
            [stretch.target.name],
            f"{stretch.target.name}_folded",
            kernel_shape=m.kernel_size,
            strides=m.stride,
            pads=pads,
            dilations=m.dilation,
            group=m.groups,
        )
        self._replace(stretch.target, conv)

    def finish(self) -> None:
        """Take out what nothing uses any more, and order what is left; batch norms that fell apart leave a Concat."""
        for v in self.flow.values:
            node = self.made.get(v.name)
            if v.operator and v.operator.apply is concat and node is not None and node.op_type == "BatchNormalization":
                self._replace(v, helper.make_node("Concat", [i.name for i in v.inputs], [v.name], f"{v.name}_parts", axis=1))
        used = {o.name for o in self.graph.output} | set(_read_inside(self.graph))
        needed, todo = [], list(used)
        seen: set[int] = set()
        while todo:
            node = self.made.get(todo.pop())
            if node is not None and id(node) not in seen:
                seen.add(id(node))
                needed.append(node)
                todo += node.input
        ordered = _in_order(needed, self.graph)
        names = {name for node in ordered for name in (*node.input, *node.output)} | used
        del self.graph.node[:]
        self.graph.node.extend(ordered)
        given = {i.name for i in self.graph.input} - self.tensors.keys()
        for field in (self.graph.initializer, self.graph.value_info, self.graph.input):
            kept = [t for t in field if t.name in names | given]  # type: ignore[attr-defined]
            del field[:]  # type: ignore[attr-defined]
            field.extend(kept)  # type: ignore[attr-defined]
        if self.file.model.ir_version < LISTED_TOO:
            listed = {i.name for i in self.graph.input}
            new = (t for t in self.graph.initializer if t.name not in listed)
            self.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in new)

    def _replace(self, v: Value, node: NodeProto) -> None:
        self.made[v.name] = node

    def _weight_of(self, v: Value) -> np.ndarray[Any, Any]:
        found = self.constant(self.made[v.name].input[1])
        assert found is not None
        return found


def _in_order(nodes: list[NodeProto], graph: GraphProto) -> list[NodeProto]:
    """Each after those whose outputs it reads."""
    made = {o: node for node in nodes for o in node.output if o}
    ordered: list[NodeProto] = []
    done: set[int] = set()
    for first in nodes:
        stack = [(first, False)]
        while stack:
            node, ready = stack.pop()
            if id(node) in done:
                continue
            if ready:
                done.add(id(node))
                ordered.append(node)
                continue
            stack.append((node, True))
            reads = (*node.input, *(name for g in _bodies(node) for name in _names_read(g)))
            stack += [(made[i], False) for i in reads if i in made and id(made[i]) not in done]
    return ordered


def _bodies(node: NodeProto) -> list[GraphProto]:
    return [g for a in node.attribute for g in (*((a.g,) if a.HasField("g") else ()), *a.graphs)]


def _names_read(graph: GraphProto) -> set[str]:
    """Names that a branch or a loop reads, of its own or of what is around it."""
    names = {o.name for o in graph.output}
    for node in graph.node:
        names.update(node.input)
        for body in _bodies(node):
            names |= _names_read(body)
    return names


def _read_inside(graph: GraphProto) -> set[str]:
    return {name for node in graph.node for body in _bodies(node) for name in _names_read(body)}


def _of_attribute(file: OnnxFile, a: AttributeProto) -> np.ndarray[Any, Any] | None:
    if a.name == "value":
        return file.array(a.t)
    return np.asarray(helper.get_attribute_value(a)) if a.name.startswith("value_") and "string" not in a.name else None


def _made_numbers(kind: str, inputs: list[np.ndarray[Any, Any]]) -> int:
    """Return how many numbers an operator at most makes of constants. Raises ValueError for shapes that do not fit each other."""
    if kind in ("Add", "Sub", "Mul", "Div"):
        return math.prod(np.broadcast_shapes(*(x.shape for x in inputs)))
    if kind == "Expand":
        return math.prod(np.broadcast_shapes(inputs[0].shape, tuple(map(int, inputs[1]))))
    if kind == "Gather":
        return inputs[1].size * inputs[0].size // max(1, min(inputs[0].shape, default=1))
    return sum(x.size for x in inputs) if kind == "Concat" else 0  # others make no more than they are given
