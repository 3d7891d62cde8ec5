"""Models by name, and what each says of itself.

model = create_model("repvgg_a0", num_classes=10)
manifest_of(model)                                # what a file of it would say
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from repvgg.fold.reparameterize import reparameterize
from repvgg.models.families import DEFAULTS, Request, family_of
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import resolve_name
from repvgg.models.network import Network
from repvgg.models.plain import PlainNet, layer_list
from repvgg.models.repvgg import RepVGG, is_deploy_form


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    deploy: bool = False,
    pretrained: bool | str = False,
    output_stride: int = 32,
    width: float = 1.0,
    small_input: bool = False,
    block: str | None = None,
    widths: Sequence[int] | None = None,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> Network:
    """Return a model in train mode: images [N, in_chans, H, W] -> logits [N, num_classes], of a PSPNet [N, num_classes, H, W].

    block: the structure of each layer in training form, a name in `repvgg.fold.blocks.BLOCKS`; by default the network's own
    ("repvgg", in the residual one "plain"). In a comparator it takes the place of each 3x3 convolution (see `replace_conv`).
    widths: channels of each layer of a pruned network of the family, the stem's first, in place of the name's own.
    num_classes, global_pool and drop_rate are timm's: num_classes 0 gives the pooled features [N, num_features], and with
    global_pool "" the last feature map; drop_rate is of a dropout before the classifier. features_only gives timm's extractor of a
    list of feature maps, those of the stages `out_indices` (all five by default).

    pretrained: the paper's ImageNet weights from the hub; a string pins the hub repository's revision. With another number of
    classes the classifier starts anew; in a PSPNet they are the backbone's, and the heads are new. Raises ValueError for an unknown
    name or option, `FileError` if the hub cannot be reached.
    """
    name = resolve_name(name)
    family = family_of(name)
    given = {"output_stride": output_stride, "width": width, "small_input": small_input, "block": block, "widths": widths}
    given |= {"global_pool": global_pool, "drop_rate": drop_rate}
    options = {option: value for option, value in given.items() if value != DEFAULTS[option]}
    if wrong := [option for option in options if option not in family.takes(name)]:
        raise ValueError(f"{name} takes no {', '.join(wrong)}: these belong to the RepVGG family")
    model, manifest = family.create(Request(name, num_classes, in_chans, deploy, pretrained, options))
    remember(model, manifest)
    if deploy and (pretrained or not family.built_folded(name)):
        model = reparameterize(model.eval()).train()
    if not features_only:
        return cast(Network, model)
    if not isinstance(model, RepVGG):
        raise ValueError(f"{name} takes no features_only: take it from timm, timm.create_model({name!r}, features_only=True)")
    return cast(Network, features_of(model, out_indices))


def features_of(model: RepVGG, out_indices: Sequence[int] | None = None) -> nn.Module:
    """Return timm's extractor of feature maps: images -> a list of them, with `feature_info` beside it."""
    try:
        from timm.models import FeatureListNet
    except ImportError:
        raise ValueError("features_only is timm's: pip install timm") from None
    wanted = (0, 1, 2, 3, 4) if out_indices is None else tuple(out_indices)
    extractor: nn.Module = FeatureListNet(model, wanted, flatten_sequential=True)
    return extractor


def takes(name: str, option: str) -> bool:
    """Say whether an option of `create_model` applies to this name."""
    name = resolve_name(name)
    return option in family_of(name).takes(name)


def is_built_folded(name: str) -> bool:
    """Say whether the deploy form of this model is built as such; that of others comes of folding."""
    name = resolve_name(name)
    return family_of(name).built_folded(name)


def default_preprocessing(arch: dict[str, Any]) -> Preprocessing:
    """Return what a model made with these arguments of `create_model` expects, before any data has said otherwise."""
    return family_of(arch["name"]).preprocessing(arch)


def manifest_of(model: nn.Module) -> Manifest:
    """Return what a file of this model would say of it. Raises ValueError for a model that `create_model` did not make."""
    manifest = vars(model).get("manifest")  # its own: a wrapper (torch.compile) would spell the tensors otherwise
    if not isinstance(manifest, Manifest):
        raise ValueError(
            f"{type(model).__name__} was not made by repvgg.create_model, so nothing says how to prepare its images: "
            "save its state dict with PyTorch, export it with torch.onnx.export, run it with repvgg.load_engine"
        )
    num_classes = _num_classes(model)
    arch = manifest.arch and {**manifest.arch, "num_classes": num_classes}
    if arch and isinstance(model, RepVGG):
        arch |= {"global_pool": model.global_pool, "drop_rate": model.drop_rate}
    names = manifest.classes if manifest.classes and len(manifest.classes) == num_classes else None  # else of an older classifier
    form = "deploy" if _is_folded(model) else "training"
    return replace(manifest, arch=arch, form=form, classes=names, layers=layer_list(model), keys="repvgg")


def remember(model: nn.Module, manifest: Manifest) -> nn.Module:
    """Let the model carry what a file of it should say, and return it."""
    model.manifest = manifest  # type: ignore[assignment]
    return model


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the images a model takes: that of its parameters; an engine, which has none, takes float32."""
    return next((p.dtype for p in model.parameters()), torch.float32)


def _num_classes(model: nn.Module) -> Any:
    """Return the outputs of the classifier; None for a net that ends in something else."""
    return model.layers[-1].get("out_features") if isinstance(model, PlainNet) else model.num_classes


def _is_folded(model: nn.Module) -> bool:
    if isinstance(model, RepVGG):
        return is_deploy_form(model)
    return not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())  # synchronised ones too
