"""transposed.py: batch norms after transposed convolutions, against the network itself in float64."""

import pytest
import torch
from conftest import randomize, relative_error
from folding import EXACT, SMALL, outputs, report_of
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparameterize import reparameterize


class Decoder(nn.Module):
    """As Linknet's or CenterNet's: up by a transposed convolution, between others."""

    def __init__(self, groups: int = 1, bias: bool = False, **geometry: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 6, 4, groups=groups, bias=bias, **geometry)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.up(self.down(x))).relu())  # type: ignore[no-any-return]


class LooksBetween(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x))
        return self.out(self.norm(y).relu()) + y.mean()  # type: ignore[no-any-return]


class SaysHowLarge(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return self.out(self.norm(self.up(y, output_size=(19, 19))).relu())  # type: ignore[no-any-return]


class Twice(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return self.out(self.norm(self.up(y)).relu() + self.up(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"stride": 3, "output_padding": 2, "dilation": 2}])
def test_it_computes_the_same(groups: int, bias: bool, geometry: dict[str, int]) -> None:
    model = randomize(Decoder(groups, bias, **geometry), SMALL).double()
    folded = reparameterize(model)
    assert not report_of(folded).left
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert report_of(folded).stretches["up"] == ["up", "norm"]
    assert isinstance(folded.up, nn.ConvTranspose2d)
    for size in (8, 5):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


@pytest.mark.parametrize("make", [LooksBetween, SaysHowLarge, Twice])
def test_where_it_is_used_in_another_way_it_stays(make: type[Decoder]) -> None:
    model = randomize(make(stride=2), SMALL).double()
    folded = reparameterize(model)
    assert report_of(folded).left.keys() == {"norm"}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


def test_precision_and_what_trains_stay() -> None:
    model = randomize(Decoder(), SMALL).to(torch.bfloat16).requires_grad_(False)
    folded = reparameterize(model)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in folded.parameters())


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = randomize(Decoder(), SMALL)
    with torch.no_grad():
        model.norm.weight.fill_(3e4)
        model.norm.get_buffer("running_var").fill_(1e-4)
    with pytest.raises(ReparamError, match=r"up.*does not fit torch.float16"):
        reparameterize(model.half())
