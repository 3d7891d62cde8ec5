"""Forwards that ask for values. (In a file of their own: pytest writes the assertions of test files anew.)"""

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Checked(nn.Module):
    """conv, norm, after `check`, which sees [N, 3, 8, 8]."""

    channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.check(x)))  # type: ignore[no-any-return]

    def check(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Asserts(Checked):
    def check(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels, f"{x.shape[1]} channels"
        assert x.dim() == 4 and not x.shape[-1] < 4  # noqa: PT018
        return x


class Raises(Checked):
    def check(self, x: Tensor) -> Tensor:
        _, channels, height, _ = x.shape
        if channels != self.channels or not height:
            message = f"{channels} channels"
            raise ValueError(message)
        return x


class RaisesElse(Checked):
    def check(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return x.relu()
        raise ValueError("no images")


class ComparesTuples(Checked):
    def check(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        assert (height, width) == (8, 8)
        if (self.channels, 8) != (x.shape[1], width):
            raise ValueError("no images")
        return x


class AsksAFunction(Checked):
    def check(self, x: Tensor) -> Tensor:
        demand(x.shape[1] == self.channels)
        return x


def demand(truth: Any) -> None:
    if not truth:
        raise ValueError("no")


class TakesSizesApart(Checked):
    def check(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return flat.view(*x.shape[:2], *x.shape[-2:])


class Either(Checked):
    def check(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 1 or x.shape[1] == 3
        return x


class GoesOn(Checked):
    def check(self, x: Tensor) -> Tensor:
        if x.shape[2] == 8:
            x = x * 2
        return x


class AnyOf(Checked):
    def check(self, x: Tensor) -> Tensor:
        assert any([x.shape[1] == 1, x.shape[1] == 3])
        return x


class AllOf(Checked):
    def check(self, x: Tensor) -> Tensor:
        assert all(size % 2 == 0 for size in x.shape[-2:])
        return x


class NotThisTuple(Checked):
    def check(self, x: Tensor) -> Tensor:
        if (x.shape[1], x.shape[2]) == (3, 9):  # one of them may be equal
            raise ValueError("no")
        return x


class CatchesItself(Checked):
    def check(self, x: Tensor) -> Tensor:
        try:
            assert x.shape[1] == 1
        except AssertionError:
            x = x * 2
        return x


class CatchesAFunction(Checked):
    def check(self, x: Tensor) -> Tensor:
        with suppress(ValueError):
            demand(x.shape[1] == 1)
            x = x * 2
        return x


class CatchesTheTracer(Checked):
    """What a tracer raises on a value that it does not have is no answer to the question."""

    def check(self, x: Tensor) -> Tensor:
        try:
            return x * 2 if x.shape[1] == 3 else x
        except Exception:
            return -x


class Branches(Asserts):
    """A forward that is written anew."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.check(x)
        return self.conv(x) + self.norm(self.other(x))  # type: ignore[no-any-return]


class Wrong(Checked):
    def check(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 5
        return x


class Pads(nn.Module):
    """Asks twice the same, and calls another part on each way."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = pair(), pair()

    def forward(self, x: Tensor) -> Tensor:
        uneven = x.shape[-1] % 2
        if uneven:
            x = F.pad(x, (0, 1, 0, 1))
        y: Tensor = self.odd(x) if uneven else self.even(x)
        return y[..., :-1, :-1] if uneven else y


class Loops(Pads):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 0:
            x = x - 1
        return self.even(x) + self.odd(x)  # type: ignore[no-any-return]


def pair(into: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())


class Exchange(nn.Module):
    """Puts its results where it was given its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(pair() for _ in range(2))

    def forward(self, streams: list[Tensor]) -> list[Tensor]:
        if not isinstance(streams, list):
            streams = [streams]
        for i, branch in enumerate(self.branches):
            streams[i] = branch(streams[i])
        return [streams[0] + streams[1], streams[1]]


class Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([pair(), pair()])

    def forward(self, x: Tensor, seen: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        for layer in self.layers:
            seen.append(layer(seen[-1]))
        return torch.cat(seen, 1) + x.mean(), seen


class Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.dense = nn.ModuleList([pair(), pair()]), Appends()
        self.stages = nn.Sequential(Exchange(), Exchange(), Exchange())
        self.end = pair(9)

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.stages([layer(x) for layer in self.start])
        y, _ = self.dense(x, [first])
        return self.end(y)  # type: ignore[no-any-return]


class Optional(nn.Module):
    """Its input has a default, and the class of what a child returns finds by number what a dictionary does not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Named()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, pixels: Tensor | None = None) -> Tensor:
        if pixels is None:
            raise ValueError("no pixels")
        return self.norm(self.inner(pixels)[0])  # type: ignore[no-any-return]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.words = pair(), Words()
        self.weight, self.norm = nn.Parameter(torch.randn(3, 3, 1, 1)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> "Output":
        return Output(last=self.norm(F.conv2d(self.words(self.layer(x)), self.weight)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(3, 1, 3, 3)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, None, 1, "same", 1, 3)
        return F.conv2d(self.norm(y), self.weight, None, 1, "valid", 1, 3)


class Output(dict[str, Tensor]):
    def __getitem__(self, key: Any) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Chooses(Checked):
    """As FasterNet's partial convolutions."""

    def __init__(self, fast: bool = True) -> None:
        super().__init__()
        if fast:
            self.forward = self.fast  # type: ignore[method-assign]

    def fast(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.relu()))  # type: ignore[no-any-return]
