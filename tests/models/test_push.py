"""push.py: what was pushed comes back bit for bit, with a card that says what is true of it."""

import copy
import json
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import randomize
from hub_server import WRITER, HubServer, hub_server
from PIL import Image
from rounding import REPORTED
from torch import nn

import repvgg
from repvgg import cli
from repvgg.data.transforms import eval_transform, normalise
from repvgg.disk import FileError
from repvgg.models import hub, keys, zoo
from repvgg.models.in_timm import timm_config
from repvgg.models.push import MARK, model_card, push_to_hub, write_model

huggingface_hub = pytest.importorskip("huggingface_hub")
TRAINING = {"data": "hf:/home/me/pets", "val_top1": 0.9117, "epoch": 18, "recipe": {"epochs": 18, "lr": 0.2, "mixup": 0.0}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(tmp_path / "cache") as served, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", WRITER)
        yield served


@pytest.fixture(scope="module")
def model() -> nn.Module:
    net = randomize(repvgg.create_model("repvgg_micro", num_classes=3, width=0.25, small_input=True), (32, 3, 32, 32))
    return zoo.remember(net, replace(zoo.manifest_of(net), classes=["cat", "dog", "owl"], training=TRAINING))


def same(a: nn.Module, b: nn.Module) -> bool:
    tensors = b.state_dict()
    return a.state_dict().keys() == tensors.keys() and all(torch.equal(t, tensors[n]) for n, t in a.state_dict().items())


def test_there_and_back(server: HubServer, model: nn.Module) -> None:
    deploy = repvgg.reparameterize(model)
    commits = [push_to_hub(m, "me/pets", license="mit").rpartition("/")[2] for m in (model, deploy)]
    assert set(server.revisions["me/pets"]["main"]) == {"README.md", "config.json", "model.safetensors"}
    for name, revision, wanted in (
        ("me/pets", None, deploy),
        (f"me/pets@{commits[0]}", None, model),
        ("me/pets", commits[0], model),
    ):
        got = repvgg.from_pretrained(name, revision=revision)
        assert same(got, wanted)
        assert zoo.manifest_of(got) == zoo.manifest_of(wanted)
        assert not got.training
    config = json.loads(server.revisions["me/pets"][commits[0]]["config.json"])
    training = copy.deepcopy(model).train()
    push_to_hub(training, "me/trained")
    assert training.training
    assert same(repvgg.from_pretrained("me/trained"), model)
    assert (config["form"], config["classes"], config["arch"]["name"]) == ("training", ["cat", "dog", "owl"], "repvgg_micro")
    assert config["keys"] == "repvgg"


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    """A network that timm has too, on images that are cropped by a share that is no binary fraction."""
    torch.manual_seed(0)
    net = randomize(repvgg.create_model("repvgg_a0", num_classes=3, width=0.5, drop_rate=0.1))
    seen = replace(zoo.manifest_of(net).preprocessing, input_size=(3, 64, 64), resize=73, mean=(0.5, 0.4, 0.3))
    return zoo.remember(net, replace(zoo.manifest_of(net), classes=["cat", "dog", "owl"], preprocessing=seen))


def test_timm_opens_it_without_repvgg(server: HubServer, shared: nn.Module, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    push_to_hub(shared, "me/shared")
    write_model(shared, tmp_path)
    again = repvgg.from_pretrained("me/shared")
    assert json.loads((tmp_path / "config.json").read_text())["keys"] == "timm"
    assert same(again, shared)
    assert zoo.manifest_of(again) == zoo.manifest_of(shared)
    x = torch.randn(2, 3, 64, 64)
    for name in ("hf-hub:me/shared", f"local-dir:{tmp_path}"):
        theirs = timm.create_model(name, pretrained=True).eval()
        assert type(theirs).__module__.startswith("timm.")
        with torch.no_grad():
            assert torch.equal(theirs(x), shared(x))
        config = timm.data.resolve_model_data_config(theirs)
        assert (tuple(config["input_size"]), tuple(config["mean"])) == ((3, 64, 64), (0.5, 0.4, 0.3))
        resize = timm.data.create_transform(**config).transforms[0]
        assert resize.size == 73
        assert theirs.drop_rate == 0.1
    assert "timm.create_model" in server.revisions["me/shared"]["main"]["README.md"].decode()


def test_transformers_open_it_without_repvgg(shared: nn.Module, tmp_path: Path) -> None:
    """transformers is no dependency of ours: this is run where somebody has it."""
    transformers = pytest.importorskip("transformers")
    write_model(shared, tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs(x).logits, shared(x))
    image = Image.effect_noise((90, 80), 60).convert("RGB")
    found = transformers.pipeline("image-classification", model=str(tmp_path))(image)
    preprocessing = zoo.manifest_of(shared).preprocessing
    with torch.no_grad():
        seen = eval_transform(preprocessing)(torchvision.transforms.v2.functional.pil_to_tensor(image))
        wanted = shared(normalise(seen[None], preprocessing)).softmax(1)[0]
    assert {row["label"]: round(row["score"], 2) for row in found} == {
        name: round(float(p), 2) for name, p in zip(["cat", "dog", "owl"], wanted, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "options", "known"),
    [
        ("repvgg_a0", {}, True),
        ("repvgg_a0", {"num_classes": 0, "global_pool": ""}, True),
        ("repvgg_b1g4", {"in_chans": 1}, True),
        ("repvgg_d2se", {}, True),
        ("repvgg_b1", {"width": 0.25}, False),  # its stem would be narrower there
        ("repvgg_a0", {"deploy": True}, False),
        ("repvgg_a0", {"block": "acb"}, False),
        ("repvgg_a0", {"small_input": True}, False),
        ("repvgg_b1g2", {}, False),
        ("repvgg_l2pse", {}, False),
    ],
)
def test_what_timm_has_is_what_we_say(name: str, options: dict[str, Any], known: bool, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = repvgg.create_model(name, **options)
        config = timm_config(zoo.manifest_of(net))
        assert (config is not None) == known
        if config is not None:
            theirs = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
            ours = keys.to_foreign(net.state_dict(), "timm")
            assert {k: t.shape for k, t in theirs.state_dict().items()} == {k: t.shape for k, t in ours.items()}


def test_commands(server: HubServer, model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repvgg.save(model, tmp_path / "best.safetensors")
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": 600, "machine": {"processor": "a fast one"}}))
    cli.main(["push", str(tmp_path / "best.safetensors"), "me/pets", "--license", "mit", "--private"])
    assert capsys.readouterr().out.startswith(f"{server.url}/me/pets/commit/")
    assert server.private == {"me/pets"}
    card = server.revisions["me/pets"]["main"]["README.md"].decode()
    assert "| training time | 10.0 min |\n| trained on | a fast one |" in card
    cli.main(["info", "hf:me/pets", "--json"])
    assert json.loads(capsys.readouterr().out)["classes"] == ["cat", "dog", "owl"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "hf:me/none"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(
        "repvgg: me/none@main is not in the local cache and cannot be fetched: there is no such"
    )


def test_the_card_says_what_is_true(model: nn.Module) -> None:
    card = huggingface_hub.ModelCard(model_card(model, "me/pets", "apache-2.0"))
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("repvgg", "image-classification", "apache-2.0")
    assert {"repvgg", "repvgg_micro"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.9117, "name": "top-1"}]
    rows = dict(line.strip("| ").split(" | ") for line in card.text.splitlines() if re.match(r"\| \w", line))
    c = repvgg.cost(repvgg.reparameterize(model), (3, 32, 32))
    assert rows["top-1 on pets, validation"] == "91.17%"  # and no path of somebody's disk
    assert rows["multiply-adds"] == f"{c.macs / 1e9:.3f} G"
    assert rows["recipe"] == "epochs 18, lr 0.2"
    assert 0 < float(rows["largest relative error of the deploy form, against float64"]) < REPORTED
    assert "cat, dog, owl" in card.text
    assert "/home" not in card.content


def test_the_card_of_a_model_of_which_little_is_known() -> None:
    model = repvgg.reparameterize(
        randomize(repvgg.create_model("pspnet_repvgg_micro_fast", num_classes=2, width=0.25), (2, 3, 48, 48))
    )
    hostile = ["<script>alert(1)</script>", "a|b`c`\n# Title"]
    small = replace(zoo.manifest_of(model).preprocessing, input_size=(3, 48, 48))
    zoo.remember(model, replace(zoo.manifest_of(model), classes=hostile, preprocessing=small))
    card = huggingface_hub.ModelCard(model_card(model, "me/roads"))
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "image-segmentation"
    assert not {"license", "model-index"} & set(data)
    assert "largest relative error" not in card.text  # it cannot be known of a deploy form alone
    assert "<script" not in card.text
    assert "\n# Title" not in card.text


def test_a_card_that_somebody_wrote_stays(server: HubServer, model: nn.Module) -> None:
    push_to_hub(model, "me/pets")
    first = server.revisions["me/pets"]["main"]["README.md"].decode()
    assert MARK in first
    server.revisions["me/pets"]["main"]["README.md"] = first.replace("top-1", "top-one").encode()
    push_to_hub(model, "me/pets", license="mit")
    assert "top-one" not in server.revisions["me/pets"]["main"]["README.md"].decode()
    own = first.replace(MARK, "").encode()
    server.revisions["me/pets"]["main"]["README.md"] = own
    push_to_hub(repvgg.reparameterize(model), "me/pets")
    assert server.revisions["me/pets"]["main"]["README.md"] == own
    assert same(repvgg.from_pretrained("me/pets"), repvgg.reparameterize(model))


def test_a_hub_that_stumbles_overwrites_no_card(server: HubServer, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(model, "me/pets")
    before = dict(server.revisions["me/pets"]["main"])
    fetch = hub.fetch

    def stumbling(repo: str, revision: str = "main", file: str = hub.MODEL_FILE, token: str | None = None) -> Path:
        if file == "README.md":
            raise FileError("the hub answers 503")
        return fetch(repo, revision, file, token)

    monkeypatch.setattr(hub, "fetch", stumbling)
    with pytest.raises(FileError, match="503"):
        push_to_hub(model, "me/pets", license="mit")
    assert server.revisions["me/pets"]["main"] == before


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_what_is_on_the_hub_is_a_stranger_s(
    server: HubServer, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    push_to_hub(model, "me/pets")
    files = server.revisions["me/pets"]["main"]
    torch.save(model.state_dict(), tmp_path / "harmless.pth")
    cases = (
        (pickle.dumps(Bomb()), "is a pickle, and those of the hub are never opened"),
        ((tmp_path / "harmless.pth").read_bytes(), "is a pickle, and those of the hub are never opened"),
        (files["model.safetensors"][:1000], "not a model file, or a damaged one"),
        (b"", "is empty"),
    )
    for i, (content, complaint) in enumerate(cases):
        commit = {**files, "model.safetensors": content}
        server.revisions["me/pets"].update({"main": commit, f"{i:040d}": commit})
        with pytest.raises(FileError, match=f"^me/pets@main: {complaint}"):
            repvgg.from_pretrained("me/pets")
    assert not (tmp_path / "exploded").exists()


def test_a_repository_that_is_not_ours(server: HubServer) -> None:
    from safetensors.torch import save

    server.revisions["them/bert"] = {"1" * 40: {"model.safetensors": save({"embeddings": torch.zeros(2, 2)})}}
    server.revisions["them/bert"]["main"] = server.revisions["them/bert"]["1" * 40]
    with pytest.raises(FileError, match=r"^them/bert@main: not a RepVGG checkpoint"):
        repvgg.from_pretrained("them/bert")


def test_a_model_that_is_not_ours(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was not made by repvgg\.create_model"):
        push_to_hub(nn.Linear(2, 2), "me/linear")
    with pytest.raises(FileError, match="no such file"):
        push_to_hub(tmp_path / "none.safetensors", "me/none")
    assert not server.revisions
