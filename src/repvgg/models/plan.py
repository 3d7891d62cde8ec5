"""The numbers of a network, layer by layer: channels, strides, dilations, groups. Importable without PyTorch.

Source: RepVGG (CVPR 2021), Tables 2 and 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repvgg.models.names import Member


@dataclass(frozen=True)
class LayerSpec:
    """One 3x3 layer as numbers. stage: 0 for the stem, then 1 to 4."""

    stage: int
    in_channels: int
    out_channels: int
    stride: int
    dilation: int
    groups: int


def layer_plan(
    member: Member,
    in_chans: int = 3,
    output_stride: int = 32,
    width: float = 1.0,
    small_input: bool = False,
    dilated_layers: int | None = None,
    widths: Sequence[int] | None = None,
) -> list[LayerSpec]:
    """Return every 3x3 layer of a network in order, the stem first; arguments as `RepVGG` takes them."""
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride}: choose 8, 16 or 32")
    if in_chans < 1 or not 0 < width <= 16:
        raise ValueError("in_chans is at least 1, width is above 0 and at most 16")
    count = 1 + sum(member.depths)
    channels = [in_chans, *(widths or member.layer_widths(width))]
    if len(channels) != 1 + count or min(channels) < 1:
        raise ValueError(f"widths are the channels of {count} layers, at least 1 each")
    strides, dilations = _strides_and_dilations(output_stride, small_input)
    undilated = 0 if dilated_layers is None else count - dilated_layers  # so many layers at the start
    plan: list[LayerSpec] = []
    for stage, depth in enumerate((1, *member.depths)):
        for first in (True, *(False,) * (depth - 1)):
            number = len(plan) + 1  # the stem is the 1st; the 3rd, 5th, ... layers are the grouped ones
            plan.append(
                LayerSpec(
                    stage,
                    in_channels=channels[number - 1],
                    out_channels=channels[number],
                    stride=strides[stage] if first else 1,
                    dilation=dilations[stage] if number > undilated else 1,
                    groups=member.groups if number % 2 and number > 1 else 1,
                )
            )
    return plan


def _strides_and_dilations(output_stride: int, small_input: bool) -> tuple[list[int], list[int]]:
    """Return both for the five stages. A stage that loses its stride doubles the dilation of every 3x3 from its first layer on."""
    strides = [1, 1, 2, 2, 2] if small_input else [2, 2, 2, 2, 2]
    dilations = [1, 1, 1, 1, 1]
    for stage in range(5)[{32: 5, 16: 4, 8: 3}[output_stride] :]:
        strides[stage] = 1
        dilations[stage] = dilations[stage - 1] * 2
    return strides, dilations


def feature_info(plan: Sequence[LayerSpec]) -> list[dict[str, Any]]:
    """Return what timm's networks say of their feature maps: channels, stride against the image, module."""
    info: list[dict[str, Any]] = []
    reduction = 1
    for spec in plan:
        reduction *= spec.stride
        module = f"stages.{spec.stage - 1}" if spec.stage else "stem"
        del info[spec.stage :]
        info.append({"num_chs": spec.out_channels, "reduction": reduction, "module": module, "stage": spec.stage})
    return info


def taps(plan: Sequence[LayerSpec]) -> dict[str, tuple[int, int]]:
    """Return where RepVGGplus has its auxiliary heads: after stages 2 and 3 and halfway through stage 4, as number and channels."""
    ends = [sum(spec.stage <= stage for spec in plan) for stage in range(4)]
    numbers = {"stage1": ends[1] - 1, "stage2": ends[2] - 1, "stage3_first": ends[2] + (ends[3] - ends[2]) // 2 - 1}
    return {name: (number, plan[number].out_channels) for name, number in numbers.items()}
