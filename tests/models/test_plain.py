"""plain.py: a deploy form from its list of layers alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from torch import nn

import repvgg
from repvgg.models.plain import PlainNet, layer_list


def scripted(model: nn.Module, path: Path) -> Any:
    """Return the model compiled, saved and opened again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript says that it is not developed further
        torch.jit.script(model).save(path)
        return torch.jit.load(path)


HEADS = [{}, {"num_classes": 0}, {"num_classes": 0, "global_pool": ""}]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("repvgg_micro", head) for head in HEADS),
        ("repvgg_d2se", {}),
        ("repvgg_l2pse", {}),
        *(pytest.param(name, head, marks=pytest.mark.slow) for name in ("repvgg_d2se", "repvgg_l2pse") for head in HEADS[1:]),
    ],
)
def test_torch_jit_scripts_it(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = randomize(repvgg.create_model(name, width=1 / 32, **options), (4, 3, 32, 32))
    deploy = repvgg.reparameterize(model.eval())
    layers = layer_list(deploy)
    assert layers is not None
    plain = PlainNet(layers).eval()
    plain.load_state_dict(deploy.state_dict())
    opened = scripted(plain, tmp_path / "a.pt")
    assert list(opened.state_dict()) == list(plain.state_dict())
    for x in (torch.randn(2, 3, 32, 32), torch.randn(1, 3, 64, 40)):
        assert torch.equal(opened(x), plain(x))
        assert torch.equal(plain(x), deploy(x))


def test_a_list_that_goes_to_and_fro_is_not_compiled_in_another_order(tmp_path: Path) -> None:
    conv = {"op": "conv2d", "in_channels": 3, "out_channels": 3, "kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    conv |= {"dilation": [1, 1], "groups": 1, "activation": "relu"}
    names = ("a.x", "b.x", "a.y")
    plain = PlainNet([{**conv, "weight": f"{name}.weight", "bias": f"{name}.bias"} for name in names])
    x = torch.randn(1, 3, 8, 8)
    wanted = x
    for name in names:
        wanted = plain.get_submodule(name)(wanted).relu()
    assert torch.equal(plain(x), wanted)
    with pytest.raises(RuntimeError):
        scripted(plain, tmp_path / "a.pt")
