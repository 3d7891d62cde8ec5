"""Models by name, and model files: list_models, create_model, save, load; pretrained weights from the hub."""

import difflib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.disk import FileError, describe
from repvgg.fold.reparameterize import reparameterize
from repvgg.fold.replace import replace_conv
from repvgg.models import baselines, checkpoint, hub, keys
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.pspnet import PSPNETS, create_pspnet
from repvgg.models.repvgg import FAMILY, NETWORKS, PlainNet, RepVGG, is_deploy_form, layer_list

# The paper's weights as timm publishes them, in timm's keys.
PRETRAINED = ("a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4", "d2se")
HUB_REPO = "timm/{name}.rvgg_in1k"
HUB = "hf:"  # before USER/NAME, where a file or a name may stand too


def list_models() -> list[str]:
    """Names that `create_model` knows: the family first, then PSPNets, then the paper's comparators."""
    return [*NETWORKS, *PSPNETS, *baselines.list_baselines()]


def resolve_name(name: str) -> str:
    """The name in our spelling ("RepVGG-A0" is "repvgg_a0"). Raises ValueError, listing the close ones."""
    ours = name.lower().replace("-", "_")
    if ours in list_models():
        return ours
    close = difflib.get_close_matches(ours, list_models(), n=4, cutoff=0.5)
    raise ValueError(f"no model {name!r}: " + (f"did you mean {', '.join(close)}?" if close else "see repvgg info"))


def is_family(name: str) -> bool:
    """Whether a name is a network of ours, which takes the family's options, rather than a comparator from elsewhere."""
    return resolve_name(name) in NETWORKS


def is_built_folded(name: str) -> bool:
    """Whether the deploy form of this model is built as such; that of others comes of folding."""
    name = resolve_name(name)
    return name in NETWORKS or (name in PSPNETS and PSPNETS[name].backbone in FAMILY)


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
) -> nn.Module:
    """A model in train mode: images [N, in_chans, H, W] -> logits [N, num_classes], of a PSPNet [N, num_classes, H, W].

    block: the structure of each layer in training form, a name in `repvgg.fold.blocks.BLOCKS`; by default the network's own ("repvgg",
    in the residual one "plain"). In a comparator it takes the place of each 3x3 convolution (see `replace_conv`).
    widths: channels of each layer of a pruned network of the family, the stem's first, in place of the name's own.

    pretrained: the paper's ImageNet weights from the hub; a string pins the hub repository's revision. With another number of
    classes the classifier starts anew; in a PSPNet they are the backbone's, and the heads are new. Raises ValueError for an unknown
    name or option, `FileError` if the hub cannot be reached.
    """
    name = resolve_name(name)
    arch: dict[str, Any] = {"name": name, "num_classes": num_classes, "in_chans": in_chans}
    options: dict[str, Any] = {"output_stride": output_stride, "width": width, "small_input": small_input}
    if widths and (pretrained or name not in NETWORKS):
        raise ValueError("widths are those of a pruned network of the family, and no weights were released for one")
    if name in PSPNETS:
        return _create_pspnet(arch, options, block, deploy, pretrained)
    if name not in NETWORKS:
        return _create_baseline(arch, options, block, deploy, pretrained)
    arch.update(options, block=block or NETWORKS[name].block, **({"widths": list(widths)} if widths else {}))
    if pretrained:
        return _create_pretrained(arch, deploy, "main" if pretrained is True else pretrained)
    model = RepVGG(NETWORKS[name], num_classes, in_chans, deploy, **options, block=block, widths=widths)
    return remember(model, Manifest(arch, preprocessing=default_preprocessing(arch)))


def manifest_of(model: nn.Module) -> Manifest:
    """What a file of this model would say of it. Raises ValueError for a model that `create_model` did not make."""
    manifest = vars(model).get("manifest")  # its own: a wrapper (torch.compile) would spell the tensors otherwise
    if not isinstance(manifest, Manifest):
        raise ValueError(f"{type(model).__name__} was not made by repvgg.create_model: save its state dict with safetensors")
    num_classes = _num_classes(model)
    arch = manifest.arch and {**manifest.arch, "num_classes": num_classes}
    names = manifest.classes if manifest.classes and len(manifest.classes) == num_classes else None  # else of an older classifier
    form = "deploy" if _is_folded(model) else "training"
    return replace(manifest, arch=arch, form=form, classes=names, layers=layer_list(model), keys="repvgg")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    classes: Iterable[str] | None = None,
    preprocessing: Preprocessing | None = None,
    training: dict[str, Any] | None = None,
    to_keys: str = "repvgg",
) -> None:
    """Write a model file (see checkpoint.py), whole or not at all.

    classes, preprocessing, training: what to remember with it; by default what the model already carries. to_keys: "official",
    "timm" or "mmpretrain" spell the state dict as those do. Raises `FileError` if it cannot be written, ValueError for class names
    or channels that are not the model's.
    """
    manifest = manifest_of(model)
    manifest = replace(
        manifest,
        classes=list(classes) if classes is not None else manifest.classes,
        preprocessing=preprocessing or manifest.preprocessing,
        training=training if training is not None else manifest.training,
        keys=to_keys,
    )
    tensors = model.state_dict()
    if to_keys != "repvgg":
        if to_keys not in keys.SCHEMES:
            raise ValueError(f"no key scheme {to_keys!r}: repvgg, {', '.join(keys.SCHEMES)}")
        arch = manifest.arch or {}
        if arch.get("name") not in FAMILY or not isinstance(model, RepVGG):
            raise ValueError(f"{to_keys} keys exist for the RepVGG family only")
        if "widths" in arch:
            raise ValueError(f"{to_keys} has no pruned networks")
        if manifest.form == "training" and arch["block"] != "repvgg":
            raise ValueError(f"{to_keys} has no block {arch['block']!r}: fold the model first")
        tensors = keys.to_foreign(tensors, to_keys)
        manifest = replace(manifest, layers=None)  # its tensor names would be wrong
    checkpoint.write(path, tensors, manifest)


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The model of a file, in eval mode, in the file's form and dtype, with its `manifest`.

    Reads our files, and official, timm and mmpretrain checkpoints of either form. Every tensor must find its place and every
    place its tensor: raises `FileError` otherwise. Where dtypes are mixed, the model is in the widest.
    """
    tensors, manifest = checkpoint.read(path)
    try:
        return _restore(tensors, manifest)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    except Exception as error:  # a hostile manifest may raise anything in torch's constructors
        raise FileError(f"{path}: its manifest describes no network ({describe(error)})") from None


def from_pretrained(repo_id: str, *, revision: str | None = None, token: str | None = None) -> nn.Module:
    """The model of a hub repository (its model.safetensors), in eval mode; see `repvgg.push_to_hub`.

    repo_id: USER/NAME, or USER/NAME@REVISION. revision: a branch, tag or commit. What was fetched before serves where the hub
    cannot be reached. Raises `FileError` if there is none, or what is there is no model.
    """
    repo, _, pinned = repo_id.partition("@")
    path = hub.fetch(repo, revision or pinned or "main", token=token)
    try:
        with path.open("rb") as file:
            if checkpoint.is_pickle(file.read(9)):
                raise FileError(f"{path}: is a pickle, and those of the hub are never opened")
        return load(path)
    except FileError as error:
        raise FileError(str(error).replace(str(path), f"{repo}@{revision or pinned or 'main'}")) from None


def open_model(name_or_path: str) -> nn.Module:
    """The model of a file, of a hub repository (hf:USER/NAME), or by its name the paper's pretrained weights in deploy form; in
    eval mode."""
    if name_or_path.startswith(HUB):
        return from_pretrained(name_or_path.removeprefix(HUB))
    if is_file(name_or_path):
        return load(name_or_path)
    if resolve_name(name_or_path) in PSPNETS:
        raise ValueError(f"there are no weights of {name_or_path}, only of its backbone: train it, and name the file")
    return create_model(name_or_path, pretrained=True, deploy=True).eval()


def is_file(name_or_path: str) -> bool:
    """Whether a file or a hub repository is meant, not a model's name."""
    path = Path(name_or_path)
    return name_or_path.startswith(HUB) or path.exists() or path.suffix in {".safetensors", *checkpoint.PICKLE_SUFFIXES}


def file_of(name_or_path: str) -> Path:
    """The model file that is meant; of a hub repository, its local copy."""
    if not name_or_path.startswith(HUB):
        return Path(name_or_path)
    repo, _, pinned = name_or_path.removeprefix(HUB).partition("@")
    return hub.fetch(repo, pinned or "main")


def pretrained_file(name: str, revision: str = "main") -> Path:
    """The local copy of the paper's weights for this member, fetched through the hub's cache (HF_HUB_OFFLINE is honoured).

    Raises ValueError where none were released and `FileError` if they cannot be fetched.
    """
    if name.removeprefix("repvgg_") not in PRETRAINED:
        raise ValueError(f"no weights were released for {name}; there are repvgg_{{{','.join(PRETRAINED)}}}")
    repo = HUB_REPO.format(name=name)
    return hub.cached(repo, revision) or hub.fetch(repo, revision)  # they do not change: what was fetched once needs no network


# ----------------------------------------------------------------------------------------------------------------- helpers


def _refuse_options(name: str, options: dict[str, Any], *but: str) -> None:
    """Those that differ from their defaults, `but` these."""
    defaults = {"output_stride": 32, "width": 1.0, "small_input": False}
    if wrong := [option for option, default in defaults.items() if option not in but and options[option] != default]:
        raise ValueError(f"{name} takes no {', '.join(wrong)}: these belong to the RepVGG family")


def _create_pspnet(
    arch: dict[str, Any], options: dict[str, Any], block: str | None, deploy: bool, pretrained: bool | str
) -> nn.Module:
    name, backbone = arch["name"], PSPNETS[arch["name"]].backbone
    if arch["num_classes"] < 1 or arch["in_chans"] < 1:
        raise ValueError("num_classes and in_chans are at least 1")
    if backbone not in FAMILY:
        _refuse_options(name, options)
        if block is not None:
            raise ValueError(f"{name} takes no block: it belongs to the RepVGG family")
        if isinstance(pretrained, str):
            raise ValueError(f"{name} has timm's default weights or none: pretrained=True takes no revision")
        model = create_pspnet(**arch, pretrained=pretrained)
        remember(model, Manifest(arch, preprocessing=default_preprocessing(arch)))
        return _folded(model) if deploy else model
    _refuse_options(name, options, "width")
    arch.update(width=options["width"], block=block or FAMILY[backbone].block)
    model = create_pspnet(**arch, deploy=deploy and not pretrained)
    manifest = Manifest(arch, preprocessing=default_preprocessing(arch))
    if pretrained:
        classifier = create_model(
            backbone, in_chans=arch["in_chans"], width=arch["width"], block=arch["block"], pretrained=pretrained
        )
        report = model.load_backbone(classifier.state_dict())
        manifest = replace(manifest, training={**manifest_of(classifier).training, "backbone": report})
    remember(model, manifest)
    return _folded(model) if deploy and pretrained else model


def _create_baseline(
    arch: dict[str, Any], options: dict[str, Any], block: str | None, deploy: bool, pretrained: bool | str
) -> nn.Module:
    _refuse_options(arch["name"], options)
    if isinstance(pretrained, str):
        raise ValueError(f"{arch['name']} has timm's default weights or none: pretrained=True takes no revision")
    model = baselines.create_baseline(**arch, pretrained=pretrained)
    if block is not None:
        model, arch = replace_conv(model, block, fresh=not pretrained), {**arch, "block": block}
    manifest = Manifest(arch, preprocessing=default_preprocessing(arch))
    if pretrained and arch["in_chans"] == 3:
        manifest = replace(manifest, preprocessing=_timm_preprocessing(model))
    if pretrained and arch["num_classes"] == 1000:
        manifest = replace(manifest, classes=imagenet_classes())
    remember(model, manifest)
    return _folded(model) if deploy else model


def _timm_preprocessing(model: nn.Module) -> Preprocessing:
    """What timm evaluates these weights with."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    size = config["input_size"]
    return Preprocessing(size, int(size[-1] / config["crop_pct"]), config["interpolation"], config["mean"], config["std"])


def _create_pretrained(arch: dict[str, Any], deploy: bool, revision: str) -> nn.Module:
    if arch["in_chans"] != 3 or arch["width"] != 1 or arch["small_input"] or arch["block"] != "repvgg":
        raise ValueError("pretrained weights fit in_chans=3, width=1, small_input=False and block='repvgg' only")
    model = create_model(**arch)  # first, so that nothing is fetched for options that do not fit
    source = pretrained_file(arch["name"], revision)
    tensors = load(source).state_dict()
    classes = imagenet_classes() if arch["num_classes"] == 1000 else None
    if classes is None:
        tensors.update({name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")})
    try:
        _fill(model, tensors)
    except ValueError as error:
        raise FileError(f"{source}: {error}") from None
    origin = {"source": HUB_REPO.format(name=arch["name"]), "revision": revision}
    remember(model, replace(manifest_of(model), classes=classes, training=origin))
    return _folded(model) if deploy else model


def _folded(model: nn.Module) -> nn.Module:
    return reparameterize(model.eval()).train()


def imagenet_classes() -> list[str]:
    """The thousand class names of ImageNet-1k in label order, as torchvision lists them."""
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError:
        raise ValueError("ImageNet's class names need torchvision: pip install 'repvgg[train]'") from None
    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _restore(tensors: dict[str, Tensor], manifest: Manifest | None) -> nn.Module:
    """The model that these tensors and this manifest describe, in eval mode. May raise anything."""
    scheme = manifest.keys if manifest else keys.detect(tensors)
    if scheme != "repvgg":
        if scheme not in keys.SCHEMES:
            raise ValueError(f"not a RepVGG checkpoint: its keys are none of ours, {', '.join(keys.SCHEMES)}")
        tensors = keys.to_ours(tensors, scheme)
    manifest = manifest or _manifest_from_content(tensors)
    model = _build(manifest, sum(tensor.numel() for tensor in tensors.values()))
    _fill(model, tensors)
    if manifest.arch is not None:
        manifest = replace(manifest, arch=manifest_of(model).arch)  # with the defaults of what it leaves out
    if manifest.layers is not None and manifest.layers != layer_list(model):
        raise ValueError("its list of layers is not that of its architecture")
    return remember(model.eval(), manifest)


def _manifest_from_content(tensors: dict[str, Tensor]) -> Manifest:
    arch = keys.infer_arch(tensors)
    if arch is None:
        raise ValueError("a RepVGG checkpoint, but no member of the family has these depths and widths")
    form = "deploy" if "stem.block.weight" in tensors else "training"
    classes = None
    if arch["num_classes"] == 1000:
        with suppress(ValueError):  # the names need torchvision, the weights do not
            classes = imagenet_classes()
    return Manifest(arch, form, classes, default_preprocessing(arch))


def _build(manifest: Manifest, numbers: int) -> nn.Module:
    """The network of a manifest, its tensors yet to be filled; on the meta device, where size costs nothing.

    numbers: how many the file holds. Raises what torch raises for a manifest that is no network.
    """
    arch, deploy = manifest.arch, manifest.form == "deploy"
    with torch.device("meta"):
        if arch is None:
            if not manifest.layers:
                raise ValueError("its manifest names neither an architecture nor layers")
            return PlainNet(manifest.layers)
        if arch.get("pretrained"):
            raise ValueError("its manifest asks for other weights")
        if not deploy or is_built_folded(str(arch.get("name"))):
            return create_model(**arch, deploy=deploy)
        # The deploy form of others is known only by folding one, which takes memory; so does the manifest ask for too much?
        plain = {key: value for key, value in arch.items() if key != "block"}
        if sum(tensor.numel() for tensor in create_model(**plain).state_dict().values()) > 2 * numbers:
            raise ValueError("its manifest describes a larger network than its tensors")
    return create_model(**arch, deploy=True)


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Strictly, and by assignment, so that the tensors' dtype is the model's. Old checkpoints may lack BN's batch counters."""
    own = model.state_dict()
    for name in own.keys() - tensors.keys():
        if name.endswith("num_batches_tracked"):
            tensors = {**tensors, name: torch.zeros((), dtype=torch.long)}
    missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    both = own.keys() & tensors.keys()
    misshapen = {name for name in both if own[name].shape != tensors[name].shape}
    mistyped = {name for name in both if own[name].is_floating_point() != tensors[name].is_floating_point()}
    problems = {
        "lacks": missing,
        "has an unexpected": unexpected,
        "has another shape of": misshapen,
        "has another type of": mistyped,
    }
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"does not fit its architecture: it {what} {min(names)}{more}")
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()})
    model.load_state_dict({n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}, assign=True)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the images it takes: that of its parameters; an engine, which has none, takes float32."""
    return next((p.dtype for p in model.parameters()), torch.float32)


def _num_classes(model: nn.Module) -> Any:
    """Outputs of the classifier; None for a net that ends in something else."""
    return model.layers[-1].get("out_features") if isinstance(model, PlainNet) else model.num_classes


def _is_folded(model: nn.Module) -> bool:
    if isinstance(model, RepVGG):
        return is_deploy_form(model)
    return not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())  # synchronised ones too


def default_preprocessing(arch: dict[str, Any]) -> Preprocessing:
    """What a model made with these arguments of `create_model` expects, before any data has said otherwise."""
    if arch["name"] in PSPNETS:
        return _preprocessing(arch["in_chans"], 713, 713)  # Table 8
    if arch["name"] not in NETWORKS:
        size = baselines.input_size(arch["name"])
        return _preprocessing(arch["in_chans"], size, round(size / 0.875))
    if arch.get("small_input"):
        return _preprocessing(arch["in_chans"], 32, 32)
    if arch["name"] == "repvgg_d2se":
        return _preprocessing(arch["in_chans"], 320, 320)
    return _preprocessing(arch["in_chans"], 224, 256)


def _preprocessing(channels: int, size: int, resize: int) -> Preprocessing:
    if channels == 3:
        return Preprocessing((3, size, size), resize)
    return Preprocessing((channels, size, size), resize, mean=(0.5,) * channels, std=(0.5,) * channels)


def remember(model: nn.Module, manifest: Manifest) -> nn.Module:
    """Let the model carry what a file of it should say."""
    model.manifest = manifest  # type: ignore[assignment]
    return model
