"""Class activation maps: they add up to the logits, and point to where the evidence is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from torch import nn

from repvgg.api.using import predictions
from repvgg.data import open_source
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.load import load, save
from repvgg.models.manifest import Preprocessing
from repvgg.models.plain import PlainNet, layer_list
from repvgg.models.views import Views
from repvgg.models.zoo import create_model, manifest_of, remember
from repvgg.predict.explain import AGAINST, FOR, class_maps, explain, shown
from repvgg.predict.labels import predict


@pytest.fixture(scope="module")
def model() -> nn.Module:
    net = randomize(create_model("repvgg_micro", num_classes=3, width=0.25, small_input=True), (16, 3, 32, 32))
    p = Preprocessing((3, 32, 32), 36)
    return remember(net, replace(manifest_of(net), classes=["cat", "dog", "owl"], preprocessing=p))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def forms(model: nn.Module) -> dict[str, nn.Module]:
    deploy = reparameterize(model)
    listed = PlainNet(layer_list(deploy) or [])
    listed.load_state_dict(deploy.state_dict())
    return {"training form": model, "deploy form": deploy, "list of layers": listed.eval()}


@pytest.mark.parametrize("name", ["training form", "deploy form", "list of layers"])
def test_the_mean_of_a_map_and_the_bias_are_the_logit(model: nn.Module, name: str) -> None:
    net, x = forms(model)[name].double(), torch.randn(4, 3, 48, 64, dtype=torch.float64)
    maps = class_maps(net, x)
    bias = [module for module in net.modules() if isinstance(module, nn.Linear)][-1].bias
    assert maps.shape == (4, 3, 6, 8)  # 48 x 64 pixels, at a stride of 8
    with torch.no_grad():
        assert torch.allclose(maps.mean((2, 3)) + bias, net(x), rtol=1e-12, atol=1e-12)
    model.float()


def test_a_map_follows_what_is_seen() -> None:
    """A network that says how red a place is: its map is red where the image is."""
    net: Any = create_model("repvgg_micro", num_classes=2, width=0.0625).eval()
    features = torch.zeros(1, net.num_features, 4, 6)
    features[0, 0, 1, 4] = 24.0
    net.forward_features = lambda x: features
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.weight[1, 0] = 1
        net.head.bias.zero_()
    net.forward = lambda x: net.head(net.forward_features(x).mean((2, 3)))
    maps = class_maps(net, torch.zeros(1, 3, 64, 96))
    assert maps[0, 1].nonzero().tolist() == [[1, 4]]
    picture = np.asarray(shown(torch.full((3, 64, 96), 128, dtype=torch.uint8), maps[0, 1]), np.int64)
    row, column = np.unravel_index((picture[..., 0] - picture[..., 2]).argmax(), picture.shape[:2])
    assert (row * 4 // picture.shape[0], column * 6 // picture.shape[1]) == (1, 4)
    assert (picture[0, 0] == 128).all()


def test_evidence_for_and_against_has_two_colours() -> None:
    picture = np.asarray(shown(torch.zeros(1, 224, 224, dtype=torch.uint8), torch.tensor([[1.0, -1.0]])), np.int64)
    assert np.allclose(picture[100, 5], 0.75 * np.array(FOR), atol=2)
    assert np.allclose(picture[100, -5], 0.75 * np.array(AGAINST), atol=2)


def test_the_answers_are_those_of_predict_with_a_picture_beside_the_image(model: nn.Module, photo: Path, tmp_path: Path) -> None:
    (answer,) = explain(model, [str(photo)])
    (plain,) = predict(model, [str(photo)])
    assert replace(answer, explanation=None) == plain
    assert answer.explanation == str(photo.with_name("photo.cam.png"))
    with Image.open(answer.explanation) as picture:
        assert picture.size == (224, 224)
    (elsewhere,) = explain(model, [str(photo)], tmp_path / "new/cams")
    assert elsewhere.explanation == str(tmp_path / "new/cams/photo.cam.png")


def test_a_folder_is_explained_twice_alike_and_trained_on_without_its_pictures(
    model: nn.Module, photo: Path, tmp_path: Path
) -> None:
    """Also where two of its images differ by their suffixes alone."""
    folder = tmp_path / "set/train/cat"
    folder.mkdir(parents=True)
    for name in ("one.png", "one.jpg", "two_cam.png"):
        Image.open(photo).save(folder / name)
    first, second = (list(explain(model, [str(folder)])) for _ in range(2))
    assert first == second
    named = [Path(answer.explanation or "").name for answer in first]
    assert named == ["one.jpg.cam.png", "one.png.cam.png", "two_cam.cam.png"]
    source = open_source(str(tmp_path / "set"))
    assert len(source.train) + len(source.val) == 3


def test_an_unreadable_image_stops_no_other(model: nn.Module, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"damaged")
    bad, good = explain(model, [str(tmp_path / "a.png"), str(photo)])
    assert bad.error
    assert good.explanation


def test_what_cannot_be_explained_is_refused(model: nn.Module, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a mask shows itself"):
        list(explain(create_model("pspnet_repvgg_micro_fast", num_classes=3, width=0.0625).eval(), [str(photo)]))
    with pytest.raises(ValueError, match="does not give its last feature map"):
        class_maps(nn.Linear(4, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="--top 0: at least 1"):
        list(explain(model, [str(photo)], top=0))
    with pytest.raises(ValueError, match="leave out --engine, --precision, --slide, --scales and --flip"):
        list(predictions(model, photo, explain="cam", views=Views(flip=True)))
    (tmp_path / "below").mkdir()
    (tmp_path / "below/photo.png").write_bytes(photo.read_bytes())
    with pytest.raises(ValueError, match="has the same name"):
        list(explain(model, [str(photo), str(tmp_path / "below")], tmp_path / "out"))


def test_a_head_that_is_more_than_a_mean_is_refused() -> None:
    class Largest(nn.Module):
        """Takes the largest of all places."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.amax((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="does more than take the mean"):
        class_maps(Largest().eval(), torch.randn(1, 3, 8, 8))


def test_a_comparator_of_timm_has_maps_too() -> None:
    pytest.importorskip("timm")
    net = create_model("resnet18", num_classes=5).eval()
    assert class_maps(net, torch.randn(2, 3, 64, 64)).shape == (2, 5, 2, 2)


def test_a_deploy_file_is_explained(model: nn.Module, photo: Path, tmp_path: Path) -> None:
    save(reparameterize(model), tmp_path / "deploy.safetensors")
    (answer,) = explain(load(tmp_path / "deploy.safetensors"), [str(photo)])
    wanted = next(iter(explain(model, [str(photo)])))
    assert dict(answer.labels) == pytest.approx(dict(wanted.labels), rel=1e-3)
    assert max(dict(wanted.labels).values()) > 0.4  # of three classes
