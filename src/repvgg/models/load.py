"""Model files and hub repositories, opened and saved: save, load, from_pretrained, open_model."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.disk import FileError, Log, describe, out_of_memory
from repvgg.models import checkpoint, hub, keys, weights
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import FAMILY, NETWORKS, embedded, in_run_folder, resolve_name, task_of
from repvgg.models.plain import LARGEST_INPUT, PlainNet, layer_list, set_largest_inputs
from repvgg.models.pretrained import imagenet_classes
from repvgg.models.repvgg import RepVGG
from repvgg.models.zoo import create_model, default_preprocessing, is_built_folded, manifest_of, remember

HUB = "hf:"  # before USER/NAME, where a file or a name may stand too
LEFT_OUT = "left_out"  # of a manifest's `training`: what the file of a stranger held beside the network


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
    scheme = _scheme(model, manifest, to_keys)
    facts = manifest.training if training is None else training
    manifest = replace(
        manifest,
        classes=list(classes) if classes is not None else manifest.classes,
        preprocessing=preprocessing or manifest.preprocessing,
        training={name: fact for name, fact in facts.items() if name != LEFT_OUT},  # that was of another file
        keys=scheme,
    )
    tensors = model.state_dict()
    if scheme != "repvgg":
        tensors = keys.to_foreign(tensors, scheme)
        manifest = replace(manifest, layers=None)  # its tensor names would be wrong
    checkpoint.write(path, tensors, manifest)


def _scheme(model: nn.Module, manifest: Manifest, to_keys: str) -> str:
    """Return the scheme that spells this model in the keys asked for. Raises ValueError where there is none."""
    if to_keys == "repvgg":
        return to_keys
    if to_keys not in keys.SCHEMES:
        raise ValueError(f"no key scheme {to_keys!r}: repvgg, {', '.join(keys.SCHEMES)}")
    arch = manifest.arch or {}
    if arch.get("name") not in FAMILY or not isinstance(model, RepVGG):
        raise ValueError(f"{to_keys} keys exist for the RepVGG family only")
    if "widths" in arch:
        raise ValueError(f"{to_keys} has no pruned networks")
    if manifest.form == "training" and arch["block"] != "repvgg":
        raise ValueError(f"{to_keys} has no block {arch['block']!r}: fold the model first")
    plus = FAMILY[arch["name"]].plus
    if to_keys not in (("official", "repvggplus") if plus else set(keys.SCHEMES) - {"repvggplus"}):
        raise ValueError(f"{to_keys} has no {arch['name']}")
    return "repvggplus" if plus else to_keys


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Return the model of a file, in eval mode, in the file's form and dtype, with its `manifest`.

    Reads our files, and official, timm and mmpretrain checkpoints of either form. Every tensor must find its place and every
    place its tensor: raises `FileError` otherwise. What a stranger's file holds beside the network is left out, and named in
    `manifest.training["left_out"]`. Where dtypes are mixed, the model is in the widest. A run folder stands for its best model.
    """
    path = in_run_folder(path)
    tensors, manifest, left_out = weights.read(path)
    try:
        return _restore(tensors, manifest or _manifest_from_content(tensors, left_out))
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    except Exception as error:  # a hostile manifest may raise anything in torch's constructors
        if out_of_memory(error):
            raise
        raise FileError(f"{path}: its manifest describes no network ({describe(error)})") from None


def from_pretrained(repo_id: str, *, revision: str | None = None, token: str | None = None) -> nn.Module:
    """Return the model of a hub repository (its model.safetensors), in eval mode; see `repvgg.push_to_hub`.

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
    """Return the model of a file, of a hub repository (hf:USER/NAME), of the package itself, or a name's pretrained weights folded.

    It is in eval mode. One of the package is stored in float16, and computes in float32.
    """
    if file := embedded(name_or_path):
        return load(file).float()
    if name_or_path.startswith(HUB):
        return from_pretrained(name_or_path.removeprefix(HUB))
    if is_file(name_or_path):
        return load(name_or_path)
    if task_of(resolve_name(name_or_path)) == "masks":
        raise ValueError(f"there are no weights of {name_or_path}, only of its backbone: train it, and name the file")
    return create_model(name_or_path, pretrained=True, deploy=True).eval()


def tell_left_out(model: nn.Module, log: Log) -> None:
    """Say what the file that a model was opened from held beside the network."""
    if left_out := manifest_of(model).training.get(LEFT_OUT):
        log(f"left out, as no part of the network: {left_out}")


def is_file(name_or_path: str) -> bool:
    """Say whether a file, of the package too, or a hub repository is meant, not the name of a kind of model."""
    path, known = Path(name_or_path), {".safetensors", *checkpoint.PICKLE_SUFFIXES}
    return bool(embedded(name_or_path)) or name_or_path.startswith(HUB) or path.exists() or path.suffix in known


def file_of(name_or_path: str) -> Path:
    """Return the path of the model file that is meant; of a hub repository, its local copy."""
    if not name_or_path.startswith(HUB):
        return embedded(name_or_path) or in_run_folder(name_or_path)
    repo, _, pinned = name_or_path.removeprefix(HUB).partition("@")
    return hub.fetch(repo, pinned or "main")


def _restore(tensors: dict[str, Tensor], manifest: Manifest) -> nn.Module:
    """Return the model that these tensors and this manifest describe, in eval mode. May raise anything."""
    model = _build(manifest, sum(tensor.numel() for tensor in tensors.values()))
    weights.fill(model, tensors)
    if manifest.layers is not None and len(manifest.layers) == len(layer_list(model) or []):
        set_largest_inputs(model, [spec.get(LARGEST_INPUT) for spec in manifest.layers])
    if manifest.arch is not None:
        manifest = replace(manifest, arch=manifest_of(model).arch)  # with the defaults of what it leaves out
    if manifest.layers is not None and manifest.layers != layer_list(model):
        raise ValueError("its list of layers is not that of its architecture")
    return remember(model.eval(), manifest)


def _manifest_from_content(tensors: dict[str, Tensor], left_out: list[str]) -> Manifest:
    """Return the manifest of a stranger's file. left_out: tensors of the file that are not the network's."""
    arch = keys.infer_arch(tensors)
    if arch is None:
        raise ValueError("a RepVGG checkpoint, but no member of the family has these depths and widths")
    form = "deploy" if "stem.block.weight" in tensors else "training"
    classes = None
    if arch["num_classes"] == 1000:
        with suppress(ValueError):  # the names need torchvision, the weights do not
            classes = imagenet_classes()
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    training = {LEFT_OUT: f"{min(left_out)}{more}"} if left_out else {}
    return Manifest(arch, form, classes, default_preprocessing(arch), training)


def _build(manifest: Manifest, numbers: int) -> nn.Module:
    """Return the network of a manifest, its tensors yet to be filled; on the meta device, where size costs nothing.

    numbers: how many the file holds. Raises what torch raises for a manifest that is no network.
    """
    arch, deploy = manifest.arch, manifest.form == "deploy"
    if arch and arch.get("num_classes") == 0 and arch.get("name") in NETWORKS:
        arch = {"global_pool": "", **arch}  # what a network without a classifier did when files did not say
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
