"""load.py and keys.py: checkpoints of other implementations give their logits, and go back."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import randomize, relative_error
from foreign import CONTAINERS, FORMS, NARROW, state, timm_net
from members import IMAGES, SORTS, assert_refused, assert_same_tensors, logits, narrow
from rounding import rounding
from safetensors.torch import save_file
from torch import Tensor

import repvgg
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import checkpoint, zoo
from repvgg.models.manifest import Preprocessing


@cache
def their_logits(name: str, form: str) -> Tensor:
    """What timm's network says, in float64: 1e-5 would be lost in the rounding of the narrowest and deepest."""
    with torch.no_grad():
        return copy.deepcopy(timm_net(name, form)).double()(IMAGES.double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(pytest.param(name, "timm", marks=[] if name in SORTS else pytest.mark.slow) for name in NARROW),
        *(("repvgg_b1g4", scheme) for scheme in ("official", "mmpretrain")),
        *(pytest.param("repvgg_d2se", scheme, marks=pytest.mark.slow) for scheme in ("official", "mmpretrain")),  # test_convert.py
    ],
)
def test_foreign_checkpoints_give_the_same_logits(name: str, scheme: str, form: str, tmp_path: Path) -> None:
    save_file(state(name, form, scheme), tmp_path / "theirs.safetensors")
    model = repvgg.load(tmp_path / "theirs.safetensors")
    assert zoo.manifest_of(model).form == form
    repvgg.save(model, tmp_path / "back.safetensors", to_keys=scheme)
    back, manifest = checkpoint.read(tmp_path / "back.safetensors")
    assert manifest is not None
    theirs = state(name, form, scheme)
    assert back.keys() == theirs.keys()
    assert all(back[key].dtype == theirs[key].dtype and torch.equal(back[key], theirs[key]) for key in theirs)
    assert_same_tensors(repvgg.load(tmp_path / "back.safetensors"), model)
    model.double()
    allowed = rounding(model, IMAGES.double())
    assert relative_error(logits(model), their_logits(name, form)) <= allowed
    if form == "training":
        folded = reparameterize(model)
        assert relative_error(logits(folded), their_logits(name, form)) <= allowed
        repvgg.save(folded, tmp_path / "folded.safetensors", to_keys="timm")
        net = copy.deepcopy(timm_net(name, "deploy")).double()
        for tensor in net.state_dict().values():
            tensor.zero_()
        net.load_state_dict(checkpoint.read(tmp_path / "folded.safetensors")[0], strict=True)
        with torch.no_grad():
            assert relative_error(net(IMAGES.double()), their_logits(name, form)) <= allowed


@pytest.mark.parametrize(
    ("scheme", "container"),
    [("official", c) for c in CONTAINERS] + [(s, c) for s in ("timm", "mmpretrain") for c in ("bare.safetensors", "nested.ckpt")],
)
@pytest.mark.parametrize("form", FORMS)
def test_foreign_checkpoints_load_by_content(form: str, scheme: str, container: str, tmp_path: Path) -> None:
    CONTAINERS[container](state("repvgg_a1", form, scheme), tmp_path / container)
    model = repvgg.load(tmp_path / container)
    wanted = state("repvgg_a1", form, scheme)
    repvgg.save(model, tmp_path / "back.pth", to_keys=scheme)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)
    assert zoo.manifest_of(model).classes is None


def test_old_checkpoints_lack_batch_counters(tmp_path: Path) -> None:
    whole = state("repvgg_a1", "training", "official")
    torch.save({k: t for k, t in whole.items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    model = repvgg.load(tmp_path / "old.pth").double()
    assert relative_error(logits(model), their_logits("repvgg_a1", "training")) <= rounding(model, IMAGES.double())


def test_a_thousand_classes_are_imagenets(tmp_path: Path) -> None:
    model = narrow("repvgg_a1", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    manifest = zoo.manifest_of(repvgg.load(tmp_path / "bare.pth"))
    assert manifest.classes is not None
    assert manifest.classes[:2] == ["tench", "goldfish"]
    assert len(manifest.classes) == 1000
    assert manifest.preprocessing == Preprocessing()


@pytest.mark.parametrize("other", ["resnet18", "mobileone_s0"])
def test_checkpoints_of_other_networks_are_refused(other: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model(other, num_classes=2).state_dict(), tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", "not a RepVGG checkpoint")


def test_a_network_of_no_member_is_refused(tmp_path: Path) -> None:
    tensors = state("repvgg_a1", "deploy", "official")
    del tensors["stage2.1.rbr_reparam.weight"]
    torch.save(tensors, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", "no member of the family")


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_every_member_of_timm_at_full_width(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomize(timm.create_model(name, num_classes=1000), (4, 3, 64, 64))
    if name == "repvgg_d2se":  # so deep a net of random gates amplifies rounding a hundred thousandfold; timm's own fold too
        theirs = theirs.double()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    model = repvgg.load(tmp_path / "theirs.safetensors")
    arch = zoo.manifest_of(model).arch
    assert arch is not None
    assert (arch["name"], arch["width"]) == (name, 1)
    x = torch.randn(2, 3, 64, 64).to(next(model.parameters()))
    with torch.no_grad():
        wanted, allowed = theirs(x), rounding(theirs, x)
        assert relative_error(model(x), wanted) <= allowed
        folded = reparameterize(model)
        assert relative_error(folded(x), wanted) <= allowed
        for ours in (model, folded):
            repvgg.save(ours, tmp_path / "back.safetensors", to_keys="timm")
            tensors, _ = checkpoint.read(tmp_path / "back.safetensors")
            if ours is folded:
                theirs = timm.utils.model.reparameterize_model(theirs)
            theirs.load_state_dict(tensors, strict=True)
            assert relative_error(theirs(x), wanted) <= allowed
