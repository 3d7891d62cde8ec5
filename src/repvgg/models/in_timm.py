"""The RepVGG family in timm's registry, and our models as timm describes them, for whatever takes its networks from there.

repvgg.register_with_timm()
timm.create_model("rep_repvgg_b1g2", features_only=True)
segmentation_models_pytorch.Unet("tu-rep_repvgg_a0", encoder_weights=None)
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from repvgg.models import keys, zoo
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import NETWORKS
from repvgg.models.pretrained import RELEASED, REPO

PREFIX = "rep_"
default_cfgs: dict[str, Any] = {}  # timm looks here for what goes with the names that this file registers


def register_with_timm() -> list[str]:
    """Make the networks of the family known to timm as rep_repvgg_a0 and so on, and return these names.

    Weights, where some were released, are those of timm's own repvgg_a0 and so on. Raises ValueError where timm is missing.
    """
    try:
        from timm.models import generate_default_cfgs, is_model, register_model
    except ImportError:
        raise ValueError("there is no timm to register with: pip install timm") from None
    names = {PREFIX + name: name for name in NETWORKS}
    for ours, name in names.items():
        if not is_model(ours):
            default_cfgs.update(generate_default_cfgs({_tagged(ours, name): _config(name)}))
            register_model(_entry(ours, name))
    return list(names)


def _entry(ours: str, name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        made: nn.Module = build_model_with_cfg(
            partial(zoo.create_model, name),
            ours,
            pretrained,
            pretrained_filter_fn=_to_ours,
            feature_cfg={"flatten_sequential": True},
            **kwargs,
        )
        return made

    entry.__name__ = ours
    return entry


def _tagged(ours: str, name: str) -> str:
    return f"{ours}.rvgg_in1k" if name in RELEASED else ours


def _config(name: str) -> dict[str, Any]:
    """Return what timm wants to know of one of our networks and its weights."""
    return {
        "hf_hub_id": REPO.format(name=name) if name in RELEASED else None,
        "num_classes": 1000,
        **_input(zoo.default_preprocessing({"name": name, "in_chans": 3})),
        "first_conv": ("stem.block.conv_kxk.conv", "stem.block.conv_1x1.conv"),
        "classifier": "head",
    }


def timm_config(manifest: Manifest) -> dict[str, Any] | None:
    """Return the config.json by which timm and transformers open a model in timm's keys, as timm's own repvgg_a0 and so on.

    None where timm has no such network: that is for the members whose weights were released, in training form (timm makes no
    deploy form that pads), with the paper's blocks and strides. A width counts where timm rounds to the same channels.
    """
    arch = manifest.arch or {}
    name, width = str(arch.get("name")), arch.get("width", 1.0)
    usual = {"block": "repvgg", "output_stride": 32, "small_input": False}
    if manifest.form != "training" or name not in RELEASED or not usual.items() <= arch.items():
        return None
    if "widths" in arch or [round(c * width) for c in NETWORKS[name].widths()] != list(NETWORKS[name].widths(width)):
        return None
    defaults = {"in_chans": 3, "width_factor": 1.0, "drop_rate": 0.0, "global_pool": "avg"}
    given = {**arch, "width_factor": width}
    return {
        "architecture": name,
        "num_classes": arch["num_classes"],
        "num_features": NETWORKS[name].widths(width)[-1],
        "global_pool": arch["global_pool"],
        "model_args": {key: given[key] for key, default in defaults.items() if given[key] != default},
        "pretrained_cfg": {
            **_input(manifest.preprocessing),
            "fixed_input_size": False,
            "first_conv": ["stem.conv_kxk.conv", "stem.conv_1x1.conv"],
            "classifier": "head.fc",
        },
        **({"label_names": manifest.classes} if manifest.classes else {}),
    }


def _input(p: Preprocessing) -> dict[str, Any]:
    """Return a preprocessing in timm's words. Its crop is a share, of which it makes pixels by rounding down."""
    _, height, width = p.input_size
    share = min(height, width) / p.resize
    while math.floor(min(height, width) / share) < p.resize:
        share = math.nextafter(share, 0)
    return {
        "input_size": p.input_size,
        "pool_size": (-(-height // 32), -(-width // 32)),
        "crop_pct": share,
        "crop_mode": "center",
        "interpolation": p.interpolation,
        "mean": p.mean,
        "std": p.std,
    }


def _to_ours(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    place = keys.locate(tensors)
    return tensors if place is None or place.scheme == "repvgg" else keys.to_ours(keys.network_at(tensors, place)[0], place.scheme)
