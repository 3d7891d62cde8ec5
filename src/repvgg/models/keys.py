"""State-dict keys of other RepVGG implementations: the official code (and its RepVGGplus), timm and mmpretrain, in both forms.

One list of substitutions a scheme, from our keys to theirs; the way back is the same list inverted, and a key counts as
translated only if it comes back as it was, so that a round trip cannot lose anything.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from repvgg.models.names import FAMILY

HALF = 12  # of the 24 layers in the third stage of RepVGGplus, which has a head in the middle and writes it as two


@dataclass(frozen=True)
class Scheme:
    """The spelling of our keys in another implementation, and what gives its checkpoints away.

    marker: a regular expression that one of its keys matches, wherever the network lies in a larger one. stages: the prefix of each
    of our four stages; one with two stands for two halves of a stage. parts: ours and theirs, of which the first that fits counts.
    """

    marker: str
    stem: str
    stages: tuple[str | tuple[str, str], ...]
    parts: tuple[tuple[str, str], ...]

    def layer(self, stage: int, index: int) -> str:
        """Return their prefix of a layer: of our stage 0 to 3, and of its place in there."""
        prefix = self.stages[stage]
        if isinstance(prefix, tuple):
            prefix, index = prefix[index >= HALF], index % HALF if index < 2 * HALF else index
        return f"{prefix}{index}."

    def place(self, key: str) -> tuple[str, str]:
        """Return our prefix of the layer that one of their keys is of, and the rest of the key; "" and the key if there is none."""
        for stage, prefixes in enumerate(self.stages):
            for half, prefix in enumerate(prefixes if isinstance(prefixes, tuple) else (prefixes,)):
                if m := re.match(rf"{re.escape(prefix)}(\d+)\.", key):
                    return f"stages.{stage}.{int(m[1]) + half * HALF}.", key[m.end() :]
        return "", key


AVERAGED = re.compile(r"(^|[._])ema")  # how averaged copies are called
SCHEMES = {
    "official": Scheme(
        marker=r"stage1\.0\.rbr_",
        stem="stage0",
        stages=("stage1.", "stage2.", "stage3.", "stage4."),
        parts=(
            ("block.conv_kxk.", "rbr_dense."),
            ("block.conv_1x1.", "rbr_1x1."),
            ("block.identity.", "rbr_identity."),
            ("block.", "rbr_reparam."),
            ("se.reduce.", "se.down."),
            ("se.expand.", "se.up."),
            ("head.", "linear."),
        ),
    ),
    "repvggplus": Scheme(
        marker=r"stage1\.blocks\.0\.rbr_",
        stem="stage0",
        stages=("stage1.blocks.", "stage2.blocks.", ("stage3_first.blocks.", "stage3_second.blocks."), "stage4.blocks."),
        parts=(
            ("block.conv_kxk.", "rbr_dense."),
            ("block.conv_1x1.", "rbr_1x1."),
            ("block.identity.", "rbr_identity."),
            ("block.", "rbr_reparam."),
            ("se.reduce.", "post_se.down."),
            ("se.expand.", "post_se.up."),
            *(
                (f"auxiliary.{head}.{ours}.", f"{head}_aux.{theirs}.")
                for head in ("stage1", "stage2", "stage3_first")
                for ours, theirs in (("conv", "0.conv"), ("bn", "0.bn"), ("fc", "3"))
            ),
            ("head.", "linear."),
        ),
    ),
    "timm": Scheme(
        marker=r"stem\.(conv_kxk\.conv|reparam_conv)\.",
        stem="stem",
        stages=("stages.0.", "stages.1.", "stages.2.", "stages.3."),
        parts=(
            ("block.conv_kxk.", "conv_kxk."),
            ("block.conv_1x1.", "conv_1x1."),
            ("block.identity.", "identity."),
            ("block.", "reparam_conv."),
            ("se.reduce.", "attn.fc1."),
            ("se.expand.", "attn.fc2."),
            ("head.", "head.fc."),
        ),
    ),
    "mmpretrain": Scheme(
        marker=r"(backbone\.)?stem\.branch_",
        stem="backbone.stem",
        stages=("backbone.stage_1.", "backbone.stage_2.", "backbone.stage_3.", "backbone.stage_4."),
        parts=(
            ("block.conv_kxk.conv.", "branch_3x3.conv."),
            ("block.conv_kxk.bn.", "branch_3x3.norm."),
            ("block.conv_1x1.conv.", "branch_1x1.conv."),
            ("block.conv_1x1.bn.", "branch_1x1.norm."),
            ("block.identity.", "branch_norm."),
            ("block.", "branch_reparam."),
            ("se.reduce.", "se_layer.conv1.conv."),
            ("se.expand.", "se_layer.conv2.conv."),
            ("head.", "head.fc."),
        ),
    ),
}


def to_foreign(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """Return our state dict in another scheme's keys: `stages.0.1.block.weight` -> `stage1.1.rbr_reparam.weight` (official)."""
    return {_foreign(key, SCHEMES[scheme]): tensor for key, tensor in tensors.items()}


def to_ours(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """Return another scheme's state dict in our keys. Keys that the scheme does not know stay: a strict load finds them.

    Raises ValueError for two keys that mean the same tensor.
    """
    ours = {_ours(key, SCHEMES[scheme]): tensor for key, tensor in tensors.items()}
    if len(ours) < len(tensors):
        raise ValueError(f"some of its tensors are there twice, in {scheme} keys and in ours")
    return ours


def _foreign(key: str, s: Scheme) -> str:
    ours, theirs = next((part for part in s.parts if part[0] in key), ("", ""))
    key = key.replace(ours, theirs, 1) if ours else key
    if key.startswith("stem."):
        return s.stem + key.removeprefix("stem")
    return re.sub(r"^stages\.(\d)\.(\d+)\.", lambda m: s.layer(int(m[1]), int(m[2])), key)


def _ours(key: str, s: Scheme) -> str:
    ours = re.sub(rf"^{re.escape(s.stem)}\.", "stem.", key)
    ours = "".join(s.place(ours))
    for part, theirs in s.parts:
        # A part follows the layer's index, or opens the key (the classifier).
        ours, found = re.subn(rf"(^|\.){re.escape(theirs)}", rf"\g<1>{part}", ours, count=1)
        if found:
            break
    return ours if _foreign(ours, s) == key else key


@dataclass(frozen=True)
class Place:
    """The place of a network in a checkpoint: whose keys it has, and the prefix before each ("module.", "model.encoder.")."""

    scheme: str
    prefix: str


def locate(keys: Iterable[str]) -> Place | None:
    """Find a RepVGG among the keys of a foreign checkpoint; None where there is none. An averaged copy goes before the last."""
    keys = list(keys)
    markers = {"repvgg": r"stem\.block\.", **{name: s.marker for name, s in SCHEMES.items()}}
    found = [
        Place(scheme, m[1])
        for scheme, marker in markers.items()
        for key in keys
        if (m := re.match(rf"((?:[^.]+\.)*?){marker}", key))
    ]
    return min(found, key=lambda place: (not AVERAGED.search(place.prefix), len(place.prefix)), default=None)


def network_at(tensors: Mapping[str, Tensor], place: Place) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of the network at this place, without its prefix, and the names of those that are left out.

    `id_tensor` buffers, which old versions of timm and of the official code leaked, are left out everywhere.
    """
    inside = {name.removeprefix(place.prefix): t for name, t in tensors.items() if name.startswith(place.prefix)}
    kept = {name: t for name, t in inside.items() if not name.endswith("id_tensor")}
    if place.scheme == "mmpretrain" and not any(name.startswith("backbone.") for name in kept):
        kept = {name if name.startswith("head.") else f"backbone.{name}": t for name, t in kept.items()}
    left_out = [name for name in tensors if not name.startswith(place.prefix) or name.endswith("id_tensor")]
    return kept, left_out


def infer_arch(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the `create_model` arguments that fit a state dict in our keys, or None: read off the shapes of its tensors."""
    weights: dict[tuple[int, int], Tensor] = {}
    for key, tensor in tensors.items():
        if (m := re.fullmatch(r"stages\.(\d)\.(\d+)\.block\.(?:conv_kxk\.conv\.)?weight", key)) and tensor.dim() == 4:
            weights[int(m[1]), int(m[2])] = tensor
    stem = next((t for k, t in tensors.items() if re.fullmatch(r"stem\.block\.(conv_kxk\.conv\.)?weight", k)), None)
    head = tensors.get("head.weight")  # a backbone has none
    if stem is None or stem.dim() != 4 or (head is not None and head.dim() != 2):
        return None
    depths = tuple(sum(1 for stage, _ in weights if stage == s) for s in range(4))
    gate = tensors.get("stages.3.0.se.reduce.weight")
    hidden = None if gate is None else gate.shape[0]
    widths = (stem.shape[0], *(weights[s, 0].shape[0] for s in range(4) if (s, 0) in weights))
    fitting = {
        name: width
        for name, member in FAMILY.items()
        if depths == member.depths
        and hidden == (max(1, widths[-1] // member.reduction) if member.squeeze_excite else None)
        and 0 < (width := widths[-1] / (512 * member.b)) <= 16
        and member.widths(width) == widths
        and _groups(weights, widths) == member.groups
    }
    if not fitting:
        return None
    name = min(fitting, key=lambda name: abs(fitting[name] - 1))  # B2 is B1 with width=1.25, but nobody calls it that
    return {
        "name": name,
        "num_classes": 0 if head is None else head.shape[0],
        "in_chans": stem.shape[1],
        "width": fitting[name],
        "small_input": "stages.0.0.block.identity.weight" in tensors,
    }


def _groups(weights: dict[tuple[int, int], Tensor], widths: tuple[int, ...]) -> int:
    """Return the groups of the third layer, counting the stem as the first: the second of stage 2."""
    third = weights.get((0, 1))
    return widths[1] // third.shape[1] if third is not None and third.shape[1] else 1
