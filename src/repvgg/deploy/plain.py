"""Surgery on plain networks in deploy form: what a stack of convolutions and ReLUs allows, and nothing with branches does.

equalise(deploy)                 the same function, with weights that are easier to quantise
insert_bn(deploy, images)        the same function, with a batch norm after each convolution, so that it can be trained on
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from repvgg import zoo
from repvgg.algebra import LinearMap, ReparamError, balance
from repvgg.blocks import with_bn
from repvgg.models import PlainNet, RepVGG, layer_list
from repvgg.reparam import Branches, as_linear, refuse_train_mode

SWEEPS = 20  # over all pairs of layers; the ranges hardly change after ten


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
    """A copy that computes the same, its channels scaled so that what makes a channel has the same range as what uses it.

    Raises `ReparamError` for what is no plain network in deploy form.
    """
    deploy = copy.deepcopy(model)
    paths = [*convolutions(deploy), classifier(deploy)]
    maps = [_as_map(deploy.get_submodule(path)) for path in paths]
    for _ in range(SWEEPS):
        for i in range(len(maps) - 1):  # the last pair has the average pool between, which no scale minds either
            maps[i], maps[i + 1] = balance(maps[i], maps[i + 1])
    for path, m in zip(paths, maps, strict=True):
        layer = deploy.get_submodule(path)
        layer.weight.copy_(m.kernel.view_as(layer.weight))  # type: ignore[operator, union-attr, arg-type]
        layer.bias.copy_(m.bias)  # type: ignore[operator, union-attr]
    return deploy


def classifier(model: nn.Module) -> str:
    """The path of the linear layer at the end of a plain network."""
    layers = layer_list(model) or [{}]
    if layers[-1].get("op") != "linear":
        raise ReparamError("this network does not end in a classifier")
    return str(layers[-1]["weight"]).removesuffix(".weight")


@torch.no_grad()
def insert_bn(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy that computes the same, with a batch norm after each convolution, its statistics those of `images`.

    To train a deploy form on (after pruning, say), which without batch norms trains badly; `reparameterize` folds it again. Of a
    member of the family it makes the training form with block="plain", which can be saved. Raises `ReparamError` for what is no
    plain network in deploy form, or is in train mode.
    """
    refuse_train_mode(model)
    network = copy.deepcopy(model)
    paths = convolutions(network)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> None:
        def note(module: nn.Module, inputs: object, output: Tensor) -> None:
            seen[path] = (output.double().mean((0, 2, 3)), output.double().var((0, 2, 3), correction=0))

        hooks.append(network.get_submodule(path).register_forward_hook(note))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for path in paths:
        watch(path)
    network(images.to(next(network.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    for path in paths:
        network.set_submodule(path, Branches(conv_kxk=_with_bn(network.get_submodule(path), *seen[path])).eval())
    if isinstance(network, RepVGG):
        manifest = zoo.manifest_of(model)
        zoo.remember(network, replace(manifest, arch=manifest.arch and {**manifest.arch, "block": "plain"}, layers=None))
    return network


def _with_bn(conv: nn.Module, mean: Tensor, var: Tensor) -> nn.Sequential:
    """`conv` and a batch norm that subtracts the mean of its outputs, divides by their deviation, and undoes both."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    bare = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, bias=False
    )
    pair = with_bn(bare.to(conv.weight))
    norm = pair.get_submodule("bn").to(conv.weight)
    assert isinstance(norm, nn.BatchNorm2d)
    var = torch.where(var > 0, var, 1.0)  # a channel that these images do not excite
    bare.weight.copy_(conv.weight)
    norm.running_mean.copy_(mean - conv.bias)  # type: ignore[union-attr]
    norm.running_var.copy_(var)  # type: ignore[union-attr]
    norm.weight.copy_((var + norm.eps).sqrt())
    norm.bias.copy_(mean)
    return pair


def _as_map(layer: nn.Module) -> LinearMap:
    if isinstance(layer, nn.Linear):
        return LinearMap(layer.weight.double()[:, :, None, None], layer.bias.double())
    return as_linear(layer)


def plain_net(model: nn.Module) -> PlainNet:
    """A copy that is known by its layers alone. Raises `ReparamError` for what is no plain network in deploy form."""
    layers = layer_list(model)
    if layers is None:
        raise ReparamError(f"{type(model).__name__} is no plain network in deploy form: fold a RepVGG first")
    net = PlainNet(copy.deepcopy(layers))
    net.load_state_dict(model.state_dict())
    net.to(next(model.parameters()).dtype).eval()
    if "manifest" in vars(model):
        zoo.remember(net, replace(zoo.manifest_of(model), arch=None))
    return net
