"""Any network that is one chain of convolutions, ReLUs, poolings and linear layers, as layers of the native engine.

    found = chain(reparameterize(vgg16_bn.eval()), (3, 224, 224))     # or a Sequential of one's own; None for what branches
    found.layers

The network is read as a graph (torch.export), so it matters what its forward does, not how it is written.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from repvgg_engine.layers import Conv, Layer, MaxPool, Pool
from torch import Tensor, fx, nn

from repvgg.deploy.engines import Signature
from repvgg.deploy.engines.graph import trace

ATEN = torch.ops.aten
NOTHING = (ATEN.dropout.default, ATEN.clone.default, ATEN.contiguous.default, ATEN.alias.default)  # in eval mode
RESHAPES = (ATEN.flatten.using_ints, ATEN.view.default, ATEN.reshape.default, ATEN.squeeze.dims)


class Chain(NamedTuple):
    """Layers, and whether they compute the network for images of one size only."""

    layers: list[Layer]
    fixed: bool


def chain(model: nn.Module, input_size: tuple[int, int, int]) -> Chain | None:
    """Return the layers of a network for images of that size; None where it is no such chain."""
    try:
        program = trace(model, Signature(input_size))
    except ValueError:
        return None
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    tensors = {**program.state_dict, **program.constants}  # these are buffers that are not saved, and plain tensors
    chained = _Chain({node: tensors[name] for node, name in names.items()})
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in signature.user_inputs:
            chained.last, chained.map = node, _shape(node)
        elif node.target is ATEN.sym_size.int:  # the batch, that a reshape asks for
            continue
        elif node.op == "call_function" and not (node.args[0] is chained.last and chained.takes(node)):
            return None
    return chained.whole() if program.graph.output_node().args[0] == (chained.last,) else None


class _Chain:
    """Layers so far, and the node that they compute."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.layers: list[Layer] = []
        self.last: fx.Node | None = None
        self.map: tuple[int, ...] = ()  # channels, height and width of the last map
        self.fixed = False  # whether the layers are those of this size of images only

    def takes(self, node: fx.Node) -> bool:
        """Append what a node does; False where that is none of the engine's layers."""
        if node.target is ATEN.dropout.default and node.args[2]:
            return False  # it drops in eval mode too
        if not (node.target in NOTHING or self._layer(node, *node.args[1:]) or self._pooled(node, *node.args[1:])):
            return False
        self.last = node
        self.map = _shape(node) if len(_shape(node)) == 3 else self.map
        return True

    def whole(self) -> Chain | None:
        """Return the layers; logits are of a pooled map, be it of one pixel."""
        if not self.layers or self.last is None:
            return None
        if len(_shape(self.last)) == 1 and not self._is_pooled():
            return Chain([*self.layers, Pool(_shape(self.last)[0])], fixed=True)  # the map has one pixel at this size
        return Chain(self.layers, self.fixed) if len(_shape(self.last)) == 1 or not self._is_pooled() else None

    def _is_pooled(self) -> bool:
        """Say whether the last map has one pixel at any size of images."""
        return any(isinstance(layer, Pool) for layer in self.layers)

    def _layer(self, node: fx.Node, *words: Any) -> bool:
        """Take a convolution, a linear layer or a ReLU."""
        if node.target is ATEN.conv2d.default:
            stride, padding, dilation, groups = _completed(words[2:], [1, 1], [0, 0], [1, 1], 1)
            self._append(self._numbers(words[0]), words[1:], _pair(stride), _pair(padding), _pair(dilation), groups)
        elif node.target is ATEN.linear.default and node.meta["val"].ndim == 2:
            weight = self._numbers(words[0])
            pixels = weight.shape[1] // self.map[0]  # of the map that was flattened, or 1
            self.fixed |= not self._is_pooled()
            self._append(weight.reshape(len(weight), self.map[0], *(self.map[1:] if pixels > 1 else (1, 1))), words[1:])
            self.map = (len(weight), 1, 1)
        elif node.target in (ATEN.relu.default, ATEN.relu_.default) and self.layers and isinstance(self.layers[-1], Conv):
            self.layers[-1] = replace(self.layers[-1], relu=True)
        else:
            return False
        return True

    def _pooled(self, node: fx.Node, *words: Any) -> bool:
        """Take a pooling, or a reshape of a map to a vector."""
        if node.target is ATEN.max_pool2d.default:
            kernel, stride, padding, dilation, ceil = _completed(words, None, [], [0, 0], [1, 1], False)
            self.layers.append(MaxPool(self.map[0], _pair(kernel), _pair(stride or kernel), _pair(padding)))
            return _pair(dilation) == (1, 1) and not ceil
        if node.target in (ATEN.adaptive_avg_pool2d.default, ATEN.mean.dim):
            if _shape(node) == self.map:  # a mean over one pixel, at this size
                self.fixed |= not self._is_pooled()
                return node.target is ATEN.adaptive_avg_pool2d.default
            if node.target is ATEN.mean.dim and sorted(dim % 4 for dim in words[0]) != [2, 3]:  # not over the pixels
                return False
            self.layers.append(Pool(self.map[0]))
            self.map = (self.map[0], 1, 1)
            return _shape(node) in (self.map, self.map[:1])
        return node.target in RESHAPES and _shape(node) == (int(np.prod(self.map)),)

    def _append(self, weight: Any, biases: tuple[Any, ...], *geometry: Any) -> None:
        bias = self._numbers(biases[0]) if biases and biases[0] is not None else np.zeros(len(weight), np.float32)
        self.layers.append(Conv(weight, bias, *geometry))

    def _numbers(self, node: fx.Node) -> Any:
        return np.ascontiguousarray(self.tensors[node.name].detach().numpy())


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of one image's value."""
    return tuple(map(int, node.meta["val"].shape[1:]))


def _completed(words: Sequence[Any], *defaults: Any) -> list[Any]:
    """Return an operator's arguments, with the defaults of those that are left out."""
    return [*words, *defaults[len(words) :]]


def _pair(values: Any) -> tuple[int, int]:
    first, *rest = values if isinstance(values, list | tuple) else [values]
    return int(first), int(rest[0] if rest else first)
