"""The engine as WebAssembly, in Node, beside the library on the same model, plan and images."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine
from nets import conv, images, model_file, plain_net
from repvgg_engine import Plan, load
from repvgg_engine.images import prepare
from repvgg_engine.layers import Layer, Pool

BROWSER = Path(repvgg_engine.__file__).parent / "browser"
SCRIPT = """
import {readFileSync} from 'node:fs';
const [engine, model, plan, floats, rgba, height, width] = process.argv.slice(2);
const {load} = await import(engine.replace(/(.relaxed)?.wasm$/, '.mjs'));
let answer;
try {
  const net = await load(readFileSync(engine), readFileSync(model), plan ? readFileSync(plan).toString() : null);
  const raw = readFileSync(floats), data = new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length));
  const pixels = {data: readFileSync(rgba), height: +height, width: +width};
  answer = {logits: Array.from(net.run(data, data.length / (3 * 32 * 32))), photo: Array.from(net.logits(pixels)),
    again: Array.from(net.logits(pixels)), best: net.classify(pixels, 2), classes: net.classes,
    size: [net.channels, net.height, net.width]};
  net.close();
} catch (problem) {
  answer = {problem: problem.message};
}
console.log(JSON.stringify(answer));
"""


RELAXED = "--experimental-wasm-relaxed-simd"  # what Node had to be told before its version 21


def chosen(node: list[str]) -> str:
    """Return the file that repvgg_engine.mjs has for this Node."""
    script = f"import {{ENGINE}} from {json.dumps((BROWSER / 'repvgg_engine.mjs').as_uri())}; console.log(ENGINE)"
    return subprocess.run([*node, "--input-type=module", "-e", script], capture_output=True, text=True).stdout.strip()


@pytest.fixture(params=["repvgg_engine.wasm", "repvgg_engine.relaxed.wasm"])
def node(request: pytest.FixtureRequest) -> list[str]:
    """Node and the file that it is to load."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node")
    if not (BROWSER / request.param).is_file():
        pytest.skip(f"no {request.param}: make wasm")
    for words in ([found], [found, RELAXED]):
        if request.param == "repvgg_engine.wasm" or chosen(words) == request.param:
            return [*words, request.param]
    pytest.skip("this Node has no relaxed SIMD")


def run(node: list[str], folder: Path, model: Path, plan: str, x: Any, photo: Any) -> dict[str, Any]:
    *command, engine = node
    (folder / "run.mjs").write_text(SCRIPT)
    (folder / "x").write_bytes(x.tobytes())
    alpha = np.full((*photo.shape[:2], 1), 255, np.uint8)
    (folder / "rgba").write_bytes(np.concatenate([photo, alpha], 2).tobytes())
    words = [folder / "run.mjs", BROWSER / engine, model, plan, folder / "x", folder / "rgba", *photo.shape[:2]]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("planned", [True, False])
def test_the_same_answers(node: list[str], tmp_path: Path, planned: bool) -> None:
    """By every algorithm in turn; an image alone and among others; a photo resized and cropped there and here."""
    model = model_file(tmp_path / "net.safetensors", plain_net(), classes=[f"class {i}" for i in range(9)] + ["Straße"])
    net, x = load(model, isa="portable", accuracy="exact", threads=1), images(3)
    photo = np.random.default_rng(0).integers(0, 256, (49, 98, 3), np.uint8)  # 32 / 49 * 98 is a little less than 64
    plan = Plan("portable", "fp32", tuple(names[(3 + i) % len(names)] if names else "" for i, names in enumerate(net.known)))
    (tmp_path / "plan.json").write_text(plan.to_json())
    got = run(node, tmp_path, model, str(tmp_path / "plan.json") if planned else "", x, photo)
    assert net.preprocessing is not None
    here = load(model, plan=plan, threads=1) if planned else net
    wanted, of_photo = here(x), here(prepare(photo, net.preprocessing)[None])[0]
    spread = np.abs(wanted).max() * (1e-5 if planned else 1e-4)
    assert np.abs(np.reshape(got["logits"], wanted.shape) - wanted).max() <= spread
    assert np.abs(np.array(got["photo"]) - of_photo).max() <= spread
    assert got["photo"] == got["again"]
    assert got["best"][0]["label"] == net.classes[int(of_photo.argmax())]  # type: ignore[index]
    assert got["classes"] == net.classes
    assert got["size"] == [3, 32, 32]


def test_what_is_refused(node: list[str], tmp_path: Path) -> None:
    model, photo = model_file(tmp_path / "net.safetensors", plain_net()), np.zeros((4, 4, 3), np.uint8)
    (tmp_path / "plan.json").write_text(Plan("avx2", "fp32", ()).to_json())
    (tmp_path / "cut").write_bytes(model.read_bytes()[:5000])
    for file, plan, reason in (
        (tmp_path / "plan.json", "", "not a safetensors file"),
        (tmp_path / "cut", "", "number from"),
        (model, str(tmp_path / "plan.json"), "this processor has portable"),
    ):
        assert reason in run(node, tmp_path, file, plan, images(1), photo)["problem"]


REFUSALS = """
import {readFileSync} from 'node:fs';
const [engine, model] = process.argv.slice(2);
const {load} = await import(engine.replace(/(.relaxed)?.wasm$/, '.mjs'));
const net = await load(readFileSync(engine), readFileSync(model));
const x = new Float32Array(3 * 32 * 32).fill(0.5), before = net.run(x), long = new Float32Array(3 * 65537), said = {};
const refused = (name, call) => {
  try { call(); said[name] = ''; } catch (problem) { said[name] = problem.message; }
};
refused('short', () => net.run(x.subarray(1)));
refused('many', () => net.run(x, 2));
refused('type', () => net.run(Array.from(x)));
refused('size', () => net.run(x, 1, 0, 32));
refused('part', () => net.run(x, 0.5, 64, 32));
refused('pixels', () => net.logits({data: new Uint8ClampedArray(4 * 8 * 8), height: 8, width: 9}));
refused('floats', () => net.logits({data: new Float32Array(4 * 8 * 8), height: 8, width: 8}));
for (let i = 0; i < 6000; i++) refused('large', () => net.run(long, 1, 65537, 1)); // by the engine itself
const after = net.run(x);
console.log(JSON.stringify({said, same: before.every((y, i) => y === after[i])}));
"""


UNUSABLE = """
import {readFileSync} from 'node:fs';
const [engine, model] = process.argv.slice(2);
const {load} = await import(engine.replace(/(.relaxed)?.wasm$/, '.mjs'));
let said = '';
try {
  const net = await load(readFileSync(engine), readFileSync(model));
  net.logits({data: new Uint8ClampedArray(4 * 4 * 4), height: 4, width: 4});
} catch (problem) { said = problem.message; }
console.log(said);
"""


def test_models_that_are_no_classifiers_or_take_all_memory(node: list[str], tmp_path: Path) -> None:
    """In 32 bits, 64 channels of 8192 x 8192 pixels would take 0 bytes."""
    random, path, (*command, engine) = np.random.default_rng(0), tmp_path / "net.safetensors", node
    (tmp_path / "run.mjs").write_text(UNUSABLE)
    large = {"input_size": [64, 8192, 8192], "resize": 8192, "interpolation": "bilinear", "mean": [0.5] * 64, "std": [1] * 64}
    wide: list[Layer] = [conv(random, 64, 4, kernel=1), Pool(4), conv(random, 4, 2, kernel=1)]
    for layers, changes, reason in (
        (plain_net()[:-1], {}, "ends before its classes"),
        (plain_net()[:-2], {}, "ends before its classes"),
        (wide, {"preprocessing": large}, "images that take more than 2 GiB"),
    ):
        model_file(path, layers, **changes)
        words = [*command, tmp_path / "run.mjs", BROWSER / engine, path]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        assert reason in done.stdout, done.stdout + done.stderr


def test_images_that_do_not_fit(node: list[str], tmp_path: Path) -> None:
    """They are refused in words, and a refusal takes neither memory nor stack."""
    model = model_file(tmp_path / "net.safetensors", plain_net())
    (tmp_path / "run.mjs").write_text(REFUSALS)
    *command, engine = node
    done = subprocess.run([*command, str(tmp_path / "run.mjs"), str(BROWSER / engine), str(model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    for name, reason in (
        ("short", "images are a Float32Array of 3072 numbers: 1 x 3 x 32 x 32"),
        ("many", "images are a Float32Array of 6144 numbers: 2 x 3 x 32 x 32"),
        ("type", "images are a Float32Array of 3072 numbers"),
        ("size", "sizes are whole numbers from 1 on, not 1, 3, 0, 32"),
        ("part", "sizes are whole numbers from 1 on"),
        ("pixels", "of 288 bytes: RGBA, 8 x 9"),
        ("floats", "of 256 bytes: RGBA, 8 x 8"),
        ("large", "images of 65537 x 1 pixels"),
    ):
        assert reason in answer["said"][name], (name, answer["said"])
    assert answer["same"]


def test_the_page_is_a_program(tmp_path: Path) -> None:
    """What it says in a browser: tests/deploy/test_web_folder.py."""
    if shutil.which("node") is None:
        pytest.skip("no node")
    (program,) = re.findall(r'<script type="module">(.*?)</script>', (BROWSER / "index.html").read_text(), re.DOTALL)
    (tmp_path / "page.mjs").write_text(program)
    subprocess.run(["node", "--check", tmp_path / "page.mjs"], check=True)
