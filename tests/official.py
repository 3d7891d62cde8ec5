"""The official code's two networks by their layout: the names of their parts, and what these compute; in training form."""

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS, WIDTHS = {"a0": (2, 4, 14, 1), "plus": (8, 14, 24, 1)}, {"a0": (48, 48, 96, 192, 1280), "plus": (64, 160, 320, 640, 2560)}


def conv_bn(into: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out)))


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int, plus: bool) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(out) if into == out and stride == 1 else None
        self.rbr_dense, self.rbr_1x1 = conv_bn(into, out, 3, stride), conv_bn(into, out, 1, stride)
        self.post_se = Gate(out) if plus else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return self.post_se((y if self.rbr_identity is None else y + self.rbr_identity(x)).relu())  # type: ignore[no-any-return]


class Stage(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Official(nn.Module):
    """kind: "a0" (a RepVGG) or "plus" (RepVGGplus-L2pse, which in train mode gives its auxiliary logits too)."""

    def __init__(self, kind: str, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        plus = kind == "plus"
        self.names = ["stage0", "stage1", "stage2", *(["stage3_first", "stage3_second"] if plus else ["stage3"]), "stage4"]
        _, *widths = (round(channels * width) for channels in WIDTHS[kind])
        stem = min(64, widths[0])
        self.stage0, into = Block(3, stem, 2, plus), stem
        heads: dict[str, nn.Module] = {}
        for number, (depth, out) in enumerate(zip(DEPTHS[kind], widths, strict=True), 1):
            blocks = [Block(out if i else into, out, 1 if i else 2, plus) for i in range(depth)]
            if not plus:
                self.add_module(f"stage{number}", nn.Sequential(*blocks))
            elif number == 3:
                self.stage3_first, self.stage3_second = Stage(blocks[: depth // 2]), Stage(blocks[depth // 2 :])
            else:
                self.add_module(f"stage{number}", Stage(blocks))
            if plus and number < 4:
                name = "stage3_first_aux" if number == 3 else f"stage{number}_aux"
                head = nn.Sequential(OrderedDict([*conv_bn(out, out, 3, 2).named_children(), ("relu", nn.ReLU())]))
                heads[name] = nn.Sequential(head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, num_classes))
            into = out
        self.linear = nn.Linear(into, num_classes)
        for name, auxiliary in heads.items():
            self.add_module(name, auxiliary)

    def forward(self, x: Tensor) -> Any:
        seen = {}
        for name in self.names:
            x = self.get_submodule(name)(x)
            if self.training and hasattr(self, f"{name}_aux"):
                seen[f"{name}_aux"] = self.get_submodule(f"{name}_aux")(x)
        logits = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return {"main": logits, **seen} if seen else logits
