"""light.py: the answers of labels.py for the usual cases, without PyTorch; everything else is left to it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import randomize
from PIL import Image

import repvgg
from repvgg.deploy.export import export
from repvgg.models.load import load
from repvgg.predict.labels import predict
from repvgg.predict.light import predict_lightly


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, size in (("same.png", (36, 36)), ("wide.png", (200, 90)), ("tall.jpg", (77, 123)), ("odd.jpg", (375, 300))):
        smooth = Image.fromarray(random.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        smooth.resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=90)
    turned = Image.open(folder / "tall.jpg")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    Image.open(folder / "wide.png").convert("L").save(folder / "grey.png")
    return folder


@pytest.fixture(scope="module")
def deploy(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    for name in ("colour", "grey"):
        repvgg.save(repvgg.reparameterize(load(files / f"{name}.safetensors")), folder / f"{name}.safetensors")
    return folder


def test_the_answers_of_pytorch(deploy: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("repvgg_engine")
    pytest.importorskip("onnxscript")
    for name in ("colour", "grey"):
        file = deploy / f"{name}.safetensors"
        exported = export(load(file), "onnx", tmp_path, name, log=str)
        paths = list(map(str, sorted(pictures.iterdir())))
        wanted = list(predict(load(file), paths, top=3))
        for model, engine in ((file, "native"), (exported, "onnxruntime")):
            found = predict_lightly(str(model), [str(pictures)], top=3)
            assert found is not None
            for got, exact in zip(found, wanted, strict=True):
                assert (got.path, got.engine, got.error) == (exact.path, engine, None)
                # Pillow's resizing and PyTorch's differ by a grey level here and there.
                assert dict(got.labels) == pytest.approx(dict(exact.labels), abs=2e-3)


def test_the_unusual_is_left_alone(deploy: Path, files: Path, pictures: Path, tmp_path: Path) -> None:
    model, photo = str(deploy / "colour.safetensors"), str(pictures / "wide.png")
    image = Image.open(photo)
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.resize((900, 20)).save(tmp_path / "long.png")
    image.save(tmp_path / "bitmap.bmp")
    (tmp_path / "many").mkdir()
    for i in range(33):
        image.save(tmp_path / "many" / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(Path(photo).read_bytes()[:500])
    os.mkfifo(tmp_path / "pipe.png")
    for words in (
        (str(files / "colour.safetensors"), [photo]),  # in training form
        (str(files / "masks.safetensors"), [photo]),
        ("repvgg_a0", [photo]),
        (model, [str(tmp_path / "many")]),
        (model, [str(tmp_path / "nowhere.png")]),
        (model, []),
        *(
            (model, [photo, str(tmp_path / name)])
            for name in ("palette.png", "alpha.png", "long.png", "bitmap.bmp", "bad.png", "pipe.png")
        ),
    ):
        assert predict_lightly(*words) is None
    assert predict_lightly(model, [photo], engine="eager") is None
    assert predict_lightly(model, [photo], top=0) is None


def test_a_gpu_is_left_to_pytorch_unless_the_cpu_is_asked_for(
    deploy: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("repvgg_engine")
    words = (str(deploy / "colour.safetensors"), [str(pictures / "wide.png")])
    assert predict_lightly(*words, device="cuda") is None
    monkeypatch.setattr("repvgg.predict.light.NVIDIA", pictures)  # as if its driver were here
    assert predict_lightly(*words) is None
    (answer,) = predict_lightly(*words, device="cpu") or []
    assert answer.engine == "native"


@pytest.mark.parametrize("pool", ["avg", pytest.param("", marks=pytest.mark.slow)])
def test_a_backbone_has_no_labels(pool: str, pictures: Path, tmp_path: Path) -> None:
    model = randomize(repvgg.create_model("repvgg_micro", num_classes=0, global_pool=pool, width=0.25), (4, 3, 64, 64))
    repvgg.save(repvgg.reparameterize(model), tmp_path / "backbone.safetensors")
    assert predict_lightly(str(tmp_path / "backbone.safetensors"), [str(pictures / "wide.png")]) is None
    exported = export(load(tmp_path / "backbone.safetensors"), "onnx", tmp_path, "backbone", log=str)
    assert predict_lightly(str(exported), [str(pictures / "wide.png")]) is None


WITHOUT = "import sys; from repvgg.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"


def predicted(code: str, deploy: Path, pictures: Path, *words: str) -> set[str]:
    """Return the engines that a process of its own has predicted a folder with."""
    pytest.importorskip("repvgg_engine")
    given = ["predict", str(deploy / "colour.safetensors"), str(pictures), "--json", *words]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = list(map(json.loads, done.stdout.splitlines()))
    assert [answer["path"] for answer in answers] == list(map(str, sorted(pictures.iterdir())))
    return {answer["engine"] for answer in answers}


def test_pytorch_is_not_imported(deploy: Path, pictures: Path) -> None:
    assert predicted(WITHOUT, deploy, pictures) == {"native"}


@pytest.mark.slow
def test_where_it_is_needed_pytorch_is_imported(deploy: Path, pictures: Path) -> None:
    """So that the test above can fail."""
    assert predicted(WITHOUT.replace("not in", "in"), deploy, pictures, "--engine", "eager") == {"eager"}
