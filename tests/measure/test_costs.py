"""costs.py against the paper's printed numbers, torch.utils.flop_counter, sums of ones, and counts by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from members import EVERY_MEMBER
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.costs import cost, measure_peak_activation, num_paths
from repvgg.models.names import FAMILY
from repvgg.models.repvgg import RepVGG
from repvgg.paper.numbers import FRAGMENTS, PEAK_ACTIVATION, TABLE1, TABLE4, TABLE5, KernelSpeed, ModelSpeed

FORMS = pytest.mark.parametrize("deploy", [True, False], ids=["deploy", "training"])


def on_meta(name: str, deploy: bool) -> nn.Module:
    with torch.device("meta"):
        return RepVGG(FAMILY[name], deploy=deploy).eval()


def plain_layer(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, as in Figure 3 (batch norms folded)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


# ------------------------------------------------------------------------------------------------- parameters and MACs


@pytest.mark.parametrize("row", [r for r in (*TABLE4, *TABLE5) if r.model in FAMILY], ids=lambda r: f"{r.model}-{r.top1}")
def test_tables_4_and_5(row: ModelSpeed) -> None:
    c = cost(on_meta(row.model, deploy=True))
    assert math.floor(c.params / 1e4) / 100 == row.params_m
    assert round(c.macs / 1e9, 1) == row.flops_b
    assert round(c.winograd_muls / 1e9, 1) == row.muls_b


@FORMS
@pytest.mark.parametrize("name", EVERY_MEMBER)
def test_macs_agree_with_the_flop_counter(name: str, deploy: bool) -> None:
    model = on_meta(name, deploy)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert 2 * cost(model).macs == counter.get_total_flops()


@pytest.mark.parametrize("row", TABLE1, ids=lambda r: f"{r.kernel_size}x{r.kernel_size}")
def test_table_1_gflops(row: KernelSpeed) -> None:
    with torch.device("meta"):
        conv = nn.Conv2d(2048, 2048, row.kernel_size, padding=row.kernel_size // 2)
    assert math.floor(10 * 32 * cost(conv, (2048, 56, 56)).macs / 1e9) / 10 == row.gflops


geometries = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 2, 3]),
        "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    }
)


@settings(max_examples=40, deadline=None)
@given(geometries, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_macs_of_any_convolution(geometry: dict[str, Any], a: int, b: int, transposed: bool) -> None:
    """Ones in and ones in the kernel: each multiply-add gives one to the sum of the outputs."""
    channels = a * geometry["groups"], b * geometry["groups"]
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(*channels, **geometry, bias=False)
    nn.init.ones_(conv.weight)
    assert cost(conv, (channels[0], 9, 8)).macs == conv(torch.ones(1, channels[0], 9, 8)).sum().item()


def test_matrix_products() -> None:
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(torch.empty(1, 7, 16, device="meta"))
    assert cost(attention, (7, 16)).macs == counter.get_total_flops() // 2 > 0


@pytest.mark.parametrize(
    ("geometry", "winograd"),
    [
        ({}, True),
        ({"groups": 4}, True),
        ({"padding": 0}, True),
        ({"stride": 2}, False),
        ({"stride": (1, 2)}, False),
        ({"dilation": 2}, False),
        ({"kernel_size": 1}, False),
        ({"kernel_size": (3, 1)}, False),
        ({"kernel_size": 5}, False),
    ],
)
def test_winograd_counts_4_of_9_for_3x3_of_stride_and_dilation_1(geometry: dict[str, Any], winograd: bool) -> None:
    c = cost(nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **geometry}), (8, 12, 12))
    assert 9 * c.winograd_muls == (4 if winograd else 9) * c.macs > 0


def test_winograd_leaves_transposed_and_other_dimensions_alone() -> None:
    for conv, size in ((nn.ConvTranspose2d(4, 4, 3), (4, 8, 8)), (nn.Conv1d(4, 4, 3), (4, 8)), (nn.Conv3d(4, 4, 3), (4, 8, 8, 8))):
        c = cost(conv, size)
        assert c.winograd_muls == c.macs > 0


def test_parameters_count_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.BatchNorm2d(4), shared)
    model.register_parameter("unused", nn.Parameter(torch.zeros(5)))
    c = cost(model, (4, 6, 6))
    assert c.params == sum(p.numel() for p in model.parameters()) == 148 + 8 + 5
    assert [layer.params for layer in c.layers] == [148, 8, 0]
    assert c.macs == 2 * 4 * 4 * 9 * 36


# ------------------------------------------------------------------------------------------------------------ memory access


def test_bytes_moved_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 5)
    ).eval()
    conv, norm, relu, pool, linear = cost(model, (3, 8, 8)).layers
    before, after, pooled = 3 * 8 * 8, 8 * 6 * 6, 8 * 3 * 3
    assert conv.bytes_moved == 4 * (before + 8 * 3 * 9 + 8 + after)
    assert norm.bytes_moved == 4 * (after + 4 * 8 + after)
    assert relu.bytes_moved == 4 * (after + after)
    assert pool.bytes_moved == 4 * (after + pooled)
    assert linear.bytes_moved == 4 * (pooled + pooled * 5 + 5 + 5)


def test_bytes_moved_follow_the_dtype() -> None:
    full, half = plain_layer(8), plain_layer(8).half()
    assert cost(full, (8, 6, 6)).bytes_moved == 2 * cost(half, (8, 6, 6)).bytes_moved


def test_additions_and_grouped_convolutions_cost_memory_that_flops_do_not_show() -> None:
    plain, residual = cost(nn.Sequential(plain_layer(8), plain_layer(8)), (8, 6, 6)), cost(ResidualBlock(8), (8, 6, 6))
    assert residual.macs == plain.macs
    assert residual.bytes_moved - plain.bytes_moved == 3 * 4 * 8 * 36
    few, many = cost(nn.Conv2d(8, 8, 3), (8, 6, 6)), cost(nn.Conv2d(8, 8, 3, groups=8), (8, 6, 6))
    assert few.macs / few.bytes_moved > many.macs / many.bytes_moved


def test_in_place_counts_the_same_bytes() -> None:
    assert cost(nn.ReLU(inplace=True), (8, 6, 6)).bytes_moved == cost(nn.ReLU(), (8, 6, 6)).bytes_moved == 2 * 4 * 8 * 36


# ---------------------------------------------------------------------------------------------------------------- operators


def test_fragmented_operators_per_block_as_in_section_3_1() -> None:
    training = on_meta("repvgg_micro", deploy=False)
    deploy = on_meta("repvgg_micro", deploy=True)
    fewest, most = FRAGMENTS["RepVGG"]
    for i in range(2):
        assert fewest <= cost(deploy).inside(f"stages.0.{i}")[0].fragment <= most
        assert sum(layer.fragment for layer in cost(deploy).inside(f"stages.0.{i}")) == fewest == most
        assert [layer.operator for layer in cost(deploy).inside(f"stages.0.{i}")] == ["convolution", "relu_"]
    block = [layer.operator for layer in cost(training).inside("stages.0.1")]
    assert sorted(block) == sorted(["convolution", "native_batch_norm"] * 2 + ["native_batch_norm", "add", "add", "relu_"])
    assert cost(ResidualBlock(4), (4, 6, 6)).fragments == FRAGMENTS["ResNet"][0]


def test_inside_takes_whole_names() -> None:
    c = cost(nn.Sequential(*(nn.ReLU() for _ in range(12))), (1, 2, 2))
    assert [layer.path for layer in c.inside("1")] == ["1"]
    assert c.inside("") == c.layers
    assert len(c.layers) == c.operators == 12


def test_views_are_no_operators() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).view(2, -1).t().unsqueeze(0)[..., ::2]

    c = cost(Views(), (2, 4, 4))
    assert (c.operators, c.bytes_moved) == (0, 0)
    assert c.peak_activation_bytes == 4 * 2 * 16


def test_layers_name_their_module_operator_and_shape() -> None:
    first, second, *_, last = cost(on_meta("repvgg_a0", deploy=True)).layers
    assert (first.path, first.operator, first.output_shape) == ("stem.block", "convolution", (1, 48, 112, 112))
    assert (second.path, second.operator, second.output_shape) == ("stem.act", "relu_", (1, 48, 112, 112))
    assert (last.path, last.operator, last.output_shape) == ("head", "addmm", (1, 1000))
    assert (first.params, first.macs) == (48 * 28, 48 * 27 * 112 * 112)


def test_folding_never_costs_more() -> None:
    training = RepVGG(FAMILY["repvgg_micro"], num_classes=5).eval()
    before, after = cost(training, (3, 64, 64)), cost(reparameterize(training), (3, 64, 64))
    for what in ("params", "macs", "winograd_muls", "bytes_moved", "operators", "fragments", "peak_activation_bytes"):
        assert getattr(after, what) < getattr(before, what), what


# --------------------------------------------------------------------------------------------------------- activation memory


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_figure_3(depth: int) -> None:
    """Between operators, a residual block keeps 2x its input and a plain layer 1x; while one runs, its output comes on top."""
    one = 4 * 8 * 6 * 6
    plain = cost(nn.Sequential(*(plain_layer(8) for _ in range(depth))), (8, 6, 6))
    residual = cost(nn.Sequential(*(ResidualBlock(8) for _ in range(depth))), (8, 6, 6))
    assert plain.peak_activation_bytes == PEAK_ACTIVATION["plain"] * one
    assert residual.peak_activation_bytes == PEAK_ACTIVATION["residual"] * one
    assert (plain.peak_working_bytes, residual.peak_working_bytes) == (2 * one, 3 * one)


def test_peak_sees_through_views_and_in_place_operators() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.flatten(1).mul(2)
            y.relu_()
            return y.view_as(x).add_(1)

    c = cost(InPlace(), (8, 6, 6))
    one = 4 * 8 * 36
    assert (c.peak_activation_bytes, c.peak_working_bytes) == (one, 2 * one)


def test_peak_keeps_what_is_used_late() -> None:
    class Dense(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = x.relu()
            b = a.relu()
            c = b.relu()
            return torch.cat((x, a, b, c))

    c = cost(Dense(), (8, 6, 6))
    one = 4 * 8 * 36
    assert (c.peak_activation_bytes, c.peak_working_bytes) == (4 * one, 8 * one)


def test_weights_are_no_activations() -> None:
    c = cost(nn.Sequential(nn.Flatten(), nn.Linear(16, 1000), nn.Linear(1000, 4)), (1, 4, 4))
    assert c.peak_activation_bytes == 4000
    assert c.peak_working_bytes == 4000 + 64


def test_measured_peak_of_a_real_run() -> None:
    """The input stays with its caller, so it comes on top of what the operators need."""
    x = torch.randn(2, 8, 6, 6)
    one = x.numel() * 4
    assert measure_peak_activation(nn.Sequential(*(plain_layer(8).eval() for _ in range(3))).eval(), x) == 4 * one
    flat = nn.Sequential(*(nn.ReLU() for _ in range(4))).eval()
    assert measure_peak_activation(flat, x) == 3 * one
    assert measure_peak_activation(nn.Sequential(*(nn.ReLU(inplace=True) for _ in range(4))).eval(), x) == one


@FORMS
def test_measured_peak_is_at_least_what_the_order_needs(deploy: bool) -> None:
    model = RepVGG(FAMILY["repvgg_micro"], deploy=deploy).eval()
    counted = cost(model, (3, 64, 64)).peak_working_bytes
    measured = measure_peak_activation(model, torch.randn(1, 3, 64, 64))
    assert counted <= measured <= 2 * counted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_measured_peak_on_cuda() -> None:
    x = torch.randn(4, 8, 64, 64, device="cuda")
    one = x.numel() * 4
    flat = nn.Sequential(*(nn.ReLU() for _ in range(4))).eval().cuda()
    assert measure_peak_activation(flat, x) == 3 * one
    measured = measure_peak_activation(nn.Sequential(*(plain_layer(8) for _ in range(3))).eval().cuda(), x)
    assert measured >= 3 * one


def test_measuring_refuses_train_mode() -> None:
    with pytest.raises(ReparamError, match="train mode"):
        measure_peak_activation(plain_layer(4), torch.zeros(1, 4, 6, 6))


def test_counting_paths_leaves_nothing_behind() -> None:
    class Adds(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.ones(1)

    model = Adds(3, 4, 1)
    before = [*vars(model)]
    assert num_paths(model) == 1
    assert [*vars(model)] == before
