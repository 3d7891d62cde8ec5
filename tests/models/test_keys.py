"""keys.py against timm's own state dicts, and against the tables of foreign.py."""

from functools import cache

import pytest
import torch
from foreign import FORMS, NARROW, SCHEMES, in_keys, timm_architecture
from torch import Tensor

from repvgg.models import keys
from repvgg.models.names import FAMILY
from repvgg.models.repvgg import RepVGG

timm = pytest.importorskip("timm")


@cache
def ours(name: str, form: str = "training", **options: object) -> dict[str, Tensor]:
    """Keys and shapes of ours; no memory. Shared between tests: not to be changed."""
    with torch.device("meta"):
        return RepVGG(FAMILY[name], deploy=form == "deploy", **options).state_dict()  # type: ignore[arg-type]


@cache
def theirs(name: str, form: str, scheme: str) -> dict[str, Tensor]:
    """Keys and shapes of theirs; no memory."""
    with torch.device("meta"):
        net = timm_architecture(name, NARROW[name][1])
        net = timm.utils.reparameterize_model(net) if form == "deploy" else net
    return {in_keys(key, scheme): tensor for key, tensor in net.state_dict().items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize("name", NARROW)
def test_the_training_form_has_the_keys_and_shapes_of_each(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name).state_dict()
    for scheme in SCHEMES:
        wanted = {in_keys(key, scheme): tuple(tensor.shape) for key, tensor in theirs.items()}
        assert shapes(keys.to_foreign(ours(name), scheme)) == wanted


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NARROW)
def test_there_and_back(name: str, form: str, scheme: str) -> None:
    foreign = theirs(name, form, scheme)
    ours = keys.to_ours(foreign, scheme)
    assert len(ours) == len(foreign)
    assert not ours.keys() & foreign.keys()
    back = keys.to_foreign(ours, scheme)
    assert list(back) == list(foreign)
    assert all(back[key] is foreign[key] for key in foreign)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_d2se"])
def test_a_scheme_is_known_by_its_keys(name: str, form: str, scheme: str) -> None:
    for prefix in ("", "module.", "model.encoder."):
        assert keys.locate(prefix + key for key in theirs(name, form, scheme)) == keys.Place(scheme, prefix)
        assert keys.locate(prefix + key for key in ours(name, form)) == keys.Place("repvgg", prefix)


def test_strangers_are_no_scheme() -> None:
    for other in ("resnet18", "mobileone_s0", "vgg16"):
        with torch.device("meta"):
            assert keys.locate(timm.create_model(other).state_dict()) is None
    assert keys.locate([]) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_key_of_no_scheme_stays_as_it_is(scheme: str) -> None:
    tensors = {"optimizer.step": torch.zeros(1), "stages.9x.conv": torch.zeros(1), "head.bias2.": torch.zeros(1)}
    assert keys.to_ours(tensors, scheme) == tensors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tensor_that_is_there_in_two_spellings_is_refused(scheme: str) -> None:
    foreign = theirs("repvgg_a1", "deploy", scheme)
    with pytest.raises(ValueError, match="twice"):
        keys.to_ours({**foreign, "stem.block.weight": torch.zeros(1)}, scheme)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILY)
def test_the_member_is_read_off_the_shapes(name: str, form: str) -> None:
    found = keys.infer_arch(ours(name, form))
    assert found == {"name": name, "num_classes": 1000, "in_chans": 3, "width": 1.0, "small_input": False}


def test_classes_and_channels_are_read_off_the_shapes() -> None:
    found = keys.infer_arch(ours("repvgg_a1", num_classes=10, in_chans=4))
    assert found == {"name": "repvgg_a1", "num_classes": 10, "in_chans": 4, "width": 1.0, "small_input": False}


@pytest.mark.parametrize("name", ["repvgg_a2", "repvgg_b1g4", "repvgg_b2", "repvgg_b3g2", "repvgg_d2se"])
def test_a_narrow_member_is_read_off_the_shapes(name: str) -> None:
    narrow = ours(name, width=0.5)
    found = keys.infer_arch(narrow)
    assert found is not None
    found.pop("small_input")
    assert shapes(ours(**found)) == shapes(narrow)  # perhaps by another name: B1 at 0.625 is B2 at 0.5


def test_small_input_shows_in_the_training_form() -> None:
    found = keys.infer_arch(ours("repvgg_b0", small_input=True))
    assert found is not None
    assert found["small_input"]


def test_without_a_head_it_is_a_backbone() -> None:
    found = keys.infer_arch({key: tensor for key, tensor in ours("repvgg_a1").items() if not key.startswith("head.")})
    assert found == {"name": "repvgg_a1", "num_classes": 0, "in_chans": 3, "width": 1.0, "small_input": False}


def test_no_member_has_other_depths_widths_or_groups() -> None:
    whole = ours("repvgg_b1g4", "deploy")
    assert keys.infer_arch({}) is None
    for changed in ("stages.3.0.block.weight", "stages.2.7.block.weight", "stem.block.weight"):
        assert keys.infer_arch({key: tensor for key, tensor in whole.items() if key != changed}) is None
    third = whole["stages.0.1.block.weight"]
    assert keys.infer_arch({**whole, "stages.0.1.block.weight": third[:, : third.shape[1] // 2]}) is None
    assert keys.infer_arch({**whole, "stages.1.0.block.weight": whole["stages.1.0.block.weight"][:-4]}) is None
    assert keys.infer_arch({**whole, "stem.block.weight": torch.zeros(64)}) is None
