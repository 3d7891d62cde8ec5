"""Checkpoints as other implementations write them: timm's own networks, narrowed, and their tensors in the others' keys."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from safetensors.torch import save_file
from torch import Tensor, nn

NUM_CLASSES = 7
# Every member that timm has: the multiplier a of Table 3, and a width at which all channels are multiples of 8 (timm rounds).
NARROW = {
    "repvgg_a0": (0.75, 1 / 2),
    "repvgg_a1": (1, 1 / 8),
    "repvgg_a2": (1.5, 1 / 4),
    "repvgg_b0": (1, 1 / 8),
    "repvgg_b1": (2, 1 / 16),
    "repvgg_b1g4": (2, 1 / 16),
    "repvgg_b2": (2.5, 0.1),
    "repvgg_b2g4": (2.5, 0.1),
    "repvgg_b3": (3, 1 / 8),
    "repvgg_b3g4": (3, 1 / 8),
    "repvgg_d2se": (2.5, 0.1),
}
SCHEMES = ("official", "timm", "mmpretrain")
FORMS = ("training", "deploy")

# From timm's keys to the others', as their sources spell them.
RENAMES: dict[str, list[tuple[str, str | Callable[[re.Match[str]], str]]]] = {
    "timm": [],
    "official": [
        (r"^stem\.", "stage0."),
        (r"^stages\.(\d)", lambda m: f"stage{int(m[1]) + 1}"),
        (r"\.conv_kxk\.", ".rbr_dense."),
        (r"\.conv_1x1\.", ".rbr_1x1."),
        (r"\.identity\.", ".rbr_identity."),
        (r"\.reparam_conv\.", ".rbr_reparam."),
        (r"\.attn\.fc1\.", ".se.down."),
        (r"\.attn\.fc2\.", ".se.up."),
        (r"^head\.fc\.", "linear."),
    ],
    "mmpretrain": [
        (r"^stem\.", "backbone.stem."),
        (r"^stages\.(\d)", lambda m: f"backbone.stage_{int(m[1]) + 1}"),
        (r"\.conv_(?:kxk)\.bn\.", ".branch_3x3.norm."),
        (r"\.conv_(?:kxk)\.conv\.", ".branch_3x3.conv."),
        (r"\.conv_1x1\.bn\.", ".branch_1x1.norm."),
        (r"\.conv_1x1\.conv\.", ".branch_1x1.conv."),
        (r"\.identity\.", ".branch_norm."),
        (r"\.reparam_conv\.", ".branch_reparam."),
        (r"\.attn\.fc(\d)\.", r".se_layer.conv\1.conv."),
    ],
}


@cache
def timm_net(name: str, form: str = "training") -> nn.Module:
    """timm's network at a narrow width, on random statistics, in eval mode. Shared between tests: not to be changed."""
    if form == "deploy":
        utils = pytest.importorskip("timm.utils.model")
        return utils.reparameterize_model(timm_net(name))  # type: ignore[no-any-return]
    torch.manual_seed(0)
    return randomize(timm_architecture(name, NARROW[name][1]))


def timm_architecture(name: str, width: float) -> nn.Module:
    """timm's network with all its channels times `width`, freshly initialised."""
    byobnet = pytest.importorskip("timm.models.byobnet")
    whole = byobnet.model_cfgs[name]
    blocks = tuple(replace(block, c=block.c * width) for block in whole.blocks)
    narrow = replace(whole, blocks=blocks, stem_chs=round(min(64, 64 * NARROW[name][0] * width)))
    net: nn.Module = byobnet.ByobNet(narrow, num_classes=NUM_CLASSES)
    return net


def state(name: str, form: str, scheme: str = "timm") -> dict[str, Tensor]:
    """A state dict as `scheme` would write it."""
    return {in_keys(key, scheme): tensor for key, tensor in timm_net(name, form).state_dict().items()}


def in_keys(key: str, scheme: str) -> str:
    """timm's key in another scheme."""
    for pattern, theirs in RENAMES[scheme]:
        key = re.sub(pattern, theirs, key)
    return key


def _prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _decoy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor + 1 for key, tensor in tensors.items()}


# Files in which the world's training scripts leave such a state dict.
CONTAINERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "bare.safetensors": lambda s, path: save_file(s, path),
    "prefixed.safetensors": lambda s, path: save_file(_prefixed(s, "module."), path),
    "bare.pth": lambda s, path: torch.save(s, path),
    "legacy.pth": lambda s, path: torch.save(s, path, _use_new_zipfile_serialization=False),
    "safetensors_called.pth": lambda s, path: save_file(s, path),
    "pickle_called.safetensors": lambda s, path: torch.save(s, path),
    "state_dict.pth.tar": lambda s, path: torch.save({"state_dict": s, "epoch": 119, "best": 71.9}, path),
    "model.pt": lambda s, path: torch.save({"model": s, "optimizer": {"lr": 0.1}}, path),
    "ema.pth": lambda s, path: torch.save({"state_dict": _decoy(s), "state_dict_ema": s}, path),
    "nested.ckpt": lambda s, path: torch.save({"model": {"state_dict": _prefixed(s, "module.")}}, path),
    "compiled.bin": lambda s, path: torch.save({"model": _prefixed(s, "_orig_mod.")}, path),
    "parallel_compiled.pth": lambda s, path: torch.save(_prefixed(s, "module._orig_mod."), path),
    "parameters.pth": lambda s, path: torch.save({k: _parameter(t) for k, t in s.items()}, path),
}


def _parameter(tensor: Tensor) -> Any:
    return nn.Parameter(tensor) if tensor.is_floating_point() else tensor
