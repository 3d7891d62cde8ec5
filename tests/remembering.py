"""Forwards that leave something in a module for the next call, and use what an earlier one has left."""

import torch
from asking import pair
from torch import Tensor, nn


class Grid(nn.Module):
    """As YOLO's heads: a grid that is made anew for images of another size, of strides that no module holds."""

    size: torch.Size | None = None
    grid = torch.empty(0)

    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.ModuleList(pair() for _ in range(2))
        self.strides = torch.tensor([8.0, 16.0])

    def forward(self, x: Tensor) -> Tensor:
        boxes = torch.cat([box(x) for box in self.boxes])
        if self.size != x.shape:
            self.grid = self.made(x, self.strides[0])
            self.size = x.shape
        boxes[:, 0::2] = boxes[:, 0::2] * self.grid[0]  # there is none before the first call
        return boxes * self.grid

    def made(self, x: Tensor, stride: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = torch.arange(end=height, dtype=x.dtype, device=x.device) + 0.5
        columns = torch.arange(width, dtype=x.dtype, device=x.device) + 0.5
        rows, columns = torch.meshgrid(rows, columns, indexing="ij")
        strides: Tensor = torch.full((height, width), stride, dtype=x.dtype, device=x.device)  # type: ignore[call-overload]
        return rows * columns * strides


class OpensAWay(nn.Module):
    """Once it has seen a small image, it uses a part of what was called as a whole."""

    opened = False

    def __init__(self) -> None:
        super().__init__()
        self.pair = pair()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 6:
            self.opened = True
        elif self.opened:
            return self.pair[0](x)  # type: ignore[no-any-return]
        return self.pair(x)  # type: ignore[no-any-return]


class AddsTheLast(OpensAWay):
    """Once it has seen an image, it adds a part of what it made of that."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.pair[0](x)
        z = self.pair[1](y if self.last is None else y + self.last)
        self.last = y.mean()
        return z  # type: ignore[no-any-return]


class ReadsAWord(OpensAWay):
    mode = "whole"

    def forward(self, x: Tensor) -> Tensor:
        y = self.pair(x) if self.mode == "whole" else self.pair[0](x)
        if x.shape[-1] == 6:
            self.mode = "part"
        return y  # type: ignore[no-any-return]


class Caches(nn.Module):
    """As LeViT's attention: what it makes of a weight is kept in a dictionary, by device."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.end, self.cache = pair(), pair(), dict[str, Tensor]()
        self.bias = nn.Parameter(torch.randn(3, 1, 1))
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.pair(x) + self.biases(x.device))  # type: ignore[no-any-return]

    def biases(self, device: torch.device) -> Tensor:
        key = str(device)
        if key not in self.cache:
            self.cache[key] = self.bias[self.get_buffer("order")]
        return self.cache[key]


class Grows(OpensAWay):
    """It looks at what lies between once it has seen three images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.mean())
        return self.pair(x) if len(self.seen) < 3 else self.pair[0](x)  # type: ignore[no-any-return]


class KeepsAModule(OpensAWay):
    """What it keeps for its next call is a part of another part."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = dict[str, tuple[nn.Module]]()

    def forward(self, x: Tensor) -> Tensor:
        if "first" in self.layers:
            return self.layers["first"][0](x)  # type: ignore[no-any-return]
        self.layers["first"] = (self.pair[0],)
        return self.pair(x)  # type: ignore[no-any-return]


class SharesAList(nn.Module):
    """It takes a weight of another module out of a list, and changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.other = pair(), TakesFromAList()
        self.other.weights = [*self.pair[0].parameters()]

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.pair(x))  # type: ignore[no-any-return]


class TakesFromAList(nn.Module):
    weights: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.pair = pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x) * self.weights[0].data.mul_(2).sum()  # type: ignore[no-any-return]


class Counts(nn.Module):
    """Its branches meet in a forward that counts its calls: written anew, it would not."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = pair()[:2], pair()[:2]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.one(x) + self.two(x)  # type: ignore[no-any-return]


class Pyramid(nn.Module):
    """As a U-Net: the encoder adds to a list that a module inside it returns, and the decoder takes that apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(pair() for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        made = []
        for layer in self.layers:
            x = layer(x)
            made.append(x)
        return made


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels = Levels()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x] + self.levels(x)  # type: ignore[no-any-return]  # noqa: RUF005


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(pair() for _ in range(2))

    def forward(self, levels: list[Tensor]) -> Tensor:
        y, *skips = levels[::-1]
        for i, block in enumerate(self.blocks):
            y = block(y + skips[i]) if i < len(skips) else block(y)
        return y
