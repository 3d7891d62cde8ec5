"""Surgery on plain networks in deploy form: what a stack of convolutions and ReLUs allows, and nothing with branches does.

equalise(deploy)                 the same function, with weights that are easier to quantise
insert_bn(deploy, images)        the same function, with a batch norm after each convolution, so that it can be trained on
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, ReparamError, balance
from repvgg.fold.as_linear import as_linear
from repvgg.fold.guards import refuse_train_mode
from repvgg.models import zoo
from repvgg.models.plain import layer_list

SWEEPS = 20  # over all pairs of layers; the ranges hardly change after ten
TURN = 32  # images at a time


def convolutions(model: nn.Module) -> list[str]:
    """Paths of the convolutions of a plain network in deploy form, in order. Raises `ReparamError` for any other network."""
    layers = layer_list(model)
    if layers is None:
        raise ReparamError(f"{type(model).__name__} is no plain network in deploy form: fold a RepVGG first")
    if any(spec["op"] == "squeeze_excite" for spec in layers):
        raise ReparamError("a network with squeeze-excite is not plain: its gates tie the channels of a layer together")
    return [spec["weight"].removesuffix(".weight") for spec in layers if spec["op"] == "conv2d"]


@torch.no_grad()
def equalise(model: nn.Module) -> nn.Module:
    """Return a copy that computes the same, its channels scaled so that what makes a channel has the same range as what uses it.

    Raises `ReparamError` for what is no plain network in deploy form.
    """
    deploy = copy.deepcopy(model)
    layers: list[Any] = [deploy.get_submodule(path) for path in [*convolutions(deploy), _classifier(deploy)]]
    maps = [_as_map(layer) for layer in layers]
    for _ in range(SWEEPS):
        for i in range(len(maps) - 1):  # the last pair has the average pool between, which no scale minds either
            maps[i], maps[i + 1] = balance(maps[i], maps[i + 1])
    for layer, m in zip(layers, maps, strict=True):
        layer.weight.copy_(m.kernel.view_as(layer.weight))
        layer.bias.copy_(m.bias)
    return deploy


def _classifier(model: nn.Module) -> str:
    layers = layer_list(model) or [{}]
    if layers[-1].get("op") != "linear":
        raise ReparamError("this network does not end in a classifier")
    return str(layers[-1]["weight"]).removesuffix(".weight")


def _as_map(layer: nn.Module) -> LinearMap:
    if isinstance(layer, nn.Linear):
        return LinearMap(layer.weight.double()[:, :, None, None], layer.bias.double())
    return as_linear(layer)


@torch.no_grad()
def insert_bn(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the training form with block="plain" that computes what a plain network in deploy form does, in eval mode.

    Each convolution has a batch norm after it that undoes itself; its statistics are those of `images`, and the more there are, the
    less the first steps of training disturb. A deploy form without batch norms trains badly; `reparameterize` folds them again.
    Raises `ReparamError` for what is no member of the family in deploy form, or is in train mode.
    """
    refuse_train_mode(model)
    manifest, paths = zoo.manifest_of(model), convolutions(model)
    if manifest.arch is None:
        raise ReparamError("a network known by its layers alone has no training form")
    dtype = next(model.parameters()).dtype
    training: Any = zoo.create_model(**{**manifest.arch, "block": "plain"}).to(dtype)
    training.head.load_state_dict(model.get_submodule("head").state_dict())
    moments: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = [model.get_submodule(path).register_forward_hook(partial(_note, moments[path])) for path in paths]
    for part in images.to(dtype).split(TURN):
        model(part)
    for hook in hooks:
        hook.remove()
    for path in paths:
        count, total, squares = torch.stack(moments[path]).sum(0)
        mean = total / count
        _fill(training.get_submodule(path).conv_kxk, model.get_submodule(path), mean, squares / count - mean.square())
    zoo.remember(training, replace(manifest, arch=zoo.manifest_of(training).arch))
    return training.eval()  # type: ignore[no-any-return]


def _note(moments: list[Tensor], conv: nn.Module, inputs: object, outputs: Tensor) -> None:
    """Note of each channel: how many numbers there are, their sum and that of their squares."""
    numbers = outputs.double().transpose(0, 1).flatten(1)
    moments.append(torch.stack([torch.full_like(numbers[:, 0], numbers.shape[1]), numbers.sum(1), numbers.square().sum(1)]))


def _fill(pair: Any, conv: Any, mean: Tensor, var: Tensor) -> None:
    """Make a convolution and its batch norm compute what `conv` does, whose outputs have these statistics."""
    var = torch.where(var > 1e-12 * mean.square(), var, 1.0)  # a channel that these images do not excite
    pair.conv.weight.copy_(conv.weight)
    pair.bn.running_mean.copy_(mean - conv.bias)
    pair.bn.running_var.copy_(var)
    pair.bn.weight.copy_((var + pair.bn.eps).sqrt())
    pair.bn.bias.copy_(mean)
