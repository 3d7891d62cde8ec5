"""The three families of networks that have a name, one record each: what it takes, how it is made, what images it expects.

`FAMILIES` is the one place that is asked which family a name belongs to. A fourth family is a fourth record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from repvgg.disk import FileError
from repvgg.fold.replace import replace_conv
from repvgg.models import baselines, pretrained, weights
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import BASELINES, FAMILY, NETWORKS, PSPNETS
from repvgg.models.pretrained import imagenet_classes
from repvgg.models.pspnet import create_pspnet
from repvgg.models.repvgg import RepVGG

DEFAULTS: dict[str, Any] = {
    "output_stride": 32,
    "width": 1.0,
    "small_input": False,
    "block": None,
    "widths": None,
    "global_pool": "avg",
    "drop_rate": 0.0,
}
OWN_WEIGHTS = "has timm's default weights or none: pretrained=True takes no revision"
Made = tuple[nn.Module, Manifest]


@dataclass(frozen=True)
class Request:
    """The arguments of `create_model`. options: those that differ from `DEFAULTS`."""

    name: str
    num_classes: int
    in_chans: int
    deploy: bool
    pretrained: bool | str
    options: dict[str, Any]

    @property
    def arch(self) -> dict[str, Any]:
        return {"name": self.name, "num_classes": self.num_classes, "in_chans": self.in_chans}


@dataclass(frozen=True)
class Family:
    """One kind of network.

    names: the models of this family. create: makes one, in deploy form only where that is built as such. preprocessing: what a new
    one expects, given its `create_model` arguments. takes: the options of `create_model` that apply to a name. built_folded:
    whether the deploy form of a name is built as such; that of others comes of folding.
    """

    names: Mapping[str, Any]
    create: Callable[[Request], Made]
    preprocessing: Callable[[Mapping[str, Any]], Preprocessing]
    takes: Callable[[str], frozenset[str]]
    built_folded: Callable[[str], bool]


def family_of(name: str) -> Family:
    """Return the family of a resolved name."""
    return next(family for family in FAMILIES if name in family.names)


# ------------------------------------------------------------------------------------------------------------------ RepVGG


def _create_repvgg(r: Request) -> Made:
    member, options = NETWORKS[r.name], {**DEFAULTS, **r.options}
    arch = {**r.arch, **options, "block": options["block"] or member.block}
    if r.pretrained and (r.in_chans, arch["width"], arch["small_input"], arch["block"]) != (3, 1, False, "repvgg"):
        raise ValueError("pretrained weights fit in_chans=3, width=1, small_input=False and block='repvgg' only")
    if r.pretrained and options["widths"]:
        raise ValueError("widths are those of a pruned network of the family, and no weights were released for one")
    arch = {key: value for key, value in arch.items() if key != "widths" or value}
    model = RepVGG(member, r.num_classes, r.in_chans, r.deploy and not r.pretrained, **options)
    manifest = Manifest(arch, preprocessing=_repvgg_preprocessing(arch))
    if not r.pretrained:
        return model, manifest
    revision = "main" if r.pretrained is True else r.pretrained
    source = pretrained.pretrained_file(r.name, revision)
    tensors, _, _ = weights.read(source)
    classes = imagenet_classes() if r.num_classes == 1000 else None
    if classes is None:
        head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")} | head
    try:
        weights.fill(model, tensors)
    except ValueError as error:
        raise FileError(f"{source}: {error}") from None
    origin = {"source": pretrained.REPO.format(name=r.name), "revision": revision}
    return model, replace(manifest, classes=classes, training=origin)


def _repvgg_preprocessing(arch: Mapping[str, Any]) -> Preprocessing:
    if arch.get("small_input"):
        return _square(arch, 32, 32)
    return _square(arch, 320, 320) if NETWORKS[arch["name"]].squeeze_excite else _square(arch, 224, 256)


REPVGG = Family(NETWORKS, _create_repvgg, _repvgg_preprocessing, lambda name: frozenset(DEFAULTS), lambda name: True)


# ------------------------------------------------------------------------------------------------------------------ PSPNet


def _create_pspnet(r: Request) -> Made:
    if r.num_classes < 1 or r.in_chans < 1:
        raise ValueError("num_classes and in_chans are at least 1")
    backbone = PSPNETS[r.name].backbone
    if backbone not in FAMILY:
        if isinstance(r.pretrained, str):
            raise ValueError(f"{r.name} {OWN_WEIGHTS}")
        arch = {**r.arch, **r.options}
        return create_pspnet(**arch, pretrained=r.pretrained), Manifest(arch, preprocessing=_pspnet_preprocessing(arch))
    arch = {**r.arch, "width": r.options.get("width", 1.0), "block": r.options.get("block") or FAMILY[backbone].block}
    model = create_pspnet(**arch, deploy=r.deploy and not r.pretrained)
    manifest = Manifest(arch, preprocessing=_pspnet_preprocessing(arch))
    if r.pretrained:
        classifier, origin = _create_repvgg(replace(r, name=backbone, num_classes=1000))
        report = model.load_backbone(classifier.state_dict())
        manifest = replace(manifest, training={**origin.training, "backbone": report})
    return model, manifest


def _pspnet_preprocessing(arch: Mapping[str, Any]) -> Preprocessing:
    return _square(arch, 713, 713)  # Table 8


def _on_repvgg(name: str) -> bool:
    return PSPNETS[name].backbone in FAMILY


PSPNET = Family(
    PSPNETS, _create_pspnet, _pspnet_preprocessing, lambda name: frozenset(["width"] + ["block"] * _on_repvgg(name)), _on_repvgg
)


# --------------------------------------------------------------------------------------------------------------- baselines


def _create_baseline(r: Request) -> Made:
    if isinstance(r.pretrained, str):
        raise ValueError(f"{r.name} {OWN_WEIGHTS}")
    arch, block = {**r.arch, **r.options}, r.options.get("block")
    model = baselines.create_baseline(**r.arch, pretrained=r.pretrained)
    if block is not None:
        model = replace_conv(model, block, fresh=not r.pretrained)
    manifest = Manifest(arch, preprocessing=_baseline_preprocessing(arch))
    if r.pretrained and r.in_chans == 3:
        manifest = replace(manifest, preprocessing=baselines.timm_preprocessing(model))
    if r.pretrained and r.num_classes == 1000:
        manifest = replace(manifest, classes=imagenet_classes())
    return model, manifest


def _baseline_preprocessing(arch: Mapping[str, Any]) -> Preprocessing:
    size = BASELINES[arch["name"]].input_size
    return _square(arch, size, round(size / 0.875))


BASELINE = Family(BASELINES, _create_baseline, _baseline_preprocessing, lambda name: frozenset({"block"}), lambda name: False)

FAMILIES = (REPVGG, PSPNET, BASELINE)


def _square(arch: Mapping[str, Any], size: int, resize: int) -> Preprocessing:
    channels = arch["in_chans"]
    if channels == 3:
        return Preprocessing((3, size, size), resize)
    return Preprocessing((channels, size, size), resize, mean=(0.5,) * channels, std=(0.5,) * channels)
