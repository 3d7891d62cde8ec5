"""The folder for anybody's page: what lies in it, and what is refused. What it computes is tested in engine/tests too."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browsing, served
from conftest import randomize
from PIL import Image

import repvgg
from repvgg import cli
from repvgg.deploy.export import Shape
from repvgg.deploy.web_folder import write_web
from repvgg.disk import FileError
from repvgg.models import zoo
from repvgg.predict.prediction import Prediction

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine


def silent(line: str) -> None:
    pass


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "cache"))
    model = repvgg.create_model("repvgg_micro", num_classes=4, small_input=True, width=0.125)
    randomize(model, (8, 3, 32, 32))
    repvgg.save(model, tmp_path / "net.safetensors")
    cli.main(["export", str(tmp_path / "net.safetensors"), "--to", "web", "--out", str(tmp_path / "site")])
    names = {"index.html", "repvgg_engine.mjs", "repvgg_engine.wasm", "repvgg_engine.relaxed.wasm"}
    names |= {"model.safetensors", "plan.json", "index.html.json"}
    assert {path.name for path in (tmp_path / "site").iterdir()} == names
    net = repvgg_engine.load(tmp_path / "site/model.safetensors", plan=tmp_path / "site/plan.json", threads=1)
    assert net.isa == "portable"
    x = torch.randn(2, 3, 224, 224)
    wanted = repvgg.load(tmp_path / "net.safetensors").eval()(x).detach()
    assert torch.allclose(torch.from_numpy(net(x.numpy())), wanted, atol=1e-3 * float(wanted.abs().max()))


def test_a_model_of_the_same_name_stays(tmp_path: Path) -> None:
    """As the hub calls it."""
    (tmp_path / "model.safetensors").write_text("the training form")
    with pytest.raises(FileError, match=r"holds the model\.safetensors of something else"):
        write_web(repvgg.create_model("repvgg_micro", num_classes=3, width=0.125).eval(), tmp_path, log=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a page classifies, and a PSPNet makes masks"):
        write_web(repvgg.create_model("pspnet_repvgg_micro", num_classes=3, width=0.125).eval(), tmp_path / "site", log=silent)
    with pytest.raises(ValueError, match="a page shows the model photos, of 3 channels or 1, and this one takes 4"):
        write_web(repvgg.create_model("repvgg_micro", num_classes=3, in_chans=4, width=0.125).eval(), tmp_path / "site", log=silent)
    with pytest.raises(ValueError, match="leave out --batch-size"):
        write_web(
            repvgg.create_model("repvgg_micro", num_classes=3, width=0.125).eval(), tmp_path / "site", Shape(batch_size=2), silent
        )
    for pool in ("avg", ""):
        backbone = repvgg.create_model("repvgg_micro", num_classes=0, global_pool=pool, width=0.125).eval()
        with pytest.raises(ValueError, match="ends before its classes: give it num_classes, or export it --to onnx"):
            write_web(backbone, tmp_path / "site", log=silent)
    assert not (tmp_path / "site").exists()


async def listed(folder: Path, profile: Path, files: list[Path]) -> list[list[str]]:
    """Return what the page says of each file."""
    found = []
    with served(folder) as address:
        async with browsing(profile) as browser:
            await browser.do("Page.navigate", url=address)
            await browser.until(True, "document.querySelector('output')?.textContent.startsWith('Choose') ?? false")
            for file in files:
                await browser.value("document.querySelector('ol').replaceChildren()")
                await browser.choose(file)
                await browser.until(True, "document.querySelectorAll('li').length > 0")
                found.append(await browser.value("[...document.querySelectorAll('li')].map(item => item.textContent)"))
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_says_what_predict_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an opaque image, and of one that is transparent in parts."""
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "cache"))
    model = repvgg.create_model("repvgg_micro", num_classes=4, small_input=True, width=0.125)
    randomize(model, (8, 3, 224, 224))
    zoo.remember(model, replace(zoo.manifest_of(model), classes=["cat", "<b>dog</b>", "black owl", "Straße"]))
    write_web(model, tmp_path / "site", log=silent)
    random, files = np.random.default_rng(0), []
    for i, channels in enumerate((3, 4)):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(random.integers(0, 256, (6, 5, channels), np.uint8)).resize((61, 47)).save(files[-1])
    said = asyncio.run(listed(tmp_path / "site", tmp_path / "profile", files))
    answers = repvgg.predict(model, list(map(str, files)), top=4, log=silent)
    for lines, wanted in zip(said, answers, strict=True):
        shown = {label: float(share.removesuffix("%")) for label, share in (line.rsplit(" ", 1) for line in lines)}
        assert isinstance(wanted, Prediction)
        assert shown == pytest.approx({label: 100 * share for label, share in wanted.labels}, abs=0.2)
