"""pretrained.py: the paper's weights come from the hub, here a small server of our own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import randomize
from foreign import state
from hub_server import HubServer, serving
from members import assert_same_tensors
from PIL import Image
from safetensors.torch import save_file

import repvgg
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import pretrained, zoo
from repvgg.models.manifest import Preprocessing

COMMIT, PINNED = "1" * 40, "2" * 40
REPO = "timm/repvgg_a0.rvgg_in1k"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """One repository, with two commits of its weights."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = randomize(timm.create_model("repvgg_a0"))
    from safetensors.torch import save

    main = {"model.safetensors": save(net.state_dict(), {"format": "pt"})}
    with torch.no_grad():
        net.head.fc.bias += 1
    pinned = {"model.safetensors": save(net.state_dict(), {"format": "pt"})}
    with serving() as served:
        served.revisions[REPO] = {"main": main, COMMIT: main, PINNED: pinned}
        yield served


def start(arguments: list[str], home: Path, endpoint: str, **env: str) -> "subprocess.Popen[str]":
    """A Python process of its own, because the hub's client reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return subprocess.Popen(
        [sys.executable, *arguments], env=inherited | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


ONLINE = """
import sys, repvgg
out, pinned = sys.argv[1:]
repvgg.save(repvgg.create_model("repvgg_a0", pretrained=True), out + "/main.safetensors")
repvgg.save(repvgg.create_model("repvgg_a0", pretrained=pinned, deploy=True), out + "/pinned.safetensors")
repvgg.save(repvgg.create_model("repvgg_a0", pretrained=True, num_classes=10, output_stride=16), out + "/ten.safetensors")
for name, revision in (("repvgg_a1", True), ("repvgg_a0", "nowhere")):
    try:
        repvgg.create_model(name, pretrained=revision)
    except repvgg.FileError as error:
        print(error)
"""
OFFLINE = """
import sys, repvgg
repvgg.save(repvgg.create_model("repvgg_a0", pretrained=True), sys.argv[1] + "/offline.safetensors")
try:
    repvgg.create_model("repvgg_b0", pretrained=True)
except repvgg.FileError as error:
    print(error)
"""


@pytest.mark.slow  # test_hub.py fetches from such a server always, test_weights.py reads what timm released
def test_pretrained_weights_come_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.effect_noise((300, 260), 90).convert("RGB").save(image)
    predict = ["-m", "repvgg", "predict"]
    online = start(["-c", ONLINE, str(tmp_path), PINNED], tmp_path / "home", hub.url)
    command = start([*predict, "repvgg_a0", str(image), "--json"], tmp_path / "other_home", hub.url)
    nobody = start([*predict, "repvgg_b0", str(image)], tmp_path / "third_home", "http://127.0.0.1:9")
    (out, err), (labels, command_err), (nothing, nobody_err) = (p.communicate(timeout=300) for p in (online, command, nobody))

    assert online.returncode == 0, err
    no_repo, no_revision = out.splitlines()
    assert re.match(
        r"timm/repvgg_a1.rvgg_in1k@main is not in the local cache and cannot be fetched: .*no such repository.*\(401", no_repo
    )
    assert re.match(r"timm/repvgg_a0.rvgg_in1k@nowhere is not in the local cache and cannot be fetched: .*\(404", no_revision)
    for file, commit, form in (("main", COMMIT, "training"), ("pinned", PINNED, "deploy")):
        (tmp_path / "served.safetensors").write_bytes(hub.revisions[REPO][commit]["model.safetensors"])
        wanted = repvgg.load(tmp_path / "served.safetensors")
        model = repvgg.load(tmp_path / f"{file}.safetensors")
        assert_same_tensors(model, reparameterize(wanted) if form == "deploy" else wanted)
        manifest = zoo.manifest_of(model)
        assert manifest.form == form
        assert manifest.classes is not None
        assert (manifest.classes[0], manifest.classes[999]) == ("tench", "toilet tissue")
        assert manifest.preprocessing == Preprocessing()
        assert manifest.training["source"] == REPO
    ten = repvgg.load(tmp_path / "ten.safetensors")
    main = repvgg.load(tmp_path / "main.safetensors").state_dict()
    assert zoo.manifest_of(ten).classes is None
    assert asdict(zoo.manifest_of(ten))["arch"]["output_stride"] == 16
    assert ten.state_dict()["head.weight"].shape == (10, 1280)
    assert all(torch.equal(t, main[n]) for n, t in ten.state_dict().items() if not n.startswith("head."))
    fetched = sorted(asked for asked in hub.asked if asked.startswith("GET"))
    assert fetched == [f"GET /{REPO}/resolve/{revision}/model.safetensors" for revision in (PINNED, "main", "main")]  # by two homes

    assert command.returncode == 0, command_err
    from repvgg.predict.labels import predict as run

    (prediction,) = run(reparameterize(repvgg.load(tmp_path / "main.safetensors")), [str(image)])
    said = json.loads(labels)["labels"]
    assert said[0]["label"] == prediction.labels[0][0]
    assert said[0]["probability"] == pytest.approx(prediction.labels[0][1], abs=1e-4)

    assert nobody.returncode == 2
    assert nothing == ""
    assert nobody_err == (
        "repvgg: timm/repvgg_b0.rvgg_in1k@main is not in the local cache and cannot be fetched: check the connection and "
        "HF_HUB_OFFLINE ([Errno 111] Connection refused)\n"
    )

    before = len(hub.asked)
    offline = start(["-c", OFFLINE, str(tmp_path)], tmp_path / "home", hub.url, HF_HUB_OFFLINE="1")
    out, err = offline.communicate(timeout=300)
    assert offline.returncode == 0, err
    assert out.startswith("timm/repvgg_b0.rvgg_in1k@main is not in the local cache")
    assert len(hub.asked) == before
    assert_same_tensors(repvgg.load(tmp_path / "offline.safetensors"), repvgg.load(tmp_path / "main.safetensors"))


def test_a_damaged_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(pretrained, "pretrained_file", lambda *_: path)
    path.write_bytes(b"<html>please log in</html>")
    with pytest.raises(FileError, match="not a model file"):
        repvgg.create_model("repvgg_a0", pretrained=True)
    save_file(state("repvgg_a1", "training"), path)
    with pytest.raises(FileError, match=f"{path}: does not fit its architecture"):
        repvgg.create_model("repvgg_a0", pretrained=True, num_classes=7)
