"""app.py: the page's folder, its server, and the page itself in a real browser where there is one."""

import asyncio
import importlib.util
import json
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browsing, served
from conftest import randomize, relative_error
from PIL import Image
from rounding import REPORTED
from torch import nn

from repvgg import cli
from repvgg.data.images import decode
from repvgg.data.transforms import eval_transform, normalise
from repvgg.deploy.operators import read, summary
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.load import save
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.web import app

CLASSES = ["cat", "<b>dog</b>", "owl"]
HAS_NATIVE = importlib.util.find_spec("repvgg_engine") is not None


@pytest.fixture(autouse=True)
def _packages() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")


def small(channels: int = 3, side: int = 32, interpolation: str = "bilinear") -> nn.Module:
    model = zoo.create_model("repvgg_micro", num_classes=3, in_chans=channels, width=0.125)
    # Three pixels wider than a resized upright image: one column of black on its left, two on its right.
    p = Preprocessing((channels, side, side + 11), side + 8, interpolation, (0.4,) * channels, (0.3,) * channels)
    randomize(model, (16, channels, side, side))
    return zoo.remember(model, Manifest(zoo.manifest_of(model).arch, classes=CLASSES, preprocessing=p))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small()


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the right names."""
    folder = tmp_path_factory.mktemp("runtime") / "dist"
    folder.mkdir()
    for name in app.RUNTIME:
        (folder / name).write_text(name)
    return folder.parent


@pytest.fixture(scope="module")
def page(model: nn.Module, runtime: Path) -> Path:
    Image.fromarray(np.zeros((2000, 50, 3), np.uint8)).save(runtime / "tall.jpg")
    save(model, runtime / "m.safetensors")
    words = ["web", str(runtime / "m.safetensors"), str(runtime / "tall.jpg")]
    cli.main([*words, "--out", str(runtime / "web"), "--runtime", str(runtime), "--no-serve"])
    return runtime / "web" / "index.html"


def silent(line: str) -> None:
    pass


# -------------------------------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_all_that_the_page_needs(page: Path) -> None:
    told = json.loads((page.parent / "model.json").read_text())
    assert (told["name"], told["classes"], told["preprocessing"]["resize"]) == ("repvgg_micro", CLASSES, 40)
    assert all(form["error"] < REPORTED for form in told["forms"].values())
    named = {"index.html", "app.js", "style.css", "model.json", "example-00.png", "training.onnx", "deploy.onnx", *app.RUNTIME}
    assert told["native"] == HAS_NATIVE
    if HAS_NATIVE:
        named |= {"repvgg_engine.mjs", "repvgg_engine.wasm", "repvgg_engine.relaxed.wasm", "model.safetensors", "plan.json"}
    assert {path.name for path in page.parent.iterdir()} == named
    with Image.open(page.parent / "example-00.png") as example:
        assert example.size == (26, 1024)


def test_one_file_has_branches_and_the_other_has_none(model: nn.Module, page: Path) -> None:
    training, deploy = (read(page.parent / f"{form}.onnx") for form in ("training", "deploy"))
    names = [operator.name for operator in training]
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert names.count("BatchNormalization") == norms  # not merged into convolutions
    assert names.count("Conv") == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert "and no other operator" in summary(deploy)


def test_the_demo_goes_on_in_the_browser(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what an earlier one has left."""
    (tmp_path / "run").mkdir()
    (tmp_path / "index.html").touch()
    save(model, tmp_path / "run" / "last.safetensors")
    done: list[Any] = []
    monkeypatch.setattr(app, "build", lambda model, *rest: done.append(rest[:2]))
    monkeypatch.setattr(app, "serve", lambda *rest: done.append(rest[:2]))
    cli.main(["demo", "--out", str(tmp_path), "--web"])
    assert done == [(tmp_path / "web", (str(tmp_path / "scans"),)), (tmp_path / "web", 8000)]


def test_what_is_refused(model: nn.Module, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="in deploy form, and the page shows both forms: name the file that it was folded from"):
        app.build(reparameterize(model), tmp_path / "web", (), runtime)
    with pytest.raises(ValueError, match="a PSPNet makes masks"):
        app.build(zoo.create_model("pspnet_repvgg_micro", num_classes=3, width=0.125).eval(), tmp_path / "web", (), runtime)
    with pytest.raises(ValueError, match=r"--runtime .*: does not hold onnxruntime-web's ort\.wasm\.min\.mjs"):
        app.build(model, tmp_path / "web", (), tmp_path)
    monkeypatch.setattr("repvgg.web.app.shutil.which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="there is no npm: install Node"):
        app.build(model, tmp_path / "web", (), None)
    assert not (tmp_path / "web").exists()


def test_npm_is_asked_once(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a script in npm's place."""
    with tarfile.open(tmp_path / "fetched.tgz", "w:gz") as archive:
        archive.add(runtime / "dist", "package/dist")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\n[ "$2" = {app.PACKAGE} ] && cp "{tmp_path}/fetched.tgz" package.tgz\necho >> "{tmp_path}/asked"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert [path.read_text() for path in app.runtime_files(log=silent)] == list(app.RUNTIME)
    assert (tmp_path / "asked").read_text().count("\n") == 1
    npm.write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"npm cannot fetch onnxruntime-web@.* \(npm error network\): check the connection"):
        app.runtime_files(log=silent)
    assert not (tmp_path / "other").exists()


def test_the_server(tmp_path: Path) -> None:
    (tmp_path / "x.mjs").write_text("1")
    with served(tmp_path) as address:
        with urllib.request.urlopen(f"{address}/x.mjs") as answer:
            headers = dict(answer.headers)
        with pytest.raises(ValueError, match=r"--port \d+: cannot be used \(.*\); name another"):
            app.server(tmp_path, int(address.rpartition(":")[2]))
        for path, host in (("x.mjs", "stranger.example:8000"), ("", "localhost")):
            with pytest.raises(urllib.error.HTTPError, match=r"403|404"):  # neither by another name, nor a list of the files
                urllib.request.urlopen(urllib.request.Request(f"{address}/{path}", headers={"Host": host}))
    assert headers["Content-type"] == "text/javascript"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


# -------------------------------------------------------------------------------------------------------------------- the browser


async def visit(folder: Path, images: list[Path], profile: Path, picture: Path | None = None) -> list[dict[str, Any]]:
    """What the page says of images that are dropped on it."""
    with served(folder) as address:
        async with browsing(profile) as browser:
            await browser.do("Page.navigate", url=address)
            await browser.until("ready")
            found = []
            for image in images:
                await browser.value("document.body.dataset.state = 'waiting'")
                await browser.drop(image)
                await browser.until("done")
                found.append({**await browser.value("self.answer"), "text": await browser.value("document.body.innerText")})
            shown = "[...document.querySelectorAll('#examples button')].map(button => button.ariaPressed)"
            found[-1]["pressed"] = [await browser.value(shown)]
            await browser.value("document.querySelector('#examples button').click()")
            found[-1]["pressed"].append(await browser.value(shown))
            if picture:
                import base64

                shot = await browser.do("Page.captureScreenshot", captureBeyondViewport=True)
                picture.write_bytes(base64.b64decode(shot["data"]))
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.slow
@pytest.mark.parametrize(("channels", "interpolation"), [(3, "bilinear"), (1, "bicubic")])
def test_the_page_reads_images_as_predict_does(channels: int, interpolation: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    try:
        parts = app.runtime_files(log=silent)
    except ValueError as error:
        pytest.skip(str(error))
    network = small(channels, interpolation=interpolation)
    random = np.random.default_rng(0)
    files = []
    for i, shape in enumerate([(61, 47, 3), (20, 33, 3), (300, 211, 4)]):  # to be shrunk, enlarged, and with alpha
        coarse = random.integers(0, 256, (6, 5, shape[2]), dtype=np.uint8)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(coarse).resize(shape[1::-1]).save(files[-1])
    (tmp_path / "no.png").write_text("no image")
    folder = app.build(network, tmp_path / "web", [str(files[0])], parts[0].parent, silent).parent
    *answers, refused = asyncio.run(visit(folder, [*files, tmp_path / "no.png"], tmp_path / "profile"))
    p = zoo.manifest_of(network).preprocessing
    # Torchvision resizes in whole numbers, as the page does, where the processor has AVX2; elsewhere a level may be another.
    bound = 1e-5 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 2e-2
    for answer, file in zip(answers, files, strict=True):
        pixels = eval_transform(p)(decode(file, channels))[None]
        with torch.no_grad():
            wanted = reparameterize(network).double()(normalise(pixels, p).double())
        assert answer["same"]
        assert answer["difference"] < REPORTED
        assert answer["speedup"] > 0
        assert len(answer["times"]["deploy"]) == len(answer["times"]["training"]) >= 3
        assert ("native" in answer["logits"]) == ("native" in answer["times"]) == HAS_NATIVE
        assert ("times the speed, on one thread" in answer["text"]) == HAS_NATIVE
        for logits in answer["logits"].values():
            assert relative_error(torch.tensor([logits]), wanted) < bound  # so every pixel was prepared alike
        name = CLASSES[int(wanted.argmax())]  # as text, whatever it holds
        assert f"{name}, say both forms; the deploy form has" in answer["text"]
    assert "This is not an image that your browser can read" in refused["text"]
    assert refused["pressed"] == [["false"], ["true"]]  # dropped, then chosen


def test_photos_of_an_earlier_page_are_taken_away(
    model: nn.Module, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_write", lambda net, original, path: {"error": 0.0})
    monkeypatch.setattr(app, "_native", lambda *_: False)
    photos = []
    for i in range(3):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
        photos.append(str(tmp_path / f"{i}.png"))
    app.build(model, tmp_path / "site", photos, runtime, str)
    app.build(model, tmp_path / "site", photos[:1], runtime, str)
    assert [path.name for path in (tmp_path / "site").glob("example-*")] == ["example-00.png"]
    (tmp_path / "site/example-01.png").write_bytes(b"somebody else's")
    with pytest.raises(FileError, match=r"example-01.png: is none of an earlier page, and would be lost"):
        app.build(model, tmp_path / "site", photos, runtime, str)


def test_nothing_is_lost_but_an_earlier_page(
    model: nn.Module, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_write", lambda net, original, path: {"error": 0.0})
    monkeypatch.setattr(app, "_native", lambda _, folder, log: (folder / "model.safetensors").write_text("deploy") > 0)
    for name in ("model.safetensors", "style.css"):  # of the hub, of a site
        (folder := tmp_path / name).mkdir()
        (folder / name).write_text("precious")
        with pytest.raises(FileError, match=f"holds the {name} of something else"):
            app.build(model, folder, (), runtime, str)
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "precious")]
    site = tmp_path / "site"
    app.build(model, site, (), runtime, str)
    told = json.loads((site / "model.json").read_text())
    (site / "notes.txt").write_text("precious")
    hostile = [{"file": name} for name in ("notes.txt", "index.html", "..", "../site/notes.txt")]
    (site / "model.json").write_text(json.dumps({**told, "native": False, "examples": hostile}))
    with pytest.raises(FileError, match="safetensors: is none of an earlier page"):
        app.build(model, site, (), runtime, str)
    (site / "model.safetensors").unlink()
    app.build(model, site, (), runtime, str)
    assert (site / "notes.txt").exists()
    assert (site / "index.html").exists()


def test_a_browser_that_goes_away_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    request: Any = None
    with app.server(".") as server:
        for error in (BrokenPipeError(), ConnectionResetError()):
            try:
                raise error
            except OSError:
                server.handle_error(request, ("127.0.0.1", 1))
        assert capsys.readouterr().err == ""
        try:
            raise KeyError("mine")
        except KeyError:
            server.handle_error(request, ("127.0.0.1", 1))
    assert "KeyError" in capsys.readouterr().err
