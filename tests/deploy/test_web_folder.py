"""The folder for anybody's page: what lies in it, and what is refused. What it computes is tested in engine/tests and tests/web."""

from pathlib import Path

import pytest
import torch
from conftest import randomize

import repvgg
from repvgg import cli
from repvgg.deploy.export import Shape
from repvgg.deploy.web_folder import write_web

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


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a page classifies, and a PSPNet makes masks"):
        write_web(repvgg.create_model("pspnet_repvgg_micro", num_classes=3, width=0.125).eval(), tmp_path / "site", log=silent)
    with pytest.raises(ValueError, match="leave out --batch-size"):
        write_web(
            repvgg.create_model("repvgg_micro", num_classes=3, width=0.125).eval(), tmp_path / "site", Shape(batch_size=2), silent
        )
    assert not (tmp_path / "site").exists()
