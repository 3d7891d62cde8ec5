"""train/finetune.py: on from trained weights, with a new head; and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize

from repvgg.data import Decoded, Source, open_source
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import keys, zoo
from repvgg.models.load import load, save
from repvgg.models.manifest import Preprocessing
from repvgg.train.finetune import finetuning, started_from
from repvgg.train.loop import train
from repvgg.train.optimizer import make_optimizer
from repvgg.train.recipes import Keeping, get_recipe

FINETUNE = replace(get_recipe("finetune"), epochs=1, batch_size=16, crop="shift")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the ten digits, as if trained."""
    path = tmp_path_factory.mktemp("init") / "digits.safetensors"
    source = open_source("digits")
    model = zoo.create_model("repvgg_micro", num_classes=10, in_chans=1, width=0.25, small_input=True)
    save(randomize(model, (8, 1, 16, 16)), path, classes=source.classes, preprocessing=source.preprocessing)
    return path


def odd_or_even() -> Source:
    digits = open_source("digits").limited(64)
    splits: dict[str, Any] = {}
    for name in ("train", "val"):
        images = [getattr(digits, name)[i] for i in range(64)]
        splits[name] = Decoded(torch.stack([x for x, _ in images]), [y % 2 for _, y in images])
    return replace(digits, classes=["even", "odd"], **splits)


def test_a_new_head_on_the_old_body(trained: Path) -> None:
    said: list[str] = []
    model, source = started_from(str(trained), "", odd_or_even(), log=said.append)
    old, new = load(trained).state_dict(), model.state_dict()
    assert said == ["new head: 2 classes instead of 10"]
    assert new["head.weight"].shape[0] == 2
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items() if not name.startswith("head."))
    assert zoo.manifest_of(model).classes == ["even", "odd"] == source.classes
    assert model.training


def test_a_module_that_is_started_from_stays_as_it_is(trained: Path) -> None:
    given = load(trained)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    model, _ = started_from(given, "", odd_or_even(), log=lambda line: None)
    assert model is not given
    assert not given.training
    assert all(torch.equal(tensor, given.state_dict()[name]) for name, tensor in before.items())
    assert zoo.manifest_of(given).classes == open_source("digits").classes


def test_what_is_left_out_of_a_strangers_file_is_told(trained: Path, tmp_path: Path) -> None:
    tensors = keys.to_foreign(load(trained).state_dict(), "official")
    nested = {f"net.{name}": tensor for name, tensor in tensors.items()}
    torch.save({**nested, "loss.weight": torch.ones(2)}, tmp_path / "theirs.pth")
    said: list[str] = []
    model, _ = started_from(str(tmp_path / "theirs.pth"), "repvgg_micro", odd_or_even(), log=said.append)
    assert said == ["left out, as no part of the network: loss.weight", "new head: 2 classes"]
    save(model.eval(), tmp_path / "ours.safetensors")
    assert "left_out" not in zoo.manifest_of(load(tmp_path / "ours.safetensors")).training


def test_the_same_classes_keep_the_head(trained: Path) -> None:
    said: list[str] = []
    model, _ = started_from(str(trained), "repvgg_micro", open_source("digits"), log=said.append)
    assert said == []
    assert torch.equal(model.state_dict()["head.weight"], load(trained).state_dict()["head.weight"])


def test_learning_rates_fall_from_stage_to_stage_where_stages_are_known(trained: Path, tmp_path: Path) -> None:
    other = zoo.create_model("resnet18", num_classes=10)
    save(other.eval(), tmp_path / "other.safetensors")
    for init in (str(trained), load(trained), "repvgg_a0", "RepVGG-A0"):
        assert finetuning(init) == get_recipe("finetune")
    for unknown in (str(tmp_path / "other.safetensors"), other, "resnet18"):
        recipe = finetuning(unknown)
        assert recipe == replace(get_recipe("finetune"), layer_decay=1)
        make_optimizer(other, recipe)
    with pytest.raises(ValueError, match=r"the stages of ResNet are not known.*recipe finetune asks for it\): --layer-decay 1$"):
        make_optimizer(other, get_recipe("finetune"))


def test_a_whole_run_with_frozen_stages(trained: Path, tmp_path: Path) -> None:
    recipe = replace(FINETUNE, frozen_stages=4)
    run = train("", odd_or_even(), recipe, tmp_path, init=str(trained), log=lambda line: None)
    old, new = load(trained).state_dict(), load(tmp_path / "last.safetensors").state_dict()
    moved = {name for name, tensor in old.items() if new[name].shape != tensor.shape or not torch.equal(new[name], tensor)}
    assert moved
    assert all(name.startswith(("stages.3.", "head.")) for name in moved)
    assert run.last.images == 64


def test_the_input_is_the_models_own(trained: Path) -> None:
    other = replace(odd_or_even(), preprocessing=Preprocessing((1, 8, 8), 8, mean=(0.1,), std=(0.2,)))
    _, source = started_from(str(trained), "", other, log=lambda line: None)
    assert source.preprocessing == open_source("digits").preprocessing


def test_a_deploy_form_is_trained_only_when_asked_for_by_name(trained: Path, tmp_path: Path) -> None:
    """Trap 12."""
    path = tmp_path / "deploy.safetensors"
    save(reparameterize(load(trained)), path)
    with pytest.raises(
        ValueError, match=r"deploy\.safetensors: is in deploy form, .*start from its training form, or say --allow-deploy"
    ):
        train("", odd_or_even(), FINETUNE, tmp_path / "run", init=str(path), log=lambda line: None)
    assert not (tmp_path / "run").exists()
    keeping = Keeping(allow_deploy=True)
    run = train(
        "", odd_or_even(), replace(FINETUNE, lr=0.001, layer_decay=1), tmp_path / "run", init=str(path), keeping=keeping, log=str
    )
    assert zoo.manifest_of(run.model).form == "deploy"


def test_what_does_not_fit_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"digits\.safetensors holds repvgg_micro, not repvgg_a0"):
        started_from(str(trained), "repvgg_a0", odd_or_even())
    colour = replace(odd_or_even(), preprocessing=Preprocessing((3, 16, 16), 16))
    with pytest.raises(ValueError, match="takes images of 1 channels, those of digits have 3"):
        started_from(str(trained), "", colour)
    with pytest.raises(ValueError, match="--init: the model is what the file says; it takes no width"):
        train("", odd_or_even(), FINETUNE, tmp_path, init=str(trained), width=0.5, log=str)
