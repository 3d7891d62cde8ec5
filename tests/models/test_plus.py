"""RepVGGplus-L2pse against the official layout: keys, both forms, auxiliary heads, and files."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from official import Official
from rounding import rounding
from torch import nn

import repvgg
from repvgg.deploy import engines
from repvgg.models import keys
from repvgg.models.zoo import manifest_of
from repvgg.train.recipes import Recipe
from repvgg.train.tasks import CLASSIFICATION

WIDTH = 0.1  # 16, 16, 32, 64, 256 channels
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def official() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Official("plus", width=WIDTH))


@pytest.fixture(scope="module")
def ours(official: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("plus") / "official.pth"
    torch.save({"model": official.state_dict()}, path)
    return repvgg.load(path)


@pytest.fixture(scope="module")
def deploy(ours: Any) -> Any:
    return repvgg.reparameterize(ours)


def test_keys_and_shapes_are_the_official_ones() -> None:
    with torch.device("meta"):
        theirs, mine = Official("plus", 1000), repvgg.create_model("RepVGG-L2pse")
    spelled = keys.to_foreign(mine.state_dict(), "repvggplus")
    assert {k: t.shape for k, t in spelled.items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    assert keys.to_ours(spelled, "repvggplus").keys() == mine.state_dict().keys()


def test_an_official_checkpoint_computes_what_it_did(ours: Any, official: nn.Module) -> None:
    manifest = manifest_of(ours)
    assert manifest.arch is not None
    assert (manifest.arch["name"], round(manifest.arch["width"], 6), manifest.form) == ("repvgg_l2pse", WIDTH, "training")
    assert manifest.preprocessing.input_size == (3, 320, 320)
    with torch.no_grad():
        assert relative_error(ours(X), official(X)) <= rounding(ours, X)


def test_auxiliary_heads_in_train_mode(ours: Any, official: nn.Module) -> None:
    """In float64, as batch statistics of few values are sensitive; and what the loss makes of them."""
    import copy

    mine, theirs = copy.deepcopy(ours).double().train(), copy.deepcopy(official).double().train()
    x = torch.randn(4, 3, 128, 128, dtype=torch.float64)
    got, wanted = mine(x), theirs(x)
    assert len(got) == len(wanted) == 4
    for a, b in zip(got, wanted.values(), strict=True):
        assert relative_error(a, b) < 1e-6
    target, recipe = torch.tensor([1, 2, 3, 4]), Recipe(auxiliary=0.1)
    losses = [nn.functional.cross_entropy(logits, target) for logits in got]
    loss = CLASSIFICATION.loss(got, target, recipe)
    assert torch.allclose(loss, losses[0] + 0.1 * (losses[1] + losses[2] + losses[3]))
    loss.backward()
    assert all(p.grad is not None for p in mine.parameters())
    mine.reset_classifier(3)
    assert [tuple(logits.shape) for logits in mine(x)] == [(4, 3)] * 4


def test_it_folds_and_its_files_open(ours: Any, deploy: Any, tmp_path: Path) -> None:
    assert deploy.auxiliary is None
    assert not deploy.fold_report.left
    assert repvgg.verify(ours, deploy, (3, 64, 64)).ok
    for model, form in ((ours, "training"), (deploy, "deploy")):
        for to_keys in ("repvgg", "official"):
            path = tmp_path / f"{form}-{to_keys}.safetensors"
            repvgg.save(model, path, to_keys=to_keys)
            again = repvgg.load(path)
            assert manifest_of(again).form == form
            assert again.state_dict().keys() == model.state_dict().keys()
            with torch.no_grad():
                assert torch.equal(again(X), model(X))
    with pytest.raises(ValueError, match="timm has no repvgg_l2pse"):
        repvgg.save(ours, tmp_path / "x.safetensors", to_keys="timm")


# Those that read our list of layers, and one that reads PyTorch's graph.
@pytest.mark.parametrize("name", ["ncnn", "native", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_engines_run_it(name: str, deploy: Any) -> None:
    if not all(map(find_spec, engines.ENGINES[name].packages)):
        pytest.skip(f"{name} is not installed")
    with torch.no_grad():
        wanted = deploy(X)
    assert relative_error(engines.build(name, deploy, engines.Options((3, 64, 64), 2))(X), wanted) < 1e-4


def test_a_backbone_of_it_has_no_auxiliary_heads() -> None:
    model: Any = repvgg.create_model("repvgg_l2pse", width=WIDTH, num_classes=0, global_pool="")
    assert model.auxiliary is None
    assert model(X).shape == (2, 256, 2, 2)
    model.reset_classifier(4)
    assert len(model(X)) == 4
    assert repvgg.create_model("repvgg_l2pse", width=WIDTH, deploy=True)(X).shape == (2, 1000)
