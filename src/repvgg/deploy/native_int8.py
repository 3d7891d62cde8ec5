"""INT8 for the native engine: a model file whose convolutions know the largest number of their input.

Those numbers are the ranges that NNCF finds for OpenVINO (see quantize.py), read from the graph that it makes. A convolution
that is left in float there has none, and is computed by the engine's 16-bit integers, or in float32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.deploy.runner import Runner
from repvgg.models import zoo
from repvgg.models.load import save
from repvgg.models.plain import layer_list, set_largest_inputs

ENGINE = "native"
CALIBRATED_FOR = "openvino"  # of FORMATS: whose graph NNCF calibrates
SUFFIX = ".safetensors"


def check(deploy: nn.Module) -> None:
    """Raise ValueError where a folded model is no plain network, or the engine is not here."""
    engines.check(ENGINE, "int8")
    if layer_list(deploy) is None:
        raise ValueError(f"the engine {ENGINE} runs plain networks, and {type(deploy).__name__} is none: quantise it for another")


def runner(deploy: nn.Module, precision: str, batch_size: int) -> Runner:
    """Return what runs a folded model in the engine."""
    manifest = zoo.manifest_of(deploy)
    options = Options(manifest.preprocessing.input_size, batch_size, precision)
    return Runner(ENGINE, engines.build(ENGINE, deploy, options), options, manifest)


def write(deploy: nn.Module, network: Any, path: Path) -> None:
    """Give a folded model the ranges of a graph that NNCF calibrated for OpenVINO, and write its file.

    Raises ValueError where none of its convolutions has one.
    """
    from repvgg.deploy.engines.openvino import largest_inputs

    found = iter(largest_inputs(network))
    largest: list[float | None] = []
    for spec in layer_list(deploy) or []:
        if spec["op"] == "squeeze_excite":  # two convolutions, of means
            next(found), next(found)
        largest.append(next(found) if spec["op"] == "conv2d" else None)
    if not any(largest):
        raise ValueError("no convolution is left in INT8: keep fewer layers")
    set_largest_inputs(deploy, largest)
    zoo.remember(deploy, replace(zoo.manifest_of(deploy), layers=layer_list(deploy)))
    save(deploy, path)
