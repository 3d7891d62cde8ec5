"""models/names.py: the model that comes with the package."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from repvgg.data import Decoded, Source
from repvgg.data.cifar10 import CLASSES
from repvgg.data.images import decode
from repvgg.disk import FileError
from repvgg.models.load import file_of, is_file, open_model
from repvgg.models.names import EMBEDDED, embedded
from repvgg.models.zoo import manifest_of
from repvgg.predict.labels import predict
from repvgg.predict.light import predict_lightly
from repvgg.train.evaluate import evaluate_model

RECORD = Path(__file__).parents[2] / "results" / "cifar10.json"
TEST_IMAGES = Path(__file__).parents[3] / "shared/data/cifar10/test-00000-of-00001.parquet"


def test_its_file_is_small_and_is_the_one_that_was_measured() -> None:
    file = embedded("cifar10")
    assert file == EMBEDDED["cifar10"] == file_of("cifar10")
    assert file.stat().st_size <= 4_000_000
    with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
        assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float16}  # noqa: SIM118 - not a dict
    stated = json.loads(RECORD.read_text())["embedded"]
    assert stated["bytes"] == file.stat().st_size
    assert stated["sha256"] == sha256(file.read_bytes()).hexdigest()
    assert stated["top1"] == manifest_of(open_model("cifar10")).training["val_top1"]


@pytest.mark.skipif(not TEST_IMAGES.is_file(), reason="needs ../shared/data/cifar10")
def test_it_recognises_what_it_is_said_to() -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(TEST_IMAGES, columns=["img", "label"]).slice(0, 150).to_pylist()
    images = Decoded(torch.stack([decode(row["img"]["bytes"]) for row in rows]), [row["label"] for row in rows])
    model = open_model("cifar10")
    assert manifest_of(model).classes == CLASSES
    source = Source("test images", images, images, CLASSES, manifest_of(model).preprocessing)
    assert evaluate_model(model, source).top1 > 0.86  # of all 10,000 it is 93.86%: four deviations of 150 below


def test_it_computes_in_float32_with_and_without_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("repvgg_engine")
    model = open_model("cifar10")
    assert next(model.parameters()).dtype == torch.float32
    assert manifest_of(model).form == "deploy"
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    (whole,) = predict(model, [str(tmp_path / "photo.png")], top=10)
    (light,) = predict_lightly("cifar10", [str(tmp_path / "photo.png")], top=10) or []
    assert light.engine == "native"
    assert {name for name, _ in light.labels} == set(manifest_of(model).classes or [])
    assert dict(light.labels) == pytest.approx(dict(whole.labels), abs=1e-5)


def test_a_file_or_a_run_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cifar10").mkdir()
    assert embedded("cifar10")  # a folder of data, say
    Path("cifar10/best.safetensors").write_bytes(b"mine")
    assert embedded("cifar10") is None
    assert is_file("cifar10")
    with pytest.raises(FileError, match=r"best\.safetensors"):
        open_model("cifar10")


def test_others_do_not_come_with_it() -> None:
    assert embedded("repvgg_a0") is None
    assert not is_file("repvgg_a0")
