"""The native engine behind repvgg's protocol; its own tests are in engine/tests."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error_of_deviation, randomize, relative_error
from rounding import ENGINES, rounding
from torch import nn

import repvgg

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine

from repvgg.deploy import engines, parity
from repvgg.deploy.engines import Options
from repvgg.deploy.engines.native import NativeModule

SIZE = (3, 48, 48)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"name": "repvgg_micro"},
        {"name": "repvgg_b1g4", "width": 0.25},
        {"name": "repvgg_d2se", "width": 0.2},
        {"name": "repvgg_a0", "width": 0.25, "output_stride": 8},
    ],
    ids=lambda options: options["name"],
)
@torch.no_grad()
def test_the_family(options: dict[str, Any], tmp_path: Path) -> None:
    """Files that repvgg writes, with groups, squeeze-excite, dilation; and the same from memory."""
    folded = repvgg.reparameterize(randomize(repvgg.create_model(**options, num_classes=7), (4, *SIZE)))
    images = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1))
    wanted = copy.deepcopy(folded).double()(images.double())
    repvgg.save(folded, tmp_path / "net.safetensors")
    got = torch.from_numpy(repvgg_engine.load(tmp_path / "net.safetensors", accuracy="exact", threads=1)(images.numpy()))
    allowed = rounding(folded, images, times=ENGINES, error=error_of_deviation)
    assert error_of_deviation(got, wanted) <= allowed
    engine = engines.build("native", folded, Options(SIZE, 4, threads=1))
    assert error_of_deviation(engine(images), wanted) <= allowed


@torch.no_grad()
def test_products_of_integers() -> None:
    """Within what numbers of 14 bits round, without calibration; and refused in a line by engines that have none."""
    folded = repvgg.reparameterize(randomize(repvgg.create_model("repvgg_micro", num_classes=5), (4, *SIZE)))
    images = torch.randn(8, *SIZE)
    engine = engines.build("native", folded, Options(SIZE, 8, "int16", threads=1))
    checked = parity.compare(engine(images), parity.reference(folded, images, "int16"))
    assert checked.ok, checked
    with pytest.raises(ValueError, match="the engine eager has no int16 on cpu: it has fp32, bf16, fp16"):
        engines.build("eager", folded, Options(SIZE, 8, "int16"))


@torch.no_grad()
def test_a_module_in_place_of_another() -> None:
    folded = repvgg.reparameterize(randomize(repvgg.create_model("repvgg_micro", num_classes=5), (4, *SIZE)))
    images = torch.randn(2, *SIZE)
    wanted = folded(images)
    native = NativeModule(folded, Options(SIZE, threads=1), accuracy="exact")
    whole = nn.Sequential(native, nn.Softmax(1))
    got = whole(images.to(memory_format=torch.channels_last))
    assert relative_error(got, wanted.softmax(1)) <= rounding(nn.Sequential(folded, nn.Softmax(1)), images, times=ENGINES)


@pytest.mark.parametrize("name", ["pspnet_repvgg_a0_fast", "pspnet_repvgg_micro"])
@torch.no_grad()
def test_pspnets(name: str) -> None:
    """Dilated backbones and the head's 3x3, on a size that is no multiple of anything."""
    folded = repvgg.reparameterize(randomize(repvgg.create_model(name, num_classes=5, width=0.25), (2, 3, 49, 61)))
    images = torch.randn(2, 3, 50, 61)
    wanted = folded(images)
    engine = engines.build("native", folded, Options((3, 50, 61), 2, threads=1))
    assert relative_error(engine(images), wanted) <= rounding(folded, images, times=ENGINES)
    assert torch.equal(folded(images), wanted)


def test_only_plain_networks_in_deploy_form() -> None:
    with pytest.raises(ValueError, match="runs plain networks in deploy form, and RepVGG is none: fold"):
        engines.build("native", repvgg.create_model("repvgg_micro").eval(), Options(SIZE))
    with pytest.raises(ValueError, match="and Linear is none"):
        engines.build("native", nn.Linear(3, 3), Options(SIZE))


def test_training_form_files_are_refused(tmp_path: Path) -> None:
    repvgg.save(repvgg.create_model("repvgg_micro"), tmp_path / "training.safetensors")
    with pytest.raises(repvgg_engine.EngineError, match="is in training form: run repvgg convert"):
        repvgg_engine.load(tmp_path / "training.safetensors")


def test_no_torch_in_the_engine() -> None:
    script = "import sys, repvgg_engine; print('torch' in sys.modules, 'repvgg' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
