"""State-dict keys of other RepVGG implementations: the official code, timm and mmpretrain, in both forms.

One list of substitutions a scheme, from our keys to theirs; the way back is the same list applied to every key of the model at
hand, inverted, so that a round trip cannot lose anything.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from repvgg.models import FAMILY


@dataclass(frozen=True)
class Scheme:
    """How a key of ours is spelled elsewhere, and what gives such a checkpoint away."""

    marker: str  # a regular expression that only this scheme's keys match
    stem: str
    stage: str  # of stage {n} (1 to 4)
    parts: tuple[tuple[str, str], ...]
    first_stage: int = 1  # how the scheme numbers our first stage


SCHEMES = {
    "official": Scheme(
        marker=r"^stage0\.rbr_",
        stem="stage0",
        stage="stage",
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
    "timm": Scheme(
        marker=r"^stem\.(conv_kxk|reparam_conv)\.",
        stem="stem",
        stage="stages.",
        first_stage=0,
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
        marker=r"^backbone\.stem\.branch_",
        stem="backbone.stem",
        stage="backbone.stage_",
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


def to_foreign(key: str, scheme: str) -> str:
    """Our key in another scheme: `stages.0.1.block.weight` -> `stage1.1.rbr_reparam.weight` (official)."""
    s = SCHEMES[scheme]
    for ours, theirs in s.parts:
        if ours in key:
            key = key.replace(ours, theirs)
            break
    if key.startswith("stem."):
        return s.stem + key.removeprefix("stem")
    return re.sub(r"^stages\.(\d)\.", lambda m: f"{s.stage}{int(m[1]) + s.first_stage}.", key)


def to_ours(keys: Iterable[str], scheme: str) -> dict[str, str]:
    """Foreign key -> our key, for the keys that we know."""
    s = SCHEMES[scheme]
    result = {}
    for key in keys:
        ours = key
        if ours.startswith(s.stem + "."):
            ours = "stem" + ours.removeprefix(s.stem)
        elif m := re.match(rf"{re.escape(s.stage)}(\d)\.", ours):
            ours = f"stages.{int(m[1]) - s.first_stage}." + ours[m.end() :]
        # The part follows the layer's index, or opens the key (the classifier).
        for part, theirs in s.parts:
            if re.search(rf"(^|\.){re.escape(theirs)}", ours):
                ours = re.sub(rf"(^|\.){re.escape(theirs)}", rf"\g<1>{part}", ours, count=1)
                break
        if to_foreign(ours, scheme) == key:
            result[key] = ours
    return result


def detect(keys: Iterable[str]) -> str | None:
    """The scheme of a foreign checkpoint ("repvgg" for our own keys), or None if it is none that we know."""
    keys = list(keys)
    if any(k.startswith("stem.block.") for k in keys):
        return "repvgg"
    return next((name for name, s in SCHEMES.items() if any(re.match(s.marker, k) for k in keys)), None)


def infer_arch(tensors: dict[str, Tensor]) -> dict[str, object] | None:
    """`create_model` arguments that fit a state dict in our keys, or None: read off the shapes of its tensors."""
    weights: dict[tuple[int, int], Tensor] = {}
    for key, tensor in tensors.items():
        if (m := re.fullmatch(r"stages\.(\d)\.(\d+)\.block\.(?:conv_kxk\.conv\.)?weight", key)) and tensor.dim() == 4:
            weights[int(m[1]), int(m[2])] = tensor
    stem = next((t for k, t in tensors.items() if re.fullmatch(r"stem\.block\.(conv_kxk\.conv\.)?weight", k)), None)
    head = tensors.get("head.weight")
    if stem is None or stem.dim() != 4 or head is None or head.dim() != 2:
        return None
    depths = tuple(sum(1 for stage, _ in weights if stage == s) for s in range(4))
    has_se = "stem.se.reduce.weight" in tensors
    widths = (stem.shape[0], *(weights[s, 0].shape[0] for s in range(4) if (s, 0) in weights))
    for name, member in FAMILY.items():
        width = widths[-1] / (512 * member.b)
        if (
            depths == member.depths
            and has_se == member.squeeze_excite
            and 0 < width <= 16
            and member.widths(width) == widths
            and _groups(weights, widths) == member.groups
        ):
            return {
                "name": name,
                "num_classes": head.shape[0],
                "in_chans": stem.shape[1],
                "width": width,
                "small_input": "stages.0.0.block.identity.weight" in tensors,
            }
    return None


def _groups(weights: dict[tuple[int, int], Tensor], widths: tuple[int, ...]) -> int:
    """Of the third layer, counting the stem as the first: the second of stage 2."""
    third = weights.get((0, 1))
    return widths[1] // third.shape[1] if third is not None and third.shape[1] else 1
