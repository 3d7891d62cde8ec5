"""train/recipes.py: the paper's numbers, settings that make no sense, and the learning rate against PyTorch's schedulers."""

import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from repvgg.train.recipes import RECIPES, Recipe, get_recipe


def test_recipes_need_no_pytorch() -> None:
    code = "import sys, repvgg.train.recipes; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_papers_recipes() -> None:
    light = get_recipe("light")  # section 4.1
    assert (light.epochs, light.batch_size, light.lr, light.momentum, light.weight_decay) == (120, 256, 0.1, 0.9, 1e-4)
    assert (light.decay, light.warmup_epochs, light.label_smoothing, light.mixup) == ("cosine", 0, 0, 0)
    assert (light.crop, light.flip, light.auto_augment, light.nesterov) == ("random_resized", True, False, False)
    heavy = get_recipe("heavy")
    assert heavy == replace(light, epochs=200, warmup_epochs=5, label_smoothing=0.1, mixup=0.2, auto_augment=True)


def test_every_field_is_documented_and_every_recipe_is_complete() -> None:
    for recipe in RECIPES.values():
        assert asdict(recipe).keys() == {f.name for f in fields(Recipe)}
        assert Recipe(**asdict(recipe)) == recipe


@pytest.mark.parametrize("name", ["", "lihgt", "imagenet", "Light"])
def test_an_unknown_recipe_lists_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=f"no recipe '{name}': ") as caught:
        get_recipe(name)
    assert any(known in str(caught.value) for known in RECIPES)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("epochs", -1),
        ("batch_size", 0),
        ("lr", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("momentum", 1),
        ("momentum", -0.1),
        ("momentum", math.nan),
        ("label_smoothing", 1),
        ("label_smoothing", -0.1),
        ("weight_decay", -1e-4),
        ("weight_decay", math.nan),
        ("warmup_epochs", -1),
        ("mixup", -1),
        ("mixup", math.inf),
        ("decay", "step"),
        ("crop", "none"),
        ("precision", "fp8"),
        ("accumulate", 0),
        ("ema", 1),
        ("clip_norm", -1),
        ("layer_decay", 0),
        ("layer_decay", 1.1),
        ("frozen_stages", -1),
        ("lr_per", -1),
    ],
)
def test_settings_that_make_no_sense_are_named(setting: str, value: Any) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(ValueError, match=f"^{setting} is ") as caught:
        Recipe(**settings)
    assert "\n" not in str(caught.value)


def rates(scheduler: Any, steps: int) -> list[float]:
    out = []
    for _ in range(steps):
        out.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_against_pytorch(decay: str) -> None:
    steps = 40
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = CosineAnnealingLR(optimizer, steps) if decay == "cosine" else LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    recipe = Recipe(lr=0.3, decay=decay)  # type: ignore[arg-type]
    assert [recipe.lr_at(step / steps) for step in range(steps)] == pytest.approx(rates(scheduler, steps), rel=1e-9)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_warm_up_and_then_the_same_decay(decay: Any) -> None:
    warm = Recipe(epochs=20, warmup_epochs=5, lr=0.4, decay=decay)
    assert warm.lr_at(0) == 0
    assert warm.lr_at(1 / 8) == pytest.approx(0.2)  # half of the warm-up
    assert warm.lr_at(1 / 4) == pytest.approx(0.4)
    assert warm.lr_at(1) == pytest.approx(0)
    cold = replace(warm, warmup_epochs=0)
    for progress in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert warm.lr_at(0.25 + 0.75 * progress) == pytest.approx(cold.lr_at(progress))


def test_a_warm_up_takes_half_of_a_short_run_at_most() -> None:
    for epochs in (1, 2, 5):
        recipe = Recipe(epochs=epochs, warmup_epochs=5)
        assert max(range(101), key=lambda percent: recipe.lr_at(percent / 100)) == 50
        assert recipe.lr_at(1) == pytest.approx(0)


def test_every_step_of_the_light_recipe_against_a_table_from_the_paper() -> None:
    """Section 4.1: initial learning rate 0.1, cosine annealing, no restart. Cosines written out by hand."""
    light = get_recipe("light")
    steps = 120 * (1_281_167 // 256)
    table = {0: 0.1, 1 / 6: 0.0933012702, 1 / 4: 0.0853553391, 1 / 3: 0.075, 1 / 2: 0.05, 2 / 3: 0.025, 3 / 4: 0.0146446609, 1: 0.0}
    for at, rate in table.items():
        assert light.lr_at(round(at * steps) / steps) == pytest.approx(rate, abs=1e-8)
    heavy = get_recipe("heavy")  # 5 of 200 epochs of warm-up
    table = {0: 0.0, 1 / 200: 0.02, 3 / 200: 0.06, 5 / 200: 0.1, 102.5 / 200: 0.05, 1: 0.0}
    assert [heavy.lr_at(at) for at in table] == pytest.approx(list(table.values()), abs=1e-12)


def test_the_learning_rate_is_scaled_only_when_asked() -> None:
    assert Recipe(lr=0.1, batch_size=64).lr_at(0) == 0.1
    assert Recipe(lr=0.1, batch_size=64, lr_per=256).lr_at(0) == pytest.approx(0.025)
    assert Recipe(lr=0.1, batch_size=2048, lr_per=256).lr_at(0.5) == pytest.approx(0.4)


def test_small_images_come_first() -> None:
    recipe = Recipe(small_first=0.5)
    assert [recipe.side_at(side, 0.49) for side in (224, 32, 28, 16, 8, 4)] == [168, 24, 16, 8, 8, 4]
    assert recipe.side_at(32, 0.5) == Recipe().side_at(32, 0) == 32
    with pytest.raises(ValueError, match="small_first is 1: from 0 to below 1"):
        Recipe(small_first=1)
