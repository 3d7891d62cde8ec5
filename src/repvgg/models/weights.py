"""Tensors into networks, strictly: every tensor finds its place and every place its tensor, whoever wrote the file."""

import os
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from repvgg.disk import FileError
from repvgg.models import checkpoint, keys
from repvgg.models.manifest import Manifest


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Manifest | None, list[str]]:
    """Return a model file's tensors in our keys, its manifest (None in a stranger's file), and what was left out of that.

    In a stranger's file the network is found by its keys, wherever it lies. Raises `FileError`.
    """
    tensors, manifest = checkpoint.read(path)
    left_out: list[str] = []
    try:
        if manifest is None:
            place = keys.locate(tensors)
            if place is not None:
                tensors, left_out = keys.network_at(tensors, place)
            scheme = place.scheme if place else None
        else:
            scheme = manifest.keys
        if scheme not in ("repvgg", *keys.SCHEMES):
            raise ValueError(f"not a RepVGG checkpoint: its keys are none of ours, {', '.join(keys.SCHEMES)}")
        return tensors if scheme == "repvgg" else keys.to_ours(tensors, scheme), manifest, left_out
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model these tensors, by assignment, so that their dtype (the widest of them) is the model's.

    Old checkpoints may lack a batch norm's counter. Raises ValueError naming the first tensor that does not fit.
    """
    own = model.state_dict()
    counters = {name for name in own.keys() - tensors.keys() if name.endswith("num_batches_tracked")}
    tensors = {**tensors, **{name: torch.zeros((), dtype=torch.long) for name in counters}}
    both = own.keys() & tensors.keys()
    problems = {
        "lacks": own.keys() - tensors.keys(),
        "has an unexpected": tensors.keys() - own.keys(),
        "has another shape of": {name for name in both if own[name].shape != tensors[name].shape},
        "has another type of": {name for name in both if own[name].is_floating_point() != tensors[name].is_floating_point()},
    }
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"does not fit its architecture: it {what} {min(names)}{more}")
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()})
    model.load_state_dict({n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}, assign=True)
