"""prune.py: what brings nothing goes first, in both forms; and what is left saves, loads, trains and runs everywhere."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from PIL import Image
from rounding import rounding
from torch import Tensor, nn

from repvgg.cli import main
from repvgg.data import Decoded, Source, open_source
from repvgg.data.images import ImageError
from repvgg.deploy import engines
from repvgg.deploy.load import load_engine
from repvgg.deploy.parity import compare, reference
from repvgg.deploy.prune import prune, pruned
from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import as_linear
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.costs import cost
from repvgg.models import zoo
from repvgg.models.load import load, save
from repvgg.models.manifest import Preprocessing
from repvgg.models.repvgg import Layer, Residual
from repvgg.train.recipes import Keeping, get_recipe

SIZE = (3, 16, 16)
P = Preprocessing(SIZE, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
RECIPE = replace(get_recipe("demo"), epochs=1, batch_size=16, precision="fp32")


def network(name: str = "repvgg_micro", width: float = 0.25, block: str | None = None) -> nn.Module:
    return randomize(zoo.create_model(name, num_classes=3, width=width, small_input=True, block=block), (16, *SIZE))


@torch.no_grad()
def exact(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = copy.deepcopy(model).double()(images.double())
    return logits


@torch.no_grad()
def silence_half(model: nn.Module, groups: int) -> None:
    """Half of the channels of every layer, of every group, chosen at random, are zero from now on; the same ones wherever layers
    are equally wide, as an identity between them wants it."""
    silent: dict[int, Tensor] = {}
    for layer in model.modules():
        if not isinstance(layer, (Layer, Residual)):
            continue
        parts = [layer.block, *(m for name, m in layer.named_children() if name == "shortcut" and not isinstance(m, nn.Identity))]
        ends: list[Any] = []
        for part in parts:
            ends += [m for m in part.modules() if isinstance(m, nn.BatchNorm2d)] or [part]
        channels = len(ends[0].bias)
        if channels not in silent:
            order = torch.rand(groups, channels // groups).argsort(1)[:, : channels // groups // 2]
            silent[channels] = (order + torch.arange(groups)[:, None] * (channels // groups)).flatten()
        for end in ends:
            end.weight[silent[channels]] = 0
            end.bias[silent[channels]] = 0


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, *SIZE)


NETWORKS = [("repvgg_micro", 0.25, 1, "repvgg"), ("repvgg_b1g4", 0.125, 4, "repvgg"), ("repvgg_b0_residual", 0.125, 1, "repvgg")]
BLOCKS = [
    ("repvgg_b0_residual", 0.125, 1, "plain"),
    *(("repvgg_micro", 0.25, 1, b) for b in ("acb", "mobileone", "plain", "no_identity", "identity_no_bn", "post_bn", "qarepvgg")),
]


@pytest.mark.parametrize(
    ("name", "width", "groups", "block", "form"),
    [
        *((*network, form) for network in NETWORKS for form in ("training", "deploy")),
        *((*network, "training") for network in BLOCKS[:3]),
        *(pytest.param(*network, "training", marks=pytest.mark.slow) for network in BLOCKS[3:]),
        *(pytest.param(*network, "deploy", marks=pytest.mark.slow) for network in BLOCKS),  # plain networks, as those above
    ],
)
def test_silent_channels_go_first_and_nothing_changes(
    name: str, width: float, groups: int, block: str, form: str, images: Tensor
) -> None:
    model = network(name, width, block).double()
    model = reparameterize(model) if form == "deploy" else model
    silence_half(model, groups)
    small = pruned(model, images, 0.5)
    assert zoo.manifest_of(small).form == form
    layers = [m for m in model.modules() if isinstance(m, (Layer, Residual))]
    wide = [as_linear(layer.block).out_channels for layer in layers]
    assert (zoo.manifest_of(small).arch or {})["widths"] == [channels // 2 for channels in wide]
    allowed = rounding(model, images.double())
    assert relative_error(exact(small, images), exact(model, images)) <= allowed
    assert relative_error(exact(reparameterize(small), images), exact(model, images)) <= allowed


def test_the_choice_depends_on_what_a_channel_brings_and_not_on_its_scale(images: Tensor) -> None:
    model = reparameterize(network()).double()
    scaled = copy.deepcopy(model)
    stem, reader = (scaled.get_submodule(path) for path in ("stem.block", "stages.0.0.block"))
    gain = torch.logspace(-3, 3, len(stem.bias)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        stem.weight.mul_(gain.view(-1, 1, 1, 1))  # type: ignore[operator, union-attr]
        stem.bias.mul_(gain)  # type: ignore[operator, union-attr]
        reader.weight.div_(gain.view(1, -1, 1, 1))  # type: ignore[operator, union-attr]
    first, second = (pruned(m, images, 0.75) for m in (model, scaled))
    assert relative_error(exact(second, images), exact(first, images)) <= rounding(first, images.double())


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.9])
def test_any_share_of_the_channels(keep: float, images: Tensor) -> None:
    model = network("repvgg_b1g4", 0.125)
    small = pruned(model, images, keep)
    assert cost(small, SIZE).macs < cost(model, SIZE).macs
    for m in small.modules():
        if isinstance(m, nn.Conv2d):
            assert m.out_channels % m.groups == m.in_channels % m.groups == 0
    assert torch.isfinite(small(images)).all()


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_a_pruned_net_is_a_file_of_its_own(form: str, images: Tensor, tmp_path: Path) -> None:
    model = network()
    small = pruned(reparameterize(model) if form == "deploy" else model, images, 0.3)
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors")
    manifest = zoo.manifest_of(again)
    assert manifest.form == form
    assert (manifest.arch or {})["widths"] == [2, 2, 2, 5, 5, 10, 10, 10, 10, 19]
    assert torch.equal(again(images), small(images))
    with pytest.raises(ValueError, match="timm has no pruned networks"):
        save(small, tmp_path / "timm.safetensors", to_keys="timm")
    smaller = pruned(again, images, 0.5)  # and can be pruned again
    assert cost(smaller, SIZE).macs < 0.5 * cost(again, SIZE).macs


QUICK = ("eager", "native")  # a pruned net is a plain one, as test_engines.py runs in all of them


@pytest.mark.parametrize("engine", [pytest.param(e, marks=[] if e in QUICK else pytest.mark.slow) for e in engines.ENGINES])
def test_a_pruned_net_runs_in_every_engine(engine: str, images: Tensor, tmp_path: Path) -> None:
    if engine not in engines.installed("fp32", log=lambda line: None):
        pytest.skip(f"{engine} is not installed")
    path = tmp_path / "small.safetensors"
    save(pruned(reparameterize(network()), images, 0.3), path)  # widths that are no multiple of anything
    runner = load_engine(path, engine, batch_size=4, input_size=SIZE)
    assert compare(runner(images), reference(load(path), images)).ok
    if engine == "native":  # and without PyTorch
        import repvgg_engine

        net = repvgg_engine.load(path)
        assert compare(torch.from_numpy(net(images.numpy())), reference(load(path), images)).ok


# ------------------------------------------------------------------------------------------------------------ with training


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = network()
    return zoo.remember(net, replace(zoo.manifest_of(net), classes=["a", "b", "c"], preprocessing=P))


@pytest.fixture(scope="module")
def source(model: nn.Module) -> Source:
    """Images that the model labels itself, so that its own accuracy is 100%."""
    pixels = torch.randint(0, 256, (64, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model((pixels / 255 - 0.5) / 0.25).argmax(1).tolist()
    decoded = Decoded(pixels, labels)
    return Source("self-labelled", decoded, decoded, ["a", "b", "c"], P, recipe="demo")


@pytest.mark.parametrize("form", ["training", pytest.param("deploy", marks=pytest.mark.slow)])
def test_pruned_trained_and_measured(form: str, model: nn.Module, source: Source, tmp_path: Path) -> None:
    start = reparameterize(model) if form == "deploy" else model
    said: list[str] = []
    report = prune(start, source, tmp_path / "p", 0.5, RECIPE, log=said.append)
    assert ("in deploy form: batch norms are inserted to train with" in said) == (form == "deploy")
    assert report.before.top1 == 1
    assert report.costs[1].macs < 0.35 * report.costs[0].macs
    figures = json.loads((tmp_path / "p" / "pruning.json").read_text())
    assert figures["macs"] == [c.macs for c in report.costs]
    assert figures["accuracy"]["after"]["top1"] == report.after.top1
    assert figures["speed"]["ratio"]["value"] > 0
    best, deploy = (load(tmp_path / "p" / f"{name}.safetensors") for name in ("best", "deploy"))
    manifest = zoo.manifest_of(best)
    assert (manifest.form, (manifest.arch or {})["block"]) == ("training", "plain" if form == "deploy" else "repvgg")
    assert manifest.preprocessing == P
    x = torch.randn(4, *SIZE)
    assert relative_error(exact(deploy, x), exact(best, x)) <= rounding(best, x)
    again = prune(start, source, tmp_path / "p", 0.5, RECIPE, log=said.append)  # goes on, from where it was
    assert "has had its 1 epochs already" in said[-1]
    assert again.after.top1 == report.after.top1
    other = copy.deepcopy(start)
    next(other.parameters()).data *= 1.01
    for network, keep in ((start, 0.3), (other, 0.5)):
        with pytest.raises(ValueError, match=r"holds a run with init 'RepVGG [0-9a-f]{16}', not 'RepVGG"):
            prune(network, source, tmp_path / "p", keep, RECIPE, log=said.append)


def test_the_command(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = zoo.create_model("repvgg_micro", num_classes=10, in_chans=1, width=0.25, small_input=True)
    gray = Preprocessing((1, 16, 16), 16, mean=(0.5,), std=(0.5,))
    save(randomize(small, (16, 1, 16, 16)), tmp_path / "m.safetensors", preprocessing=gray)
    words = f"--data digits --epochs 1 --limit 64 --out {tmp_path / 'p'}".split()
    main(["prune", str(tmp_path / "m.safetensors"), "--keep", "0.5", "--json", *words])
    figures = json.loads(capsys.readouterr().out)
    assert figures["keep"] == 0.5
    with pytest.raises(SystemExit) as stopped:
        main(["prune", str(tmp_path / "m.safetensors"), "--keep", "1.5", *words])
    assert stopped.value.code == 2
    assert "--keep 1.5: the share of the channels that stay, above 0 and below 1" in capsys.readouterr().err


def test_what_is_refused(model: nn.Module, source: Source, images: Tensor, tmp_path: Path) -> None:
    for keep in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="the share of the channels that stay, above 0 and below 1"):
            pruned(model, images, keep)
    with pytest.raises(ReparamError, match="only a RepVGG can be pruned, not resnet18"):
        pruned(zoo.create_model("resnet18").eval(), images, 0.5)
    with pytest.raises(ReparamError, match="a network with squeeze-excite cannot be pruned"):
        pruned(zoo.create_model("repvgg_d2se", width=0.03).eval(), images, 0.5)
    with pytest.raises(ReparamError, match="is in train mode"):
        pruned(zoo.create_model("repvgg_micro"), images, 0.5)
    with pytest.raises(ReparamError, match="computes its kernel from other parameters, which cannot be cut: fold the model first"):
        pruned(network(block="dirac"), images, 0.5)
    with pytest.raises(ValueError, match="the model knows 3 classes, self-labelled has 2"):
        prune(model, replace(source, classes=["a", "b"]), tmp_path / "p", 0.5, RECIPE)
    grey = replace(source, preprocessing=Preprocessing((1, 16, 16), 16, mean=(0.5,), std=(0.5,)))
    with pytest.raises(ValueError, match="the model takes images of 3 channels, those of self-labelled have 1"):
        prune(model, grey, tmp_path / "p", 0.5, RECIPE)
    assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_read_are_left_out_where_it_is_asked_for(model: nn.Module, tmp_path: Path) -> None:
    for number in range(24):
        path = tmp_path / ("val" if number > 17 else "train") / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 50).convert("RGB").save(path)
    (tmp_path / "train/a/0.png").write_bytes(b"damaged")
    path.write_bytes(b"damaged")
    source = replace(open_source(str(tmp_path)), preprocessing=P)
    with pytest.raises(ImageError, match=r"0\.png"):
        prune(model, source, tmp_path / "stopped", 0.5, RECIPE, log=lambda line: None)
    skip = Keeping(on_bad_image="skip")
    report = prune(model, source, tmp_path / "p", 0.5, RECIPE, keeping=skip, log=lambda line: None)
    assert report.before.images == report.after.images == 5
    assert str(path) in (tmp_path / "p/bad_images.txt").read_text()
