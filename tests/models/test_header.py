"""header.py: what the files of both forms cost, against what is counted from the network; and no PyTorch for it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_files import ours

import repvgg
from repvgg.disk import FileError
from repvgg.models.header import Header, costs_of, read_header

Options = dict[str, Any]
NARROW = [
    ("repvgg_a0", {}),
    ("repvgg_b1g4", {}),
    ("repvgg_d2se", {}),
    ("repvgg_b0", {"output_stride": 8}),
    ("repvgg_a1", {"small_input": True}),
]


def header_of(path: Path) -> Header:
    header = read_header(path)
    assert header is not None
    return header


@pytest.mark.parametrize(("name", "options"), NARROW)
def test_costs_are_those_that_are_counted(name: str, options: Options, tmp_path: Path) -> None:
    model = repvgg.create_model(name, deploy=True, width=1 / 16, num_classes=10, **options)
    repvgg.save(model, tmp_path / "a.safetensors")
    header = header_of(tmp_path / "a.safetensors")
    counted, rows = repvgg.cost(model.eval(), header.manifest.preprocessing.input_size), costs_of(header)
    assert rows is not None
    assert sum(row.params for row in rows) == counted.params
    assert sum(row.macs for row in rows) == counted.macs
    assert sum(row.winograd_muls for row in rows) == counted.winograd_muls
    shapes = [layer.output_shape for layer in counted.layers if layer.operator == "convolution" and ".se" not in layer.path]
    assert [row.output_shape for row in rows if row.operator.startswith("conv2d")] == shapes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *NARROW,
        ("repvgg_l2pse", {}),
        ("repvgg_micro", {"widths": [8, *[12] * 2, *[16] * 2, *[20] * 4, 24]}),
        ("repvgg_micro", {"num_classes": 0}),
    ],
)
def test_costs_of_branches_are_those_that_are_counted(name: str, options: Options, tmp_path: Path) -> None:
    options = {"num_classes": 10, **({} if "widths" in options else {"width": 1 / 16}), **options}
    model = repvgg.create_model(name, **options).eval()
    repvgg.save(model, tmp_path / "a.safetensors")
    header = header_of(tmp_path / "a.safetensors")
    counted, rows = repvgg.cost(model, header.manifest.preprocessing.input_size), costs_of(header)
    assert rows is not None
    assert sum(row.params for row in rows) == counted.params
    for branch in ("conv_kxk", "conv_1x1", "identity", ".se", "head"):
        ours = [row for row in rows if branch in row.path]
        theirs = [layer for layer in counted.layers if branch in layer.path]
        assert sum(row.params for row in ours) == sum(layer.params for layer in theirs)
        assert sum(row.macs for row in ours) == sum(layer.macs for layer in theirs)
        assert sum(row.winograd_muls for row in ours) == sum(layer.winograd_muls for layer in theirs)
    assert sum(row.macs for row in rows) == counted.macs
    shapes = [layer.output_shape for layer in counted.layers if layer.operator == "convolution" and ".se" not in layer.path]
    assert [row.output_shape for row in rows if row.operator.startswith("conv2d")] == shapes


def test_other_networks_are_left_to_those_who_build_them(tmp_path: Path) -> None:
    for name, block, keys in (
        ("repvgg_micro", "acb", "repvgg"),
        ("repvgg_b0_residual", None, "repvgg"),
        ("repvgg_micro", None, "timm"),
    ):
        repvgg.save(repvgg.create_model(name, width=1 / 16, block=block), tmp_path / "a.safetensors", to_keys=keys)
        assert costs_of(header_of(tmp_path / "a.safetensors")) is None
    repvgg.save(repvgg.create_model("repvgg_micro", width=1 / 16), tmp_path / "a.safetensors")
    header = header_of(tmp_path / "a.safetensors")
    assert costs_of(header)
    lies: list[dict[str, object]] = [{"name": "repvgg_a0"}, {"name": []}, {"width": "wide"}, {"width": 0.5}, {"num_classes": None}]
    for lie in lies:
        manifest = replace(header.manifest, arch={**(header.manifest.arch or {}), **lie})
        assert costs_of(replace(header, manifest=manifest)) is None, lie
    assert costs_of(replace(header, shapes={**header.shapes, "stray.weight": (2,)})) is None
    assert costs_of(replace(header, shapes={k: v for k, v in header.shapes.items() if "stem.block.conv_1x1" not in k})) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:50], lambda data: b"", lambda data: b"x" * 99])
def test_a_file_that_is_not_whole_is_left_to_those_who_say_why(damage: Any, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(damage(ours()))
    assert read_header(tmp_path / "a.safetensors") is None
    assert read_header(tmp_path) is None
    assert read_header(tmp_path / "nowhere") is None


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "best.safetensors")
    assert read_header(tmp_path / "best.safetensors") is None


def test_info_of_a_file_imports_no_pytorch(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(ours())
    (tmp_path / "run").mkdir()
    repvgg.save(repvgg.create_model("repvgg_micro", width=1 / 16), tmp_path / "run" / "best.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "b.pth")
    code = """if True:
        import sys
        from repvgg.cli import main
        for path in sys.argv[1:]:
            main(["info", path])
            main(["info", path, "--json"])
        print('torch' in sys.modules)
    """
    words = [sys.executable, "-c", code, str(tmp_path / "a.safetensors"), str(tmp_path / "run")]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout
    assert shown.endswith("False\n")
    assert "a.safetensors, deploy form, input 3 x 16 x 16" in " ".join(shown.split())
    told = [json.loads(text) for text in re.findall(r"^\{.*?^\}", shown, re.MULTILINE | re.DOTALL)]
    assert [one["form"] for one in told] == ["deploy", "training"]
    assert [sum(layer["params"] for layer in one["cost"]) for one in told] == [one["params"] for one in told]


def test_a_list_of_layers_that_lacks_something_is_left_to_who_builds_it(tmp_path: Path) -> None:
    repvgg.save(repvgg.create_model("repvgg_micro", deploy=True, width=1 / 16), tmp_path / "a.safetensors")
    header = header_of(tmp_path / "a.safetensors")
    first, *layers = header.manifest.layers or []
    without = [{key: value for key, value in first.items() if key != "groups"}, *layers]
    assert costs_of(replace(header, manifest=replace(header.manifest, layers=without))) is None
    with pytest.raises(FileError, match="names elsewhere, of which it holds no tensors"):
        costs_of(replace(header, manifest=replace(header.manifest, layers=[{**first, "path": "elsewhere"}, *layers])))
