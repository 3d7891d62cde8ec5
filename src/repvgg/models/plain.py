"""A deploy form as a list of layers: written into model files (see manifest.py), and enough to build the network from."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from repvgg.fold.blocks import SqueezeExcite
from repvgg.models.repvgg import Layer, Mean, PlusLayer, RepVGG, Residual, is_deploy_form

LARGEST_INPUT = "largest_input"  # of a convolution, where calibration found it


class PlainNet(nn.Module):
    """A deploy form built from its list of layers alone, whatever architecture it once had (a pruned net, a backbone)."""

    def __init__(self, layers: list[dict[str, Any]]) -> None:
        super().__init__()
        self.layers = layers
        self.steps: list[tuple[str, str | None]] = []
        for spec in layers:
            path = spec["path"] if spec["op"] == "squeeze_excite" else str(spec.get("weight", "")).removesuffix(".weight")
            if spec["op"] == "conv2d":
                geometry = (spec["kernel_size"], spec["stride"], spec["padding"], spec["dilation"], spec["groups"])
                _place(self, path, nn.Conv2d(spec["in_channels"], spec["out_channels"], *geometry))
            elif spec["op"] == "squeeze_excite":
                _place(self, path, SqueezeExcite(spec["channels"], spec.get("reduction", 16)))
            elif spec["op"] == "linear":
                _place(self, path, nn.Linear(spec["in_features"], spec["out_features"]))
            elif spec["op"] != "global_avg_pool":
                raise ValueError(f"no operator {spec['op']!r}")
            if spec.get("activation") not in (None, "relu"):
                raise ValueError(f"no activation {spec['activation']!r}")
            self.steps.append((path, spec.get("activation")))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self.steps, x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, [N, C, H, W]."""
        paths = [path for path, _ in self.steps]
        return self._run(self.steps[: paths.index("")] if "" in paths else self.steps, x)

    def _run(self, steps: list[tuple[str, str | None]], x: Tensor) -> Tensor:
        for path, activation in steps:
            x = self.get_submodule(path)(x) if path else x.mean((2, 3))
            x = x.relu() if activation else x
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what torch.jit.script compiles in its place: the same modules in a row, by the same names."""
        row, parts = nn.Sequential(), list[nn.Module]()
        for path, activation in self.steps:
            steps: dict[str, nn.Module] = {path: self.get_submodule(path)} if path else {"pool": Mean()}
            if activation:
                steps[f"{path}_act"] = nn.ReLU()
            for name, module in steps.items():
                _place(row, name, module, nn.Sequential)
            parts += steps.values()
        in_order = [module for module in row.modules() if module in parts]
        return row.train(self.training) if in_order == parts else self  # a list may go to and fro between containers


def _place(root: nn.Module, path: str, module: nn.Module, container: type[nn.Module] = nn.Module) -> None:
    """Set a submodule, making the containers on the way, so that parameters are called what the list calls them."""
    parent = root
    *containers, name = path.split(".")
    for between in containers:
        if between not in parent._modules:
            parent.add_module(between, container())
        parent = parent.get_submodule(between)
    parent.add_module(name, module)


def set_largest_inputs(model: nn.Module, largest: Sequence[float | None]) -> None:
    """Let the convolutions of a deploy form know the largest number of their input, as calibration found it, for products of 8
    bits (None: not known); `layer_list` tells. largest: for each layer of that list."""
    for spec, number in zip(layer_list(model) or [], largest, strict=True):
        if spec["op"] == "conv2d":
            conv = model.get_submodule(spec["weight"].removesuffix(".weight"))
            for holder in (vars(conv), spec):  # a PlainNet's list is its own
                holder.pop(LARGEST_INPUT, None)
                if number is not None:
                    holder[LARGEST_INPUT] = number


def layer_list(model: nn.Module) -> list[dict[str, Any]] | None:
    """Return the operators of a deploy form in order, as model files list them; None for any other model."""
    if isinstance(model, PlainNet):
        return model.layers
    if not isinstance(model, RepVGG) or not is_deploy_form(model) or any(isinstance(m, Residual) for m in model.modules()):
        return None
    layers: list[dict[str, Any]] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, Layer):
            continue
        conv = layer.block
        assert isinstance(conv, nn.Conv2d)
        has_se, plus = isinstance(layer.se, SqueezeExcite), isinstance(layer, PlusLayer)
        layers.append(
            {
                "op": "conv2d",
                **{name: getattr(conv, name) for name in ("in_channels", "out_channels", "groups")},
                **{name: list(getattr(conv, name)) for name in ("kernel_size", "stride", "padding", "dilation")},
                **{name: value for name, value in vars(conv).items() if name == LARGEST_INPUT},
                "activation": None if has_se and not plus else "relu",
                "weight": f"{path}.block.weight",
                "bias": f"{path}.block.bias",
            }
        )
        if has_se:
            se = {"op": "squeeze_excite", "path": f"{path}.se", "channels": conv.out_channels}
            layers.append({**se, "activation": None, "reduction": 4} if plus else {**se, "activation": "relu"})
    if not isinstance(model.head, nn.Linear):  # a backbone
        return [*layers, {"op": "global_avg_pool"}] if model.global_pool else layers
    head = {"in_features": model.head.in_features, "out_features": model.head.out_features}
    return [*layers, {"op": "global_avg_pool"}, {"op": "linear", **head, "weight": "head.weight", "bias": "head.bias"}]
