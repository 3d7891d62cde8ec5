"""app.js: its preparation of an image, in Node. What a browser decodes, and the page itself: test_app.py, in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg.data.images import decode
from repvgg.data.transforms import eval_transform, normalise
from repvgg.models.manifest import Preprocessing
from repvgg.web import app

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node here")

PROGRAM = Path(app.__file__).with_name("app.js")
PREPARES = re.compile(r"^const FILTERS.*?(?=^// -+ running the forms)", re.MULTILINE | re.DOTALL)
STAND_INS = """
import {readFileSync} from 'node:fs';
const rgba = readFileSync(process.argv[2]);
const ort = {Tensor: class {constructor(type, data) {this.data = data;}}};
const context = {fillRect() {}, drawImage() {}, getImageData: () => ({data: rgba})};
class OffscreenCanvas {getContext() {return context;}}
"""


@pytest.mark.parametrize(
    ("channels", "interpolation", "size"), [(3, "bilinear", (61, 47)), (1, "bicubic", (61, 47)), (3, "bicubic", (20, 33))]
)
def test_the_page_prepares_an_image_as_predict_does(
    channels: int, interpolation: str, size: tuple[int, int], tmp_path: Path
) -> None:
    """Shrunk and enlarged; its crop is wider than the resized upright one, so that black comes in."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size)
    image.save(tmp_path / "a.png")
    (tmp_path / "rgba").write_bytes(image.convert("RGBA").tobytes())
    p = Preprocessing((channels, 32, 43), 40, interpolation, (0.4,) * channels, (0.3,) * channels)
    facts = {"input_size": p.input_size, "resize": p.resize, "interpolation": p.interpolation, "mean": p.mean, "std": p.std}
    bitmap = {"width": size[0], "height": size[1]}
    (part,) = PREPARES.findall(PROGRAM.read_text())
    run = f"console.log(JSON.stringify(Array.from(prepare({json.dumps(bitmap)}, {json.dumps(facts)}).data)))"
    (tmp_path / "run.mjs").write_text(STAND_INS + part + run)
    done = subprocess.run(["node", tmp_path / "run.mjs", tmp_path / "rgba"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = normalise(eval_transform(p)(decode(tmp_path / "a.png", channels))[None], p)
    apart = np.abs(np.reshape(json.loads(done.stdout), wanted.shape) - wanted.numpy())
    # Torchvision resizes in whole numbers, as the page does, where the processor has AVX2; elsewhere a level may be another.
    whole = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    assert apart.max() < (1e-5 if whole else 1.01 / 255 / 0.3)


def test_the_rest_of_it_is_a_program(tmp_path: Path) -> None:
    shutil.copy(PROGRAM, tmp_path / "app.mjs")
    subprocess.run(["node", "--check", tmp_path / "app.mjs"], check=True)
