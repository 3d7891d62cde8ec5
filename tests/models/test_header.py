"""header.py: what a deploy form's list of layers costs, against what is counted from the network; and no PyTorch for it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_files import ours

import repvgg
from repvgg.models.header import costs_of, read_header


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("repvgg_a0", {}),
        ("repvgg_b1g4", {}),
        ("repvgg_d2se", {}),
        ("repvgg_b0", {"output_stride": 8}),
        ("repvgg_a1", {"small_input": True}),
    ],
)
def test_costs_are_those_that_are_counted(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = repvgg.create_model(name, deploy=True, width=1 / 16, num_classes=10, **options)
    repvgg.save(model, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert header is not None
    counted, rows = repvgg.cost(model.eval(), header.manifest.preprocessing.input_size), costs_of(header)
    assert sum(row.params for row in rows) == counted.params
    assert sum(row.macs for row in rows) == counted.macs
    assert sum(row.winograd_muls for row in rows) == counted.winograd_muls
    shapes = [layer.output_shape[1:] for layer in counted.layers if layer.operator == "convolution" and ".se" not in layer.path]
    assert [row.output for row in rows if row.operator.startswith("conv2d")] == shapes


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:50], lambda data: b"", lambda data: b"x" * 99])
def test_a_file_that_is_not_whole_is_left_to_those_who_say_why(damage: Any, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(damage(ours()))
    assert read_header(tmp_path / "a.safetensors") is None
    assert read_header(tmp_path) is None
    assert read_header(tmp_path / "nowhere") is None


def test_info_of_a_deploy_form_imports_no_pytorch(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(ours())
    torch.save({"x": torch.ones(1)}, tmp_path / "b.pth")
    code = "import sys; from repvgg.cli import main; main(['info', sys.argv[1]]); print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    *shown, imported = subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout.splitlines()
    assert imported == "False"
    assert "a.safetensors, deploy form, input 3 x 16 x 16" in " ".join(" ".join(shown).split())
