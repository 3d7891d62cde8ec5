"""pspnet.py: geometry by hand, both plans, both forms, every size; and what a fold must not lose."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from rounding import rounding
from torch import Tensor, nn

import repvgg
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import pretrained, zoo
from repvgg.models.load import open_model
from repvgg.models.names import FAMILY, PSPNETS, resolve_name
from repvgg.models.pspnet import PSPNet, Pyramid, _by_running_statistics
from repvgg.models.repvgg import Layer, RepVGG

NARROW = ("pspnet_repvgg_micro", "pspnet_repvgg_a0_fast", "pspnet_repvgg_b1g2")


def narrow(name: str, num_classes: int = 5, **options: Any) -> PSPNet:
    """Random statistics, few channels."""
    model = repvgg.create_model(name, num_classes=num_classes, **{"width": 0.125, **options})
    assert isinstance(model, PSPNet)
    return randomize(model, (4, model_channels(model), 65, 65))


class Pair(NamedTuple):
    """A network in both forms, in float32 and in float64. Shared between tests: not to be changed."""

    single: PSPNet
    single_deploy: nn.Module
    double: PSPNet
    double_deploy: nn.Module


def _pair(name: str) -> Pair:
    single = narrow(name)
    double = copy.deepcopy(single).double()
    return Pair(single, reparameterize(single), double, reparameterize(double))


@pytest.fixture(scope="module")
def pair() -> Callable[[str], Pair]:
    """Each network is made once, and goes with the last of these tests."""
    return cache(_pair)


def model_channels(model: PSPNet) -> int:
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def dilations(model: nn.Module) -> list[int]:
    """Of the 3x3 convolutions of a RepVGG backbone, in deploy form."""
    assert isinstance(model, PSPNet)
    blocks: list[Any] = [layer.block for layer in model.backbone.modules() if isinstance(layer, Layer)]
    return [block.dilation[0] for block in blocks]


def test_every_member_has_both_plans_and_the_papers_baselines_are_there() -> None:
    assert len(PSPNETS) == 2 * len(FAMILY) + 3
    assert set(PSPNETS) < set(repvgg.list_models())
    assert resolve_name("PSPNet-RepVGG-B1g2-fast") == "pspnet_repvgg_b1g2_fast"


@pytest.mark.parametrize("name", ["a0", "b1g2"])
def test_which_layers_dilate(name: str) -> None:
    """All 3x3 of the last two stages, by 2 and by 4; in the fast plan the last four of stage 4 and the one of stage 5."""
    _, two, three, four, five = 1, *FAMILY[f"repvgg_{name}"].depths
    with torch.device("meta"):
        full = repvgg.create_model(f"pspnet_repvgg_{name}", deploy=True)
        fast = repvgg.create_model(f"pspnet_repvgg_{name}_fast", deploy=True)
    before = [1] * (1 + two + three)
    assert five == 1
    assert dilations(full) == before + [2] * four + [4]
    assert dilations(fast) == before + [1] * (four - 4) + [2] * 4 + [4]


@pytest.mark.parametrize(
    ("name", "middle", "last"),
    [("pspnet_repvgg_b1g2", 512, 2048), ("pspnet_repvgg_b2", 640, 2560), ("pspnet_resnet50", 1024, 2048)],
)
def test_the_originals_widths(name: str, middle: int, last: int) -> None:
    """512 channels in the head, 256 in the auxiliary one, whatever the backbone; a quarter of its channels in each level."""
    with torch.device("meta"):
        model = repvgg.create_model(name, num_classes=19)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items() if key.endswith("weight") and t.dim() == 4}
    assert shapes["pyramid.levels.2.conv.weight"] == (last // 4, last, 1, 1)
    assert shapes["head.conv.weight"] == (512, 2 * last, 3, 3)
    assert shapes["head.classifier.weight"] == (19, 512, 1, 1)
    assert shapes["auxiliary.conv.weight"] == (256, middle, 3, 3)


def test_a_width_scales_the_heads_too() -> None:
    with torch.device("meta"):
        model = repvgg.create_model("pspnet_repvgg_a0_fast", num_classes=11, width=0.25)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes["head.classifier.weight"][1] == 128
    assert shapes["auxiliary.classifier.weight"][1] == 64


def test_pyramid_by_hand() -> None:
    """Means of bins by slicing, and bilinear upsampling with aligned corners by matrix products."""
    pyramid = randomize(Pyramid(4, 2).double(), (3, 4, 12, 18))
    x = torch.randn(2, 4, 12, 18, dtype=torch.float64)
    wanted = [x]
    for bins, level in zip((1, 2, 3, 6), pyramid.levels, strict=True):
        means = x.view(2, 4, bins, 12 // bins, bins, 18 // bins).mean((3, 5))
        small = level(means)
        rows, columns = _aligned(12, bins), _aligned(18, bins)
        wanted.append(torch.einsum("yi,ncij,xj->ncyx", rows, small, columns))
    assert relative_error(pyramid(x), torch.cat(wanted, 1)) <= rounding(pyramid, x)


def _aligned(size: int, bins: int) -> Tensor:
    """[size, bins]: corners lie on corners."""
    weights = torch.zeros(size, bins, dtype=torch.float64)
    for i in range(size):
        at = i * (bins - 1) / (size - 1)
        low = min(int(at), bins - 1)
        high = min(low + 1, bins - 1)
        weights[i, low] += 1 - (at - low)
        weights[i, high] += at - low
    return weights


def test_a_size_of_8n_plus_1_is_not_padded_and_any_other_is_its_corner() -> None:
    """The rule of the original, (size - 1) % 8 == 0, and what the others are made to obey it."""
    model = narrow("pspnet_repvgg_micro").double()
    x = torch.randn(1, 3, 41, 33, dtype=torch.float64)
    with torch.no_grad():
        middle, last = model._features(x)
        assert last.shape[-2:] == middle.shape[-2:] == (6, 5)
        whole = F.interpolate(model.head(model.pyramid(last)), (41, 33), mode="bilinear", align_corners=True)
        assert relative_error(model(x), whole) <= rounding(model, x)
        cut = model(x[..., :37, :30])
        padded = model(F.pad(x[..., :37, :30], (0, 3, 0, 4)))
        assert cut.shape == (1, 5, 37, 30)
        assert relative_error(cut, padded[..., :37, :30]) <= rounding(model, x)


@pytest.mark.parametrize("size", [(33, 33), (40, 25), (7, 50), (1, 1)])
@pytest.mark.parametrize("name", [*NARROW[:2], pytest.param(NARROW[2], marks=pytest.mark.slow)])  # groups: test_repvgg.py
def test_both_forms_agree_at_any_size(name: str, size: tuple[int, int], pair: Callable[[str], Pair]) -> None:
    model, deploy, exact, exact_deploy = pair(name)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    assert not deploy.fold_report.left  # type: ignore[union-attr]
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        wanted = exact(x.double())
        assert relative_error(deploy(x), wanted) <= rounding(model, x)
        assert relative_error(exact_deploy(x.double()), wanted) <= rounding(exact, x.double())
    assert deploy(x).shape == (2, 5, *size)


# The 18 proves that timm's forward is seen through; the 50 is the same three times as deep.
@pytest.mark.parametrize("name", ["pspnet_resnet18", pytest.param("pspnet_resnet50", marks=pytest.mark.slow)])
def test_resnets_fold_whole(name: str) -> None:
    pytest.importorskip("timm")
    model = narrow(name).double()
    deploy = reparameterize(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    x = torch.randn(1, 3, 41, 30, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(deploy(x), model(x)) <= rounding(model, x)
        assert [f.shape[-1] for f in model._features(F.pad(x, (0, 3)))] == [5, 5]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_narrow_resnet_has_that_share_of_every_maps_channels(name: str) -> None:
    """Counted from timm's own: a convolution has a sixteenth of its weights, the stem, which reads the image, a quarter."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0)
        model = repvgg.create_model(f"pspnet_{name}", num_classes=11, width=0.25)
    assert isinstance(model, PSPNet)
    shares = {path: 4 if path == "conv1.weight" or p.dim() == 1 else 16 for path, p in whole.named_parameters()}
    wanted = {path: p.numel() // shares[path] for path, p in whole.named_parameters()}
    assert {path: p.numel() for path, p in model.backbone.named_parameters()} == wanted
    last = whole.num_features // 4
    assert model.head.get_submodule("conv").weight.shape == (128, 2 * last, 3, 3)
    assert model.auxiliary is not None
    assert model.auxiliary.get_submodule("conv").weight.shape == (64, last // 2, 3, 3)
    assert zoo.manifest_of(model).arch == {"name": f"pspnet_{name}", "num_classes": 11, "in_chans": 3, "width": 0.25}


def test_a_narrow_resnet_starts_as_timms_do() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    tensors = repvgg.create_model("pspnet_resnet50", width=0.25).state_dict()
    assert float(tensors["backbone.layer3.0.conv2.weight"].std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert not tensors["backbone.layer3.0.bn3.weight"].any()
    assert tensors["backbone.bn1.weight"].eq(1).all()
    assert tensors["backbone.layer4.2.bn3.running_var"].shape == (512,)


def test_the_auxiliary_head_is_for_training_only() -> None:
    model = narrow("pspnet_repvgg_micro")
    x = torch.randn(2, 3, 33, 40)
    logits, auxiliary = model.train()(x)
    assert logits.shape == auxiliary.shape == (2, 5, 33, 40)
    assert isinstance(model.eval()(x), Tensor)
    deploy = reparameterize(model)
    assert isinstance(deploy, PSPNet)
    assert deploy.auxiliary is None
    assert not any(name.startswith("auxiliary") for name in deploy.state_dict())
    assert model.auxiliary is not None
    built = repvgg.create_model("pspnet_repvgg_micro", num_classes=5, width=0.125, deploy=True)
    built.load_state_dict(deploy.state_dict())  # strictly
    assert torch.equal(built.eval()(x), deploy(x))


def test_one_image_in_train_mode() -> None:
    """Trap 16: the first level has one value a channel, which cannot be normalised by its own variance."""
    model = narrow("pspnet_repvgg_micro").train()
    before = model.pyramid.levels[0].get_submodule("bn").state_dict()["running_mean"].clone()
    x = torch.randn(1, 3, 33, 33)
    logits, auxiliary = model(x)
    (logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model.pyramid.levels[0].get_submodule("bn").state_dict()["running_mean"], before)
    level: Any = model.pyramid.levels[0]
    means = torch.randn(1, level.conv.in_channels, 1, 1)
    by_hand = _by_running_statistics(level, means)
    assert torch.allclose(by_hand, level.eval()(means))


@pytest.mark.parametrize("name", ["pspnet_repvgg_a0_fast", pytest.param("pspnet_resnet18", marks=pytest.mark.slow)])
def test_files_there_and_back(name: str, tmp_path: Path, pair: Callable[[str], Pair]) -> None:
    if "resnet" in name:
        pytest.importorskip("timm")
    model, deploy, _, _ = pair(name)
    x = torch.randn(1, 3, 33, 33)
    for form in (model, deploy):
        repvgg.save(form, tmp_path / "a.safetensors", classes="abcde")
        again = repvgg.load(tmp_path / "a.safetensors")
        assert torch.equal(again(x), form(x))
        manifest = zoo.manifest_of(again)
        assert manifest.form == ("training" if form is model else "deploy")
        assert manifest.arch == zoo.manifest_of(model).arch


def test_a_new_classifier() -> None:
    model = narrow("pspnet_repvgg_micro")
    body = {name: tensor.clone() for name, tensor in model.pyramid.state_dict().items()}
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert all(out.shape[1] == 7 for out in model.train()(torch.randn(2, 3, 17, 17)))
    assert all(
        torch.equal(t, body[name]) for name, t in model.pyramid.state_dict().items() if "running" not in name and "num" not in name
    )


def test_a_classifiers_weights_in_the_backbone() -> None:
    classifier = randomize(repvgg.create_model("repvgg_micro", num_classes=7, width=0.125))
    model = narrow("pspnet_repvgg_micro")
    said = model.load_backbone(classifier.state_dict())
    assert said.endswith("tensors in the backbone; left out: head.bias, head.weight; new: pyramid, head, auxiliary head")
    kept = classifier.state_dict()
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, kept[name])
    assert isinstance(classifier, RepVGG)
    wrong: list[nn.Module] = [
        repvgg.create_model("repvgg_micro", width=0.25),
        repvgg.create_model("repvgg_a0", width=0.125),
        reparameterize(classifier),
    ]
    for other in wrong:
        with pytest.raises(ValueError, match=r"these weights are not of this backbone, in its form: they differ in s.* more"):
            model.load_backbone(other.state_dict())


def test_the_papers_weights_go_into_the_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    released = randomize(repvgg.create_model("repvgg_a0"))
    repvgg.save(released, tmp_path / "a0.safetensors")
    files = {"repvgg_a0": tmp_path / "a0.safetensors"}
    monkeypatch.setattr(pretrained, "pretrained_file", lambda name, revision: files[name])
    model = repvgg.create_model("pspnet_repvgg_a0_fast", num_classes=4, pretrained=True)
    assert isinstance(model, PSPNet)
    kept = released.state_dict()
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, kept[name])
    assert zoo.manifest_of(model).training["backbone"].startswith("349 tensors in the backbone; left out: head.bias")
    with pytest.raises(ValueError, match="there are no weights of pspnet_repvgg_a0, only of its backbone"):
        open_model("pspnet_repvgg_a0")


def test_options_that_do_not_fit_are_named() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("pspnet_repvgg_a0", {"output_stride": 16}, "pspnet_repvgg_a0 takes no output_stride"),
        ("pspnet_repvgg_a0", {"small_input": True}, "pspnet_repvgg_a0 takes no small_input"),
        ("pspnet_resnet18", {"block": "acb"}, "pspnet_resnet18 takes no block"),
        ("pspnet_resnet18", {"width": 0}, "width is above 0 and at most 16"),
        ("pspnet_resnet18", {"width": 0.5, "pretrained": True}, "pspnet_resnet18: pretrained weights fit width=1 only"),
        ("pspnet_resnet18", {"pretrained": "main"}, "pretrained=True takes no revision"),
        ("pspnet_repvgg_a0", {"num_classes": 0}, "at least 1"),
        ("pspnet_resnet34", {}, "no model 'pspnet_resnet34': did you mean"),
    ]
    for name, options, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            repvgg.create_model(name, **options)


def run(model: nn.Module, x: Tensor) -> tuple[Any, int]:
    """What it gives, and how many numbers it keeps for the backward pass."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = model(x)
    return found, sum(sizes)


@pytest.mark.parametrize("name", ["pspnet_repvgg_micro", "pspnet_resnet18"])
def test_checkpointing_keeps_less_and_changes_nothing(name: str) -> None:
    """Nor the batch norms' statistics, which count a batch once."""
    x = torch.randn(2, 3, 25, 25)
    gradients, buffers, kept = [], [], []
    for enable in (False, True):
        torch.manual_seed(0)
        model = narrow(name).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)  # dropout
        (logits, auxiliary), size = run(model, x)
        kept.append(size)
        (logits.square().mean() + auxiliary.square().mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
        buffers.append(list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]
    assert kept[1] < kept[0]


def test_synchronised_batch_norms_are_of_the_training_form(tmp_path: Path) -> None:
    """What the paper's recipe leaves: a file that folds."""
    model = narrow("pspnet_repvgg_micro")
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert zoo.manifest_of(synchronised).form == "training"
    repvgg.save(synchronised, tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 33, 33)
    assert torch.equal(repvgg.load(tmp_path / "a.safetensors")(x), model(x))
    deploy = reparameterize(synchronised)
    assert zoo.manifest_of(deploy).form == "deploy"
    assert relative_error(deploy(x), model(x)) <= rounding(model, x)


def test_torch_jit_script_says_what_to_do_instead() -> None:
    with pytest.raises(ValueError, match=r"torch\.jit\.script cannot compile a PSPNet: repvgg export --to pt2"):
        torch.jit.script(repvgg.create_model("pspnet_repvgg_micro", num_classes=2, width=0.125, deploy=True))
