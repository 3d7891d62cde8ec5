"""fastest.py: the quickest engine that computes the same, chosen once."""

import importlib
import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from deploying import silent
from rounding import REPORTED
from torch import Tensor, nn

from repvgg.deploy import engines
from repvgg.deploy import fastest as choosing
from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.fastest import fastest, measure
from repvgg.deploy.load import load_engine
from repvgg.deploy.parity import Reference, reference
from repvgg.fold.reparameterize import reparameterize

pytestmark = pytest.mark.usefixtures("own_cache")


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(engines, "installed", lambda *_: list(names))


def built(monkeypatch: pytest.MonkeyPatch, **makers: Callable[[nn.Module], Engine]) -> None:
    monkeypatch.setattr(engines, "build", lambda name, model, options: makers[name](model))


def engine_of(function: Callable[[Tensor], Tensor]) -> Engine:
    return Engine(lambda x: x, function, lambda x: x)


def test_the_reference_takes_nothing_of_the_time_to_build(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs two images however many are timed, and others are tried after a slow one."""

    def slow(network: nn.Module, images: Tensor, precision: str) -> Reference:
        assert len(images) == 2
        time.sleep(0.3)
        return reference(network, images, precision)

    monkeypatch.setattr(choosing, "reference", slow)
    only(monkeypatch, "onnxruntime", "eager")
    built(monkeypatch, **dict.fromkeys(("onnxruntime", "eager"), lambda network: engine_of(torch.no_grad()(network))))
    assert len(measure(reparameterize(model), Options((1, 16, 16), 4), str, seconds=0.2)) == 2


def test_a_package_that_cannot_be_loaded_is_left_out(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def broken(name: str) -> Any:
        if name.endswith(".onnxruntime"):
            raise ImportError("libonnxruntime.so.1: cannot open shared object file")
        return load(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    only(monkeypatch, "onnxruntime", "eager")
    said: list[str] = []
    assert list(measure(reparameterize(model), Options((1, 16, 16), 4), said.append)) == ["eager"]
    assert "left out: onnxruntime (the engine onnxruntime is installed, but cannot be loaded (libonnxruntime.so.1" in said[0]


def test_the_fastest_that_computes_the_same(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick one that is wrong, a slow one that is right, and one that cannot be built."""

    def slow(network: nn.Module) -> Engine:
        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                for _ in range(6):
                    logits: Tensor = network(x)
            return logits

        return engine_of(run)

    def right(network: nn.Module) -> Engine:
        return engine_of(torch.no_grad()(network))

    def broken(network: nn.Module) -> Engine:
        raise ValueError("cannot run this")

    said: list[str] = []
    only(monkeypatch, "onnxruntime", "eager", "openvino", "ncnn")
    built(monkeypatch, onnxruntime=lambda _: engine_of(lambda x: torch.ones(len(x), 10)), eager=slow, openvino=right, ncnn=broken)
    deploy = reparameterize(model)
    found = measure(deploy, Options((1, 16, 16), 4), said.append)
    assert list(found) == ["openvino", "eager"]
    assert [line.split(",")[0] for line in said] == ["left out: onnxruntime", "left out: ncnn (cannot run this)"]
    assert fastest(deploy, Options((1, 16, 16), 4), silent) == "openvino"
    only(monkeypatch, "onnxruntime", "ncnn")
    with pytest.raises(ValueError, match="no engine runs this model in fp32 and computes the same"):
        measure(deploy, Options((1, 16, 16), 4), silent)


def test_the_choice_is_remembered_for_a_model_a_batch_and_a_machine(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def figures(*arguments: Any) -> dict[str, dict[str, float]]:
        asked.append(arguments)
        return {name: {"images_per_second": speed, "max_rel_err": 0.0} for name, speed in (("eager", 2.0), ("compile", 1.0))}

    monkeypatch.setattr(choosing, "measure", figures)
    for _ in range(2):
        assert load_engine(model, batch_size=2, log=silent).name == "eager"
    assert len(asked) == 1
    (kept,) = (tmp_path / "cache/repvgg/engines").iterdir()
    assert json.loads(kept.read_text())["fastest"] == "eager"
    load_engine(model, batch_size=3, log=silent)
    assert len(asked) == 2
    kept.write_text("{")  # damaged
    load_engine(model, batch_size=2, log=silent)
    assert len(asked) == 3
    other = reparameterize(model)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(1)
    load_engine(other, batch_size=2, log=silent)
    assert len(asked) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # cannot be written
    assert load_engine(model, batch_size=2, log=silent).name == "eager"


def test_real_engines_are_measured(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("onnxruntime",) if os.environ.get("ONEDNN_MAX_CPU_ISA") == "SSE41" else ("onnxruntime", "openvino")
    names = ["eager", *(name for name in others if all(map(find_spec, engines.ENGINES[name].packages)))]
    only(monkeypatch, *names)
    found = measure(reparameterize(model), Options((1, 16, 16), 2), silent)
    assert found.keys() == set(names)
    assert all(f["images_per_second"] > 0 and f["max_rel_err"] < REPORTED for f in found.values())


def test_what_compiles_for_long_is_left_out_unless_nothing_else_runs(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(network: nn.Module) -> Engine:
        return engine_of(torch.no_grad()(network))

    def late(network: nn.Module) -> Engine:
        raise AssertionError("was built")

    deploy, options, said, told = reparameterize(model), Options((1, 16, 16), 2), list[str](), list[str]()
    only(monkeypatch, "compile", "eager")
    built(monkeypatch, eager=right, compile=late)
    assert list(measure(deploy, options, said.append, told.append)) == ["eager"]
    assert said == ["left out: compile (it would take long to build; name it to have it: --engine compile)"]
    assert told[:2] == ["building eager", "timing eager"]
    only(monkeypatch, "compile")
    built(monkeypatch, compile=right)
    assert list(measure(deploy, options, silent)) == ["compile"]
    only(monkeypatch, "eager", "native")
    built(monkeypatch, native=right, eager=late)
    # No time is left for a second engine, nor for a second round: the likeliest was first.
    assert list(measure(deploy, options, silent, seconds=-4.0)) == ["native"]
