"""What tests of engines and exported files share: a network with random statistics, and images for it."""

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import randomize
from torch import Tensor, nn

from repvgg.data import open_source
from repvgg.deploy.engines import Signature, graph
from repvgg.models.repvgg import RepVGG, is_deploy_form
from repvgg.train.loop import new_model


@pytest.fixture(autouse=True, scope="session")
def _exported_once() -> Iterator[None]:
    """One network in deploy form becomes one ONNX graph: the exporter of PyTorch, which takes a second or two, is asked once."""
    if find_spec("onnxscript") is None:
        yield
        return
    real, known = graph._proto, dict[Any, bytes]()

    def once(model: nn.Module, signature: Signature, merge_norms: bool) -> Any:
        import onnx

        if not isinstance(model, RepVGG) or not is_deploy_form(model):
            return real(model, signature, merge_norms)
        weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        key = (repr(model), signature, merge_norms, hashlib.sha256(safetensors.torch.save(weights)).digest())
        if key not in known:
            known[key] = real(model, signature, merge_norms).SerializeToString()
        return onnx.ModelProto.FromString(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_proto", once)
        yield


@pytest.fixture(autouse=True)
def _little_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native engine chooses by its first guesses: how it measures is a matter of its own tests."""
    try:
        from repvgg_engine import speed, tune
    except ImportError:
        return
    monkeypatch.setattr(speed, "SECONDS", 0)
    monkeypatch.setattr(tune, "SECONDS", 0)
    monkeypatch.setattr(tune, "SECONDS_INT8", 0.05)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(new_model("repvgg_micro", open_source("digits"), log=str, width=0.25), (32, 1, 16, 16))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(7, 1, 16, 16, generator=torch.Generator().manual_seed(3))
