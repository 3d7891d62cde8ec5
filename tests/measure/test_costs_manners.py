"""costs.py: the model is not changed, whatever its dtype, device and context; and paths through it."""

import pytest
import torch
from torch import Tensor, nn

import repvgg
from repvgg.fold.blocks import BLOCKS
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.costs import cost, num_paths
from repvgg.models.names import FAMILY
from repvgg.models.repvgg import RepVGG

FORMS = pytest.mark.parametrize("deploy", [True, False], ids=["deploy", "training"])


def on_meta(name: str, deploy: bool) -> nn.Module:
    with torch.device("meta"):
        return RepVGG(FAMILY[name], deploy=deploy).eval()


def test_the_model_is_not_changed() -> None:
    model = RepVGG(FAMILY["repvgg_micro"], num_classes=3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    cost(model, (3, 64, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_in_any_dtype_device_and_context(deploy: bool, dtype: torch.dtype) -> None:
    model = RepVGG(FAMILY["repvgg_micro"], deploy=deploy)
    expected = cost(model, (3, 64, 64))
    assert cost(model.to("meta"), (3, 64, 64)) == expected
    with torch.inference_mode():
        assert cost(RepVGG(FAMILY["repvgg_micro"], deploy=deploy), (3, 64, 64)) == expected
    other = cost(model.to(dtype), (3, 64, 64))
    assert (other.params, other.macs, other.operators) == (expected.params, expected.macs, expected.operators)
    assert other.bytes_moved * 4 == expected.bytes_moved * dtype.itemsize


def test_tensors_that_are_no_buffers() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.ones(8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table + torch.arange(6)

    assert [layer.operator for layer in cost(Scaled(), (8, 6, 6)).layers if layer.operator != "arange"] == ["mul", "add"]


def test_old_style_weight_norm() -> None:
    conv = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 3))
    assert cost(conv, (4, 6, 6)).macs == 4 * 4 * 9 * 16


def test_an_input_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"the model does not run on one input of size \(5, 64, 64\): in stem\.block: ") as error:
        cost(on_meta("repvgg_a0", deploy=True), (5, 64, 64))
    assert "\n" not in str(error.value)
    for size in ((3, -1, 64), (3, 0, 0), (3,), ()):
        with pytest.raises(ValueError, match="the model does not run on one input of size"):
            cost(on_meta("repvgg_a0", deploy=True), size)


def test_a_forward_that_needs_the_data() -> None:
    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ValueError, match="does not run on one input of size"):
        cost(Peeks(), (1, 2, 2))


def test_summary() -> None:
    text = str(cost(on_meta("repvgg_a0", deploy=True)))
    for figure in ("8.31 M", "1.36 G", "0.75 G", "62.55 MB", "2.41 MB", "46", "24 of them"):
        assert figure in text


# ---------------------------------------------------------------------------------------------------------------- paths


def test_paths_of_the_paper() -> None:
    """Section 4.2: 2 x 3^15 in stage 4 of B0 (its first layer has no identity), 2^8 in that of the residual reorganisation."""
    b0, residual = (repvgg.create_model(name, width=0.125) for name in ("repvgg_b0", "repvgg_b0_residual"))
    assert num_paths(b0.get_submodule("stages.2")) == 2 * 3**15
    assert num_paths(residual.get_submodule("stages.2")) == 2**8
    assert num_paths(b0) == 2 * (2 * 3**3) * (2 * 3**5) * (2 * 3**15) * 2
    assert num_paths(residual) == 2**2 * 2**3 * 2**8
    assert num_paths(reparameterize(b0.eval())) == 1


@pytest.mark.parametrize(("block", "paths"), [("plain", 1), ("acb", 3), ("mobileone", 6), ("dbb", 4), ("post_bn", 3), ("dirac", 1)])
def test_paths_of_blocks(block: str, paths: int) -> None:
    assert num_paths(BLOCKS[block](4, 4)) == paths


def test_paths_of_other_networks() -> None:
    timm = pytest.importorskip("timm")
    assert num_paths(timm.create_model("resnet50")) == 2**16
    gate = repvgg.create_model("repvgg_d2se", width=0.125).get_submodule("stem")
    assert num_paths(gate) == 2  # squeeze-excite is a gate, not a branch

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x + x + 1, x.add(x), x * 2]).sum()

    assert num_paths(Twice()) == 5

    class Fork(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Fork cannot be traced, so its paths cannot be counted"):
        num_paths(Fork())
