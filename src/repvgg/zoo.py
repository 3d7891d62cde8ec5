"""Models by name, and model files: list_models, create_model, save, load; pretrained weights from the hub."""

import difflib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg import baselines, files, keys
from repvgg.files import FileError, Manifest, Preprocessing
from repvgg.models import FAMILY, PlainNet, RepVGG, is_deploy_form, layer_list
from repvgg.reparam import reparameterize

# The paper's weights as timm publishes them, in timm's keys.
PRETRAINED = ("a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4", "d2se")
HUB_REPO = "timm/{name}.rvgg_in1k"


def list_models() -> list[str]:
    """Names that `create_model` knows: the family first, then the paper's comparators."""
    return [*FAMILY, *baselines.list_baselines()]


def resolve_name(name: str) -> str:
    """The name in our spelling ("RepVGG-A0" is "repvgg_a0"). Raises ValueError, listing the close ones."""
    ours = name.lower().replace("-", "_")
    if ours in list_models():
        return ours
    close = difflib.get_close_matches(ours, list_models(), n=4, cutoff=0.5)
    raise ValueError(f"no model {name!r}: " + (f"did you mean {', '.join(close)}?" if close else "see repvgg info"))


def is_family(name: str) -> bool:
    """Whether a name is a RepVGG of ours, rather than a comparator."""
    return resolve_name(name) in FAMILY


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
    block: str = "repvgg",
) -> nn.Module:
    """A model in train mode: images [N, in_chans, H, W] -> logits [N, num_classes].

    pretrained: the paper's ImageNet weights from the hub; a string pins the hub repository's revision. With another number of
    classes the classifier starts anew. Raises ValueError for an unknown name or option, `FileError` if the hub cannot be reached.
    """
    name = resolve_name(name)
    arch: dict[str, Any] = {"name": name, "num_classes": num_classes, "in_chans": in_chans}
    options: dict[str, Any] = {"output_stride": output_stride, "width": width, "small_input": small_input, "block": block}
    if name not in FAMILY:
        return _create_baseline(arch, options, deploy, pretrained)
    arch.update(options)
    if pretrained:
        return _create_pretrained(arch, deploy, "main" if pretrained is True else pretrained)
    model = RepVGG(FAMILY[name], num_classes, in_chans, deploy, **options)
    return remember(model, Manifest(arch, preprocessing=default_preprocessing(arch)))


def manifest_of(model: nn.Module) -> Manifest:
    """What a file of this model would say of it. Raises ValueError for a model that `create_model` did not make."""
    manifest = getattr(model, "manifest", None)
    if not isinstance(manifest, Manifest):
        raise ValueError(f"{type(model).__name__} was not made by repvgg.create_model: save its state dict with safetensors")
    arch = manifest.arch and {**manifest.arch, "num_classes": getattr(model, "num_classes", manifest.arch["num_classes"])}
    form = "deploy" if _is_folded(model) else "training"
    return replace(manifest, arch=arch, form=form, layers=layer_list(model), keys="repvgg")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    classes: Iterable[str] | None = None,
    preprocessing: Preprocessing | None = None,
    training: dict[str, Any] | None = None,
    to_keys: str = "repvgg",
) -> None:
    """Write a model file (see files.py), whole or not at all.

    classes, preprocessing, training: what to remember with it; by default what the model already carries. to_keys: "official",
    "timm" or "mmpretrain" spell the state dict as those do. Raises `FileError` if it cannot be written.
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
        if not isinstance(model, RepVGG):
            raise ValueError(f"{to_keys} keys exist for the RepVGG family only")
        tensors = {keys.to_foreign(name, to_keys): tensor for name, tensor in tensors.items()}
        manifest = replace(manifest, layers=None)  # its tensor names would be wrong
    files.write(path, tensors, manifest)


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The model of a file, in eval mode, in the file's form and dtype, with its `manifest`.

    Reads our files, and official, timm and mmpretrain checkpoints of either form. Every tensor must find its place and every
    place its tensor: raises `FileError` otherwise.
    """
    tensors, manifest = files.read(path)
    scheme = manifest.keys if manifest else keys.detect(tensors)
    if scheme is None:
        raise FileError(f"{path}: not a RepVGG checkpoint: its keys are none of {', '.join(keys.SCHEMES)}, or ours")
    if scheme != "repvgg":
        renamed = keys.to_ours(tensors, scheme) if scheme in keys.SCHEMES else {}
        tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    if manifest is None:
        manifest = _manifest_from_content(path, tensors)
    try:
        with torch.device("meta"):
            model = _build(manifest)
        _fill(model, tensors)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OverflowError, MemoryError) as error:
        raise FileError(f"{path}: {str(error).splitlines()[0][:300]}") from None
    return remember(model.eval(), manifest)


def open_model(name_or_path: str) -> nn.Module:
    """The model of a file, or by its name the paper's pretrained weights in deploy form; in eval mode."""
    if Path(name_or_path).exists() or Path(name_or_path).suffix in {".safetensors", *files.PICKLE_SUFFIXES}:
        return load(name_or_path)
    return create_model(name_or_path, pretrained=True, deploy=True).eval()


def pretrained_file(name: str, revision: str = "main") -> Path:
    """The local copy of the paper's weights for this member, fetched through the hub's cache (HF_HUB_OFFLINE is honoured).

    Raises ValueError where none were released and `FileError` if they cannot be fetched.
    """
    if name.removeprefix("repvgg_") not in PRETRAINED:
        raise ValueError(f"no weights were released for {name}; there are repvgg_{{{','.join(PRETRAINED)}}}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError("pretrained weights need huggingface_hub: pip install 'repvgg[train]'") from None
    repo = HUB_REPO.format(name=name)
    try:
        return Path(hf_hub_download(repo, "model.safetensors", revision=revision))
    except LocalEntryNotFoundError:
        raise FileError(
            f"{repo}: not in the local cache, and the hub cannot be reached: check the connection or HF_HUB_OFFLINE"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileError(f"{repo}: cannot be fetched ({str(error).splitlines()[0][:200]})") from None


# ----------------------------------------------------------------------------------------------------------------- helpers


def _create_baseline(arch: dict[str, Any], options: dict[str, Any], deploy: bool, pretrained: bool | str) -> nn.Module:
    family_only = {"output_stride": 32, "width": 1.0, "small_input": False, "block": "repvgg"}
    if wrong := [name for name, default in family_only.items() if options[name] != default]:
        raise ValueError(f"{arch['name']} takes no {', '.join(wrong)}: these belong to the RepVGG family")
    model = baselines.create_baseline(**arch, pretrained=bool(pretrained))
    model = reparameterize(model.eval()) if deploy else model
    return remember(model, Manifest(arch, preprocessing=default_preprocessing(arch)))


def _create_pretrained(arch: dict[str, Any], deploy: bool, revision: str) -> nn.Module:
    source = pretrained_file(arch["name"], revision)
    if arch["in_chans"] != 3 or arch["width"] != 1 or arch["small_input"] or arch["block"] != "repvgg":
        raise ValueError("pretrained weights fit in_chans=3, width=1, small_input=False and block='repvgg' only")
    tensors, _ = files.read(source)
    names = keys.to_ours(tensors, "timm")
    model = create_model(**{**arch, "num_classes": 1000})
    try:
        _fill(model, {names.get(name, name): tensor for name, tensor in tensors.items()})
    except (ValueError, RuntimeError) as error:
        raise FileError(f"{source}: {str(error).splitlines()[0][:300]}") from None
    manifest = replace(manifest_of(model), classes=imagenet_classes(), training={"source": HUB_REPO.format(name=arch["name"])})
    if arch["num_classes"] != 1000:
        assert isinstance(model, RepVGG)
        model.reset_classifier(arch["num_classes"])
        manifest = replace(manifest, arch=arch, classes=None)
    return remember(reparameterize(model.eval()) if deploy else model, manifest)


def imagenet_classes() -> list[str]:
    """The thousand class names of ImageNet-1k in label order, as torchvision lists them."""
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError:
        raise ValueError("ImageNet's class names need torchvision: pip install 'repvgg[train]'") from None
    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _manifest_from_content(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> Manifest:
    arch = keys.infer_arch(tensors)
    if arch is None:
        raise FileError(f"{path}: a RepVGG checkpoint, but no member of the family has these depths and widths")
    form = "deploy" if "stem.block.weight" in tensors else "training"
    classes = imagenet_classes() if arch["num_classes"] == 1000 else None
    return Manifest({**arch}, form, classes, default_preprocessing(arch))


def _build(manifest: Manifest) -> nn.Module:
    if manifest.arch is None:
        if not manifest.layers:
            raise ValueError("its manifest names neither an architecture nor layers")
        return PlainNet(manifest.layers)
    arch = dict(manifest.arch)
    if arch.get("pretrained"):
        raise ValueError("its manifest asks for other weights")
    if resolve_name(str(arch.get("name"))) in FAMILY:
        return create_model(**arch, deploy=manifest.form == "deploy")
    with torch.device("cpu"):  # a baseline's deploy form is known only by folding one
        return create_model(**arch, deploy=manifest.form == "deploy")


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Strictly, and by assignment, so that the tensors' dtype is the model's. Old checkpoints may lack BN's batch counters."""
    own = model.state_dict()
    for name in own.keys() - tensors.keys():
        if name.endswith("num_batches_tracked"):
            tensors = {**tensors, name: torch.zeros((), dtype=torch.long)}
    wrong = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    for what, names in (("lacks", missing), ("has an unexpected", unexpected), ("has another shape of", wrong)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"does not fit its architecture: it {what} {min(names)}{more}")
    model.load_state_dict(tensors, assign=True)


def _is_folded(model: nn.Module) -> bool:
    if isinstance(model, RepVGG):
        return is_deploy_form(model)
    return not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def default_preprocessing(arch: dict[str, Any]) -> Preprocessing:
    """What a model made with these arguments of `create_model` expects, before any data has said otherwise."""
    if arch["name"] not in FAMILY:
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
