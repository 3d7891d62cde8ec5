"""The native engine (engine/, package repvgg_engine): plain networks on the CPU, by Winograd's algorithms.

It chooses its algorithms by measurement, under an error budget, at the first run of a network on a machine: seconds, once.
"""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from repvgg_engine import Net
from repvgg_engine.files import Preprocessing
from repvgg_engine.layers import Array, Conv, Layer, Pool, SqueezeExcite
from repvgg_engine.loader import build as build_net
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.engines.chain import Chain, chain
from repvgg.models.plain import LARGEST_INPUT, layer_list
from repvgg.models.pspnet import STRIDE, PSPNet


def build(model: nn.Module, options: Options) -> Engine:
    """Return an engine; of a PSPNet, backbone and head's 3x3 run in it. Raises ValueError for other networks that are no plain
    stack in deploy form."""
    if isinstance(model, PSPNet):
        network = _in_pspnet(model, options)
        return Engine(lambda images: images.detach().cpu().float(), torch.no_grad()(network), lambda logits: logits)
    net, size = to_net(model, options)
    return Engine(partial(_to_numpy, size=size), net, lambda logits: torch.from_numpy(logits))


def to_net(model: nn.Module, options: Options, accuracy: str = "high") -> tuple[Net, tuple[int, int, int] | None]:
    """Return the engine's own net, with a copy of the model's weights, and the only size of images that it is for, None for any.

    accuracy: see repvgg_engine.load.
    """
    _, height, width = options.input_size
    channels = options.input_size[0]
    preprocessing = Preprocessing(height, width, min(height, width), "bilinear", (0.0,) * channels, (1.0,) * channels)
    layers, fixed = _layers(model, options.input_size)
    net = build_net(layers, preprocessing, precision=options.precision, accuracy=accuracy, threads=options.threads)
    return net, options.input_size if fixed else None


class NativeModule(nn.Module):
    """A plain network in deploy form, run by the native engine: float32 images [N, C, H, W] in, float32 logits out, no gradients.

    NativeModule(repvgg.reparameterize(model.eval()))
    """

    def __init__(self, model: nn.Module, options: Options = Options(), accuracy: str = "high") -> None:  # noqa: B008 - frozen
        super().__init__()
        self.net, self.size = to_net(model, options, accuracy)

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.net(_to_numpy(images, self.size))).to(images.device)


def _to_numpy(images: Tensor, size: tuple[int, int, int] | None) -> Array:
    """Return images as the engine takes them. Raises ValueError where they have another size than the net is for."""
    if size and tuple(images.shape[1:]) != tuple(size):
        given, wanted = (" x ".join(map(str, shape)) for shape in (images.shape[1:], size))
        raise ValueError(f"this network was built for images of {wanted}, not {given}: build it again for that input_size")
    return np.ascontiguousarray(images.detach().cpu().float().numpy())


def _in_pspnet(model: PSPNet, options: Options) -> PSPNet:
    """A copy in which the plain parts are native modules, and the pyramid between them PyTorch's."""
    network = copy.deepcopy(model)
    channels, height, width = options.input_size
    height, width = (side + -(side - 1) % STRIDE for side in (height, width))
    network.backbone = _Backbone(model.backbone, replace(options, input_size=(channels, height, width)))
    conv = network.head.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    maps = (conv.in_channels, (height - 1) // STRIDE + 1, (width - 1) // STRIDE + 1)
    network.head.set_submodule("conv", NativeModule(nn.Sequential(conv, nn.ReLU()), replace(options, input_size=maps)))
    return network


class _Backbone(NativeModule):
    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [super().forward(images)] * 2  # the first is for the auxiliary head, which deploy forms do not have


def _layers(model: nn.Module, input_size: tuple[int, int, int]) -> Chain:
    listed = layer_list(model)
    if listed is None:
        if found := chain(model, input_size):
            return found
        raise ValueError(
            f"the engine native runs plain networks in deploy form, and {type(model).__name__} is none:"
            " fold a RepVGG first (repvgg.reparameterize), or use another engine"
        )
    state = {name: t.detach().cpu().float().numpy().copy() for name, t in model.state_dict().items()}
    layers: list[Layer] = []
    channels = 0
    for spec in listed:
        relu = spec.get("activation") == "relu"
        if spec["op"] == "conv2d":
            stride, padding, dilation = (tuple(spec[name]) for name in ("stride", "padding", "dilation"))
            layers.append(
                Conv(
                    state[spec["weight"]],
                    state[spec["bias"]],
                    stride,
                    padding,
                    dilation,
                    spec["groups"],
                    relu,
                    spec.get(LARGEST_INPUT) or 0.0,
                )
            )
            channels = spec["out_channels"]
        elif spec["op"] == "squeeze_excite":
            parts = [state[f"{spec['path']}.{part}"] for part in ("reduce.weight", "reduce.bias", "expand.weight", "expand.bias")]
            layers.append(SqueezeExcite(parts[0][:, :, 0, 0], parts[1], parts[2][:, :, 0, 0], parts[3], relu))
        elif spec["op"] == "global_avg_pool":
            layers.append(Pool(channels))
        else:
            layers.append(Conv(state[spec["weight"]][:, :, None, None], state[spec["bias"]], relu=relu))
    return Chain(layers, fixed=False)
