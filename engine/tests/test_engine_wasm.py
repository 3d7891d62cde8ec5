"""The engine as WebAssembly, in Node, beside the library on the same model, plan and images."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine
from nets import images, model_file, plain_net
from repvgg_engine import Plan, load
from repvgg_engine.images import prepare

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
    photo = np.random.default_rng(0).integers(0, 256, (40, 71, 3), np.uint8)
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
