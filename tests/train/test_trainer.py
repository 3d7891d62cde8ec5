"""train/trainer.py: one step against its formulas, and every option against doing the same by hand."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from torch import Tensor, nn

from repvgg.data import open_source
from repvgg.models import zoo
from repvgg.models.repvgg import RepVGG
from repvgg.train.distributed import World
from repvgg.train.loop import new_model
from repvgg.train.recipes import Recipe
from repvgg.train.trainer import Trainer, refuse_infinite

EXACT = Recipe(batch_size=16, weight_decay=5e-4, precision="fp64")


def narrow(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return new_model("repvgg_micro", open_source("digits"), log=lambda line: None, width=0.25, **options)


def batch(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 16, 16, generator=random), torch.randint(10, (n,), generator=random)


def stepped(recipe: Recipe, steps: int = 3, model: nn.Module | None = None, parts: int = 1) -> Trainer:
    trainer = Trainer(model or narrow(), recipe, 10)
    trainer.train()
    for step in range(steps):
        x, y = batch(16, step)
        trainer.step(list(zip(x.chunk(parts), y.chunk(parts), strict=True)), 0.05, step)
    return trainer


def distance(a: Trainer, b: Trainer) -> float:
    """Between the weights and statistics of two."""
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


def apart(a: Trainer, b: Trainer) -> float:
    """Between the weights of two, all together."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return math.sqrt(sum(float((x.detach().double() - y.detach().double()).square().sum()) for x, y in pairs))


def test_one_step_against_its_formulas() -> None:
    """The loss with label smoothing, and SGD with momentum and weight decay, by hand in float64."""
    network = nn.Linear(6, 4).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    weight, bias = network.weight.detach().clone(), network.bias.detach().clone()
    recipe = Recipe(label_smoothing=0.1, weight_decay=0.01, channels_last=False, precision="fp64")
    trainer = Trainer(network, recipe, 4)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for number, lr in enumerate((0.5, 0.25)):
        logits = x @ weight.T + bias
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        target = F.one_hot(y, 4).double() * 0.9 + 0.1 / 4
        trainer.step([(x, y)], lr, number)
        loss, right = trainer.means()
        assert loss == pytest.approx(float(-(target * log_p).sum(1).mean()), rel=1e-12)
        assert right == pytest.approx(int((logits.argmax(1) == y).sum()) / 5)
        error = (log_p.exp() - target) / 5
        gradients = [error.T @ x + 0.01 * weight, error.sum(0)]
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
        assert torch.allclose(network.weight, weight, rtol=1e-12)
        assert torch.allclose(network.bias, bias, rtol=1e-12)


def test_channels_last_changes_rounding_alone() -> None:
    a, b = (stepped(replace(EXACT, channels_last=flag)) for flag in (True, False))
    assert a.model.get_parameter("stem.block.conv_kxk.conv.weight").is_contiguous(memory_format=torch.channels_last)
    assert distance(a, Trainer(narrow(), EXACT, 10)) > 0
    assert distance(a, b) <= 1e-10


def test_parts_add_up_to_the_whole_where_batch_norms_do_not_look_at_the_batch() -> None:
    still = replace(EXACT, freeze_bn=True)
    whole, parts = (
        stepped(still, model=randomize_digits()),
        stepped(replace(still, accumulate=4), model=randomize_digits(), parts=4),
    )
    assert distance(whole, parts) <= 1e-10


def randomize_digits() -> nn.Module:
    return randomize(narrow(), (8, 1, 16, 16))


def test_checkpointing_changes_nothing() -> None:
    again = stepped(replace(EXACT, checkpointing=True))
    assert vars(again.model)["checkpointing"]  # what that keeps: models/test_repvgg_options.py
    assert distance(stepped(EXACT), again) == 0
    with pytest.raises(ValueError, match="--checkpointing: Linear cannot do it"):
        Trainer(nn.Linear(1, 1), Recipe(checkpointing=True), 1)
    with pytest.raises(ValueError, match="--checkpointing does not go with --compile"):
        Trainer(narrow(), Recipe(checkpointing=True, compile=True), 10)


def test_a_scalar_that_is_not_finite_is_found_but_steps_are_not_looked_at() -> None:
    """They are on another device than the rest."""
    refuse_infinite({"steps.a": torch.zeros((), device="meta"), "model.a": torch.zeros(2)})
    with pytest.raises(FloatingPointError, match=r"model\.scale holds NaN or Inf"):
        refuse_infinite({"model.scale": torch.tensor(float("nan"))})


def test_the_moving_average_by_hand() -> None:
    trainer = Trainer(narrow(), replace(EXACT, ema=0.8), 10)
    average: dict[str, Tensor] = {}
    for step in range(4):
        trainer.train()
        trainer.step([batch(16, step)], 0.05, step)
        now = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if tensor.is_floating_point()}
        average = {name: 0.8 * average[name] + 0.2 * tensor if average else tensor for name, tensor in now.items()}
    found = trainer.best_model.state_dict()
    assert trainer.best_model is not trainer.model
    for name, tensor in average.items():
        assert torch.allclose(found[name], tensor, rtol=1e-12, atol=1e-14), name
    assert zoo.manifest_of(trainer.best_model) == zoo.manifest_of(trainer.model)


def test_clipping_limits_the_gradient() -> None:
    recipe = replace(EXACT, momentum=0.0, weight_decay=0.0, clip_norm=0.01)
    trainer = Trainer(narrow(), recipe, 10)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    trainer.step([batch()], 1.0, 0)
    moved = sum(float((p - q).detach().square().sum()) for p, q in zip(trainer.model.parameters(), before, strict=True)) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_frozen_stages_and_batch_norms_stay() -> None:
    model = randomize_digits()
    before = copy.deepcopy(model.state_dict())
    after = stepped(replace(EXACT, frozen_stages=3), model=model).model.state_dict()
    for name, tensor in after.items():
        frozen = name.startswith(("stem.", "stages.0.", "stages.1."))
        assert torch.equal(tensor, before[name].to(tensor.dtype)) == frozen, name
    model = randomize_digits()
    before = copy.deepcopy(model.state_dict())
    after = stepped(replace(EXACT, freeze_bn=True), model=model).model.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)) == ("running" in name or "num_batches" in name), name


def test_half_precisions_keep_fp32_weights_and_come_near() -> None:
    exact = stepped(EXACT)
    moved = apart(exact, Trainer(narrow(), EXACT, 10))
    for precision in ("bf16", "fp16"):
        half = stepped(replace(EXACT, precision=precision))  # type: ignore[arg-type]
        assert all(t.dtype == torch.float32 for t in half.model.state_dict().values() if t.is_floating_point())
        assert 1e-6 * moved < apart(half, exact) < 0.7 * moved  # steps that do nothing are `moved` away
    assert half.scaler.state_dict()["scale"] > 1  # what was last is fp16


def test_steps_are_compiled_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics taken anew and evaluations are other graphs, one for each size of a batch, with minutes of compiling for each."""
    graphs: list[Any] = []
    asked: list[dict[str, Any]] = []
    compile: Callable[..., Any] = torch.compile

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def spy(model: nn.Module, **options: Any) -> Any:
        asked.append(options)
        return compile(model, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", spy)
    trainer, plain = (Trainer(narrow(), replace(EXACT, compile=flag), 10) for flag in (True, False))
    trainer.renew_statistics([batch(4, 0)[0]])
    trainer.settle()
    with torch.no_grad():
        for size in (4, 3):
            trainer.predict(batch(size, 0)[0])
    assert asked == [{"dynamic": False}]
    assert not graphs
    trainer.train()
    trainer.step([batch(4, 0)], 0.0, 0)
    assert len(graphs) == 1
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()


def test_mixup_mixes_images_and_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    cross_entropy: Callable[..., Tensor] = F.cross_entropy

    def spy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        seen.append(target)
        return cross_entropy(logits, target, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    mixed = stepped(replace(EXACT, mixup=1.0, label_smoothing=0.1))
    for target in seen:
        assert target.shape == (16, 10)
        assert target.min() >= 0
        assert torch.allclose(target.sum(1), torch.ones_like(target.sum(1)))
        assert (target > 0).sum(1).max() <= 2
    assert any(((target > 0.01) & (target < 0.99)).any() for target in seen)
    assert len(seen) == 3
    torch.manual_seed(123)  # whatever was drawn before: a step draws by its number alone
    assert distance(mixed, stepped(replace(EXACT, mixup=1.0, label_smoothing=0.1))) == 0


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_by_the_share_that_their_targets_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is as bright all over as its label's number; mixed either way, its mean is its target's."""
    images, targets = list[Tensor](), list[Tensor]()
    cross_entropy: Callable[..., Tensor] = F.cross_entropy

    def spy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        targets.append(target)
        return cross_entropy(logits, target, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    network.register_forward_pre_hook(lambda _, given: images.append(given[0]))
    trainer = Trainer(network, replace(EXACT, **{kind: 1.0}), 10)  # type: ignore[arg-type]
    labels = torch.arange(10)
    for number in range(3):
        trainer.step([(labels.float().view(10, 1, 1, 1).expand(10, 1, 16, 16).clone(), labels)], 0.0, number)
    for image, target in zip(images, targets, strict=True):
        assert torch.allclose(image.double().mean((1, 2, 3)), target.double() @ labels.double(), atol=1e-4)
    assert any(((target > 0.01) & (target < 0.99)).any() for target in targets)
    flat = [bool(image.flatten(1).std(1).max() < 1e-4) for image in images]
    assert all(flat) == (kind == "mixup")  # CutMix pastes a rectangle


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_state_goes_on_to_the_last_bit(optimizer: Any) -> None:
    recipe = replace(EXACT, ema=0.9, mixup=0.5, cutmix=0.5, precision="fp16", optimizer=optimizer)
    first = stepped(recipe)
    second = Trainer(narrow(seed=5), recipe, 10)
    second.load(copy.deepcopy(first.tensors()), first.scaler.state_dict())
    for trainer in (first, second):
        trainer.train()
        trainer.step([batch(16, 9)], 0.03, 3)
    a, b = first.tensors(), second.tensors()
    assert a.keys() == b.keys()
    remembered = {"sgd": {"momentum"}, "adamw": {"first", "second", "steps"}, "muon": {"turning"}}[optimizer]
    assert {name.partition(".")[0] for name in a} == {"model", "ema", "figures", *remembered}
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert first.scaler.state_dict() == second.scaler.state_dict()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_run_goes_on_with_another_optimizer_and_a_moving_average(optimizer: Any) -> None:
    """Which remembers nothing, and begins at the weights: as one that starts from them, but for what was added up meanwhile."""
    first = stepped(replace(EXACT, optimizer="adamw" if optimizer == "sgd" else "sgd"))
    recipe = replace(EXACT, optimizer=optimizer, ema=0.9)
    after = Trainer(narrow(seed=5), recipe, 10)
    after.load(copy.deepcopy(first.tensors()), {})
    assert all(torch.equal(t, first.model.state_dict()[name]) for name, t in after.best_model.state_dict().items())
    anew = Trainer(copy.deepcopy(first.model), recipe, 10)
    for trainer in (after, anew):
        trainer.train()
        trainer.step([batch(16, 9)], 0.03, 3)
    a, b = (trainer.tensors() for trainer in (after, anew))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a if name != "figures")


def test_means_of_an_epoch_are_over_all_its_steps_whoever_asked_and_saved_between() -> None:
    first, batches = Trainer(narrow(), EXACT, 10), [batch(16, seed) for seed in range(5)]
    first.train()
    losses = []
    for number, data in enumerate(batches):
        first.step([data], 0.0, number)
        losses.append(first.means()[0] if number in (1, 3) else 0.0)
        if number == 2:  # in the middle of a window
            second = Trainer(narrow(seed=5), EXACT, 10)
            second.load(copy.deepcopy(first.tensors()), {})
            second.train()
            first = second
    alone = Trainer(narrow(), EXACT, 10)
    alone.train()
    each = []
    for number, data in enumerate(batches):
        alone.step([data], 0.0, number)
        each.append(alone.means())
    loss, share = first.epoch_means()
    assert loss == pytest.approx(sum(x for x, _ in each) / 5, rel=1e-12)
    assert share == pytest.approx(sum(x for _, x in each) / 5, rel=1e-12)
    assert losses[1] == pytest.approx((each[0][0] + each[1][0]) / 2, rel=1e-12)
    assert first.epoch == [0, 0, 0]


def test_renewed_statistics_are_those_of_the_batches() -> None:
    """Of the stem's 1x1 branch, by hand in float64; frozen batch norms keep theirs."""
    trainer = Trainer(narrow(), replace(EXACT, precision="fp64"), 10)
    batches = [batch(16, seed)[0] for seed in range(3)]
    trainer.train()
    trainer.renew_statistics(iter(batches))
    branch = trainer.model.get_submodule("stem.block.conv_1x1")
    with torch.no_grad():
        maps = [branch.get_submodule("conv")(x.double()) for x in batches]
    bn = branch.get_submodule("bn")
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    torch.testing.assert_close(bn.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0))
    torch.testing.assert_close(bn.running_var, torch.stack([m.transpose(0, 1).flatten(1).var(1) for m in maps]).mean(0))
    assert bn.momentum == 0.1
    frozen = Trainer(narrow(), replace(EXACT, freeze_bn=True), 10)
    before = copy.deepcopy(frozen.model.state_dict())
    frozen.renew_statistics(iter(batches))
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.model.state_dict().items())


def test_a_loss_that_is_no_number_is_noticed_when_looked_at_and_before_saving() -> None:
    trainer = Trainer(narrow(), EXACT, 10)
    trainer.train()
    x, y = batch()
    trainer.step([(x, y)], 0.1, 40)
    trainer.tensors()
    trainer.step([(x * float("nan"), y)], 0.1, 41)
    with pytest.raises(FloatingPointError, match=r"model\.stem.*holds NaN or Inf: training diverged"):
        trainer.tensors()
    with pytest.raises(FloatingPointError, match="steps 41 to 42: the loss is nan: training diverged, lower --lr"):
        trainer.means()


def test_processes_exchange_buffers_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it was that of a set, so that one process's average got another's model's statistics."""
    asked: list[nn.Module] = []
    monkeypatch.setattr(World, "copy_buffers", lambda self, model: asked.append(model))
    for _ in range(10):
        trainer = Trainer(narrow(), replace(EXACT, ema=0.9), 10)
        asked.clear()
        trainer.settle()
        assert trainer.ema is not None
        assert [id(model) for model in asked] == [id(trainer.model), id(trainer.ema.module)]


def test_a_variance_below_zero_is_settled_and_zero_stays() -> None:
    trainer = Trainer(narrow(), EXACT, 10)
    variance = trainer.model.get_buffer("stem.block.conv_kxk.bn.running_var")
    variance[:3] = torch.tensor([-1e-9, 0.0, 1e-9])
    rest = variance[2:].clone()
    trainer.settle()
    assert variance[:2].tolist() == [0, 0]
    assert torch.equal(variance[2:], rest)


def test_means_are_of_the_steps_since_the_last_look_and_of_their_parts() -> None:
    trainer, apart = Trainer(narrow(), EXACT, 10), list[tuple[float, float]]()
    alone = Trainer(narrow(), EXACT, 10)
    for step in range(5):
        x, y = batch(16, step)
        trainer.step([(x, y)], 0.05, step)
        alone.step([(x, y)], 0.05, step)
        apart.append(alone.means())
        if step == 1:
            trainer.means()
    assert trainer.means() == pytest.approx(tuple(sum(values) / 3 for values in zip(*apart[2:], strict=True)), rel=1e-12)


def test_synchronised_batch_norm_is_refused_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="--sync-bn needs GPUs"):
        Trainer(narrow(), replace(EXACT, sync_bn=True), 10)


def test_what_is_for_the_family_is_refused_elsewhere() -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    for setting in ({"frozen_stages": 1}, {"layer_decay": 0.5}):
        with pytest.raises(ValueError, match=f"--{next(iter(setting)).replace('_', '-')}: the stages of Sequential are not known"):
            Trainer(other, Recipe(**setting), 10)  # type: ignore[arg-type]
    assert isinstance(narrow(), RepVGG)
