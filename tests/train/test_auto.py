"""train/auto.py: what is chosen for which images, at speeds of our own making."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repvgg.data import Decoded, Source, Subset
from repvgg.data.images import ImageError
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.load import save
from repvgg.models.manifest import Preprocessing
from repvgg.models.zoo import create_model
from repvgg.train import auto
from repvgg.train.auto import Choice, choose
from repvgg.train.trainer import Trainer


def photos(count: int, side: int = 300, classes: int = 6) -> Source:
    """So many images of this size, all the same one."""
    labels = [i % classes for i in range(count)]
    images = Decoded(torch.zeros(1, 3, side, side + 20, dtype=torch.uint8).expand(count, -1, -1, -1), labels)
    return Source("photos", images, images, [str(i) for i in range(classes)], Preprocessing())


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Choose with a speed: seconds that an image of 224 pixels takes in a step; loading takes nothing."""

    def chosen(source: Source, seconds: float, released: bool = False, **how: Any) -> tuple[Choice, list[str]]:
        def step(model: Any, source: Source, size: int, device: str, precision: str, count: int) -> float:
            return seconds * (size / 224) ** 2 / (2 if precision == "bf16" else 1)

        def weights(name: str) -> None:
            if not released:
                raise FileError("the hub is not here")

        looked = auto._looked_at
        monkeypatch.setattr(auto, "_seconds", step)
        monkeypatch.setattr(auto, "_looked_at", lambda source: (looked(source)[0], 0.0))
        monkeypatch.setattr(auto, "pretrained_file", weights)
        said: list[str] = []
        return choose(**{"arch": "repvgg_micro", "source": source, "log": said.append, **how}), said

    return chosen


def test_a_slow_machine_takes_smaller_images_and_fewer_epochs(paced: Any) -> None:
    """900 and as many to validate on: an epoch is 900 + 900 / 3 images of a step's time."""
    fast, _ = paced(photos(900), 0.001)
    assert (fast.recipe.image_size, fast.recipe.epochs, fast.recipe.batch_size, fast.recipe.precision) == (224, 200, 32, "bf16")
    slow, said = paced(photos(900), 0.08)
    size, epochs = slow.recipe.image_size, slow.recipe.epochs
    eased = 1 - 0.6 * (1 - 0.75**2)  # the first six tenths see images at three quarters of their size
    cost = epochs * 1200 * 0.04 * eased * (size / 224) ** 2
    assert slow.recipe.small_first == 0.6
    assert slow.recipe.ema == 0
    assert size < 224
    assert 60 <= epochs < 200
    assert 0.85 * 600 < cost <= 600
    larger = min(s for s in auto.SIZES if s > size)
    assert 60 * 1200 * 0.04 * eased * (larger / 224) ** 2 > 600
    assert said[1] == f"auto: a training step here takes so many images a second at 224 pixels: {1 / 0.08:.0f} in fp32, 25 in bf16"
    assert f"{epochs} epochs in batches of 32 at {size} pixels in bf16" in said[2]
    assert f"--epochs {epochs // 2}: " in said[3]
    hour, _ = paced(photos(900), 0.08, minutes=60)
    assert hour.recipe.image_size == 224


def test_images_that_cannot_be_read_are_not_looked_at(paced: Any) -> None:
    source = photos(40)

    class Broken(Decoded):
        def __getitem__(self, index: int) -> Any:
            if index % 4 == 0:
                raise ImageError("damaged")
            return super().__getitem__(index)

    assert isinstance(source.train, Decoded)
    damaged = replace(source, train=Broken(source.train.pixels, source.train.labels))
    assert paced(damaged, 0.01)[0].recipe == paced(source, 0.01)[0].recipe
    with pytest.raises(ImageError, match="damaged"):
        paced(replace(source, train=Subset(damaged.train, [0, 4, 8])), 0.01)


def test_a_size_that_is_given_stays(paced: Any) -> None:
    choice, said = paced(photos(900), 0.08, image_size=160)
    assert choice.recipe.image_size == 160
    assert "--image-size" not in said[3]


def test_trained_weights_are_gone_on_from_where_there_are_some(paced: Any) -> None:
    tuned, said = paced(photos(900), 0.02, released=True)
    assert tuned.init == "repvgg_micro"
    assert tuned.recipe.layer_decay < 1
    assert tuned.recipe.lr < 0.02
    assert "on from repvgg_micro's ImageNet weights" in said[0]
    new, said = paced(photos(900), 0.02)
    assert (new.init, "new weights (the hub is not here)" in said[0]) == ("", True)
    for how, why in (({"init": "none"}, "as --init none says"), ({"width": 0.5}, "with another width")):
        choice, said = paced(photos(900), 0.02, released=True, **how)
        assert choice.init == ""
        assert why in said[0]
    grey = replace(photos(60), preprocessing=Preprocessing((1, 32, 32), 32, mean=(0.5,), std=(0.5,)))
    choice, _ = paced(replace(grey, train=Decoded(torch.zeros(60, 1, 32, 32, dtype=torch.uint8), [0, 1] * 30)), 0.02, released=True)
    assert choice.init == ""


def test_small_images_are_shifted_and_stay_small(paced: Any) -> None:
    choice, _ = paced(photos(900, side=32), 0.02)
    assert (choice.recipe.image_size, choice.recipe.crop) == (32, "shift")


def test_a_large_set_gets_the_papers_recipe_and_processes_choose_alike(paced: Any) -> None:
    choice, said = paced(photos(auto.LARGE), 0.02)
    assert (choice.recipe.epochs, choice.recipe.batch_size, choice.recipe.lr, choice.recipe.image_size) == (120, 256, 0.1, 224)
    assert "as many as the paper's recipe is for" in said[1]
    shared, said = paced(photos(900), 99.0, alone=False)
    assert shared.recipe.epochs == 200
    assert "several processes: nothing is measured" in said[1]


def test_a_step_is_timed_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both precisions, as many images at a time as are meant; and nobody else's random numbers are drawn."""
    source, said, steps = photos(20, side=32, classes=2), list[str](), list[tuple[str, int]]()
    real = Trainer.step

    def step(self: Trainer, parts: Any, *more: Any) -> None:
        steps.append((self.recipe.precision, len(parts[0][0])))
        real(self, parts, *more)

    monkeypatch.setattr(Trainer, "step", step)
    choice = choose("repvgg_micro", source, init="none", log=said.append, width=0.25)
    assert choice.recipe.image_size == 32
    assert steps == [(precision, auto.TRIAL) for precision in ("fp32", "bf16") for _ in range(3)]
    speeds = re.findall(r"(\d+) in (?:fp32|bf16)", said[1])
    assert len(speeds) == 2
    assert min(map(int, speeds)) > 0
    model = create_model("repvgg_micro", num_classes=2, width=0.25, small_input=True)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    auto._seconds(model, source, 32, "cpu", "fp32", 4)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("minutes", [0.0, -1.0])
def test_minutes_that_are_none(minutes: float) -> None:
    with pytest.raises(ValueError, match=r"--minutes .*: above 0"):
        choose("repvgg_micro", photos(8), minutes=minutes)


def test_a_comparator_has_one_learning_rate(paced: Any, tmp_path: Path) -> None:
    save(create_model("resnet18", num_classes=6).eval(), tmp_path / "other.safetensors")
    for how in ({}, {"alone": False}):
        choice, _ = paced(photos(60), 0.01, arch="", init=str(tmp_path / "other.safetensors"), **how)
        assert choice.recipe.layer_decay == 1


def test_what_cannot_be_trained_is_refused_before_a_step_is_timed(paced: Any, tmp_path: Path) -> None:
    grey = create_model("repvgg_micro", num_classes=6, in_chans=1).eval()
    save(grey, tmp_path / "grey.safetensors")
    save(reparameterize(create_model("repvgg_micro", num_classes=6).eval()), tmp_path / "deploy.safetensors")
    with pytest.raises(ValueError, match="takes images of 1 channels, those of photos have 3"):
        paced(photos(60), 0.01, init=str(tmp_path / "grey.safetensors"))
    with pytest.raises(ValueError, match=r"is in deploy form.*--allow-deploy"):
        paced(photos(60), 0.01, init=str(tmp_path / "deploy.safetensors"))
    paced(photos(60), 0.01, init=str(tmp_path / "deploy.safetensors"), allow_deploy=True)
    with pytest.raises(ValueError, match="photos has labels, and a PSPNet gives masks"):
        choose("pspnet_resnet18", photos(60), init="none")


def test_weights_that_there_are_and_cannot_be_had_are_missed_aloud(paced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise FileError("the hub is not here")

    monkeypatch.setattr(auto, "pretrained_file", missing)
    told = auto._weights("repvgg_a0", photos(60), "", {})
    assert told[0] == ""
    assert told[2] == "the hub is not here"
    _, said = paced(photos(900), 0.02)
    assert not any("WITHOUT TRAINED WEIGHTS" in line for line in said)  # of repvgg_micro there are none
