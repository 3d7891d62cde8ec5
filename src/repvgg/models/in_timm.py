"""The RepVGG family in timm's registry, for whatever takes its networks from there.

repvgg.register_with_timm()
timm.create_model("rep_repvgg_b1g2", features_only=True)
segmentation_models_pytorch.Unet("tu-rep_repvgg_a0", encoder_weights=None)
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor, nn

from repvgg.models import keys, zoo
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
        raise ValueError("there is no timm to register with: pip install 'repvgg[bench]'") from None
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
    return f"{ours}.rvgg_in1k" if name.removeprefix("repvgg_") in RELEASED else ours


def _config(name: str) -> dict[str, Any]:
    """Return what timm wants to know of a network and its weights."""
    p = asdict(zoo.default_preprocessing({"name": name, "in_chans": 3}))
    size = p["input_size"]
    return {
        "hf_hub_id": REPO.format(name=name) if name.removeprefix("repvgg_") in RELEASED else None,
        "num_classes": 1000,
        "input_size": size,
        "pool_size": (size[1] // 32, size[2] // 32),
        "crop_pct": size[1] / p["resize"],
        "interpolation": p["interpolation"],
        "mean": p["mean"],
        "std": p["std"],
        "first_conv": ("stem.block.conv_kxk.conv", "stem.block.conv_1x1.conv"),
        "classifier": "head",
    }


def _to_ours(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    place = keys.locate(tensors)
    return tensors if place is None or place.scheme == "repvgg" else keys.to_ours(keys.network_at(tensors, place)[0], place.scheme)
