"""Networks whose forwards use their parts in unusual ways: all that a fold may get wrong.

Each holds a convolution and its batch norm as `conv` and `bn` of some part, and lets something else see what passes between the
two. So folding the two would change what the network computes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.models.names import FAMILY
from repvgg.models.repvgg import RepVGG


class Part(nn.Module):
    """A convolution and its batch norm; `raw` asks for what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.switch, self.flips, self.seen = False, False, None

    def forward(self, x: Tensor, raw: bool = False, skip: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(x)
        if skip is not None:
            y = y + skip
        if raw or self.switch:
            return y
        return self.bn(y)  # type: ignore[no-any-return]

    def middle(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()  # type: ignore[no-any-return]

    def turn(self, on: bool) -> None:
        self.switch = on


class Whole(nn.Module):
    """Holds a part, and an own stem with a convolution and a batch norm."""

    part_type: type[Part] = Part

    def __init__(self) -> None:
        super().__init__()
        self.part: Any = self.part_type()
        self.stem: Any = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))


class SkipArgument(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, skip=x * 2)  # type: ignore[no-any-return]


class SkipByPosition(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, False, x * 2)  # type: ignore[no-any-return]


class RawArgument(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part(x, raw=True)  # type: ignore[no-any-return]


class OnlyRaw(Whole):
    """The batch norm is never called, so that it must not go into the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, raw=True)  # type: ignore[no-any-return]


class SwitchedAttribute(Whole):
    def forward(self, x: Tensor) -> Tensor:
        self.part.switch = True
        y = self.part(x)
        self.part.switch = False
        return y  # type: ignore[no-any-return]


class Flagged(Part):
    def __init__(self) -> None:
        super().__init__()
        self.flags = {"raw": False}

    def forward(self, x: Tensor, raw: bool = False, skip: Tensor | None = None) -> Tensor:
        return super().forward(x, self.flags["raw"])


class SwitchedInADictionary(Whole):
    part_type = Flagged

    def forward(self, x: Tensor) -> Tensor:
        self.part.flags["raw"] = True
        y = self.part(x)
        self.part.flags["raw"] = False
        return y  # type: ignore[no-any-return]


class SwitchedByMethod(Whole):
    def forward(self, x: Tensor) -> Tensor:
        self.part.turn(True)
        y = self.part(x)
        self.part.turn(False)
        return y + self.part(x)  # type: ignore[no-any-return]


class OtherMethod(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.middle(x)  # type: ignore[no-any-return]


class ForwardByHand(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.part.forward(x) + self.part.forward(x, True)  # type: ignore[no-any-return]


class TakesApart(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.stem[0](x)  # type: ignore[no-any-return]


class AsksForABias(Whole):
    """A folded convolution has a bias where there was none."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem(x)
        return y if self.stem[0].bias is None else y * 2


class UsesAWeight(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) + F.conv2d(x, self.stem[0].weight, padding=1)  # type: ignore[no-any-return, arg-type]


class UsesStatistics(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) - self.stem[1].running_mean.view(-1, 1, 1)  # type: ignore[no-any-return, operator, union-attr]


class Untraceable(Whole):
    """Looks at a value, which no trace has."""

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(x if float(x.sum()) > 1e9 else -x)

    def odd(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class UntraceableTakesApart(Untraceable):
    def odd(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.stem[0](x)  # type: ignore[no-any-return]


class UntraceableOtherMethod(Untraceable):
    def odd(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.middle(x)  # type: ignore[no-any-return]


class UntraceableUsesAWeight(Untraceable):
    def odd(self, x: Tensor) -> Tensor:
        return self.stem(x) + F.conv2d(x, self.stem[0].weight, padding=1)  # type: ignore[no-any-return, arg-type]


class UntraceableTwoLevelsUp(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(TakesApart(), nn.ReLU())

    def odd(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner[0].part.conv(x)  # type: ignore[no-any-return, union-attr, operator]


class Keeps(Part):
    def forward(self, x: Tensor, raw: bool = False, skip: Tensor | None = None) -> Tensor:
        self.seen = self.conv(x)
        return self.bn(self.seen)  # type: ignore[no-any-return]


class KeptOnItself(Whole):
    part_type = Keeps

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.seen  # type: ignore[no-any-return]


class KeptIfThere(Whole):
    """In a trace the part's attribute is None, so that the trace goes another way than a run."""

    part_type = Keeps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        if self.part.seen is not None:
            y = y + self.part.seen
        return self.stem[1](self.stem[0](x)) + y  # type: ignore[no-any-return]


class KeepsInAList(Part):
    shelf: list[Tensor] = []

    def forward(self, x: Tensor, raw: bool = False, skip: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        self.shelf[:] = [y]
        return self.bn(y)  # type: ignore[no-any-return]


class KeptInAList(Whole):
    part_type = KeepsInAList

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        return y + sum(KeepsInAList.shelf)


class FillsADictionary(Part):
    def forward(self, x: Tensor, raw: Any = None, skip: Tensor | None = None) -> Tensor:
        raw["y"] = self.conv(x)
        return self.bn(raw["y"])  # type: ignore[no-any-return]


class GivesADictionary(Whole):
    part_type = FillsADictionary

    def forward(self, x: Tensor) -> Tensor:
        found: dict[str, Tensor] = {}
        y: Tensor = self.part(x, found)
        return y + found.get("y", x)


class FillsAList(Part):
    def forward(self, x: Tensor, raw: Any = None, skip: Tensor | None = None) -> Tensor:
        raw.append(self.conv(x))
        return self.bn(raw[-1])  # type: ignore[no-any-return]


class GivesAList(Whole):
    part_type: type[Part] = FillsAList

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        y: Tensor = self.part(x, found)
        return y + sum(found)


class CountsAList(Whole):
    part_type = FillsAList

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        y: Tensor = self.part(x, found)
        return y + found[0] if len(found) == 1 else y


class HandsAListOn(Part):
    def __init__(self) -> None:
        super().__init__()
        self.inner = FillsAList()
        self.conv, self.bn = self.inner.conv, self.inner.bn

    def forward(self, x: Tensor, raw: Any = None, skip: Tensor | None = None) -> Tensor:
        return self.inner(x, raw)  # type: ignore[no-any-return]


class GivesAListFarther(GivesAList):
    part_type = HandsAListOn


class GivesAListOfItsOwn(Whole):
    part_type = FillsAList

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.found.clear()
        y: Tensor = self.part(x, self.found)
        return y + self.last()

    def last(self) -> Tensor:
        return self.found[-1] if self.found else 0  # type: ignore[return-value]


class TakesApartSometimes(Whole):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            return self.stem(x) + self.stem[0](x)  # type: ignore[no-any-return]
        return self.stem(x)  # type: ignore[no-any-return]


class CatchesARefusal(Whole):
    """A tracer refuses what it does not see; the forward is not refused, and goes on."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem[0](x)
        try:
            y.data = y.data * 2
        except ValueError:
            return self.stem[1](y)  # type: ignore[no-any-return]
        return self.stem[1](y) + y  # type: ignore[no-any-return]


class Flips(Part):
    def forward(self, x: Tensor, raw: bool = False, skip: Tensor | None = None) -> Tensor:
        self.flips = not self.flips
        y = self.conv(x)
        return self.bn(y) if self.flips else y  # type: ignore[no-any-return]


class CallsOneThatFlips(Whole):
    part_type = Flips

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part(x)  # type: ignore[no-any-return]


class AsksForAType(Part):
    def forward(self, x: Tensor, raw: bool = False, skip: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return y if isinstance(y, Tensor) else self.bn(y)  # type: ignore[no-any-return]


class CallsOneThatAsksForAType(Whole):
    part_type = AsksForAType

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.stem(x)  # type: ignore[no-any-return]


class InPlace(Part):
    def forward(self, x: Tensor, raw: bool = False, skip: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        y += x
        return self.bn(y)  # type: ignore[no-any-return]


class CallsOneInPlace(Whole):
    part_type = InPlace

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Our backbone, and a decoder whose skip is added between convolution and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = RepVGG(FAMILY["repvgg_micro"], num_classes=3, width=0.25)
        self.up, self.lateral = Part(), nn.LazyConv2d(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        *_, last = self.backbone.forward_intermediates(x, intermediates_only=True)
        return self.up(x, skip=F.interpolate(self.lateral(last), x.shape[-2:]))  # type: ignore[no-any-return]


ODD = [
    SkipArgument, SkipByPosition, RawArgument, OnlyRaw, SwitchedAttribute, SwitchedByMethod, OtherMethod, ForwardByHand, TakesApart,
    AsksForABias, UsesAWeight, UsesStatistics, UntraceableTakesApart, UntraceableOtherMethod, UntraceableUsesAWeight,
    UntraceableTwoLevelsUp, KeptOnItself, KeptIfThere, KeptInAList, GivesADictionary, CallsOneThatFlips, CallsOneThatAsksForAType,
    CallsOneInPlace, GivesAList, CountsAList, GivesAListFarther, GivesAListOfItsOwn, TakesApartSometimes,
    CatchesARefusal,
]  # fmt: skip
