"""A page that runs a model in the browser, training form and deploy form side by side, by onnxruntime-web.

    build(repvgg.load("demo/run/last.safetensors"), "web")       # index.html, the two .onnx files, the runtime
    serve("web")                                                 # http://127.0.0.1:8000, to this machine alone

The folder is static: any web server will do. Images stay in the browser.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from repvgg.data.images import decode
from repvgg.deploy import engines
from repvgg.deploy.engines import Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.deploy.export import random_images
from repvgg.deploy.operators import read
from repvgg.deploy.parity import compare, folded, reference
from repvgg.deploy.staged import refuse_strangers, staged
from repvgg.deploy.web_folder import MODEL, engine_files, write_model
from repvgg.disk import FileError, Log, cache_folder, read_text
from repvgg.models import zoo
from repvgg.predict.paths import expand
from repvgg.web import page

HERE = Path(__file__).parent
PACKAGE = "onnxruntime-web@1.30.0"  # the version that the page was tested with
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
EXAMPLE = r"example-\d\d\.png"
EXAMPLES, LONGEST = 24, 1024  # at most so many, of at most so many pixels a side


def build(
    model: nn.Module,
    out: str | os.PathLike[str],
    examples: Sequence[str] = (),
    runtime: str | os.PathLike[str] | None = None,
    log: Log = print,
) -> Path:
    """Write the page and all that it needs into the folder `out`. Returns the page's path.

    model: a classifier of ours in training form, in eval mode. examples: images (files, folders, globs) to try it on. runtime: a
    folder with onnxruntime-web's files; by default npm fetches them, once.

    Raises `ReparamError` for a model that does not fold, ValueError for one that is folded already, or where the runtime cannot be
    had; `FileError` where the folder cannot be written.
    """
    manifest = zoo.manifest_of(model)
    if manifest.task == "masks":
        raise ValueError("the page shows labels, and a PSPNet makes masks")
    if manifest.form == "deploy":
        raise ValueError("this model is in deploy form, and the page shows both forms: name the file that it was folded from")
    engines.check("onnxruntime", "fp32")
    deploy = folded(model)
    pictures = expand(examples)[:EXAMPLES] if examples else []
    channels = manifest.preprocessing.input_size[0]
    refuse_strangers(out, "model.json", "index.html", MODEL)
    parts, before = runtime_files(runtime, log), _earlier(Path(out))
    planned = {MODEL, *(f"example-{i:02}.png" for i in range(len(pictures)))}
    if strange := next((name for name in sorted(planned - before) if (Path(out) / name).exists()), None):
        raise FileError(f"{Path(out) / strange}: is none of an earlier page, and would be lost: name another folder")
    with staged(out, "model.json") as folder:
        told = {
            "name": (manifest.arch or {}).get("name", ""),
            "classes": manifest.classes,
            "preprocessing": vars(manifest.preprocessing),
            "forms": {name: _write(net, model, folder / f"{name}.onnx") for name, net in (("training", model), ("deploy", deploy))},
            "examples": [_example(path, channels, folder / f"example-{i:02}.png") for i, path in enumerate(pictures)],
        }
        told["native"] = _native(model, folder, log)
        for file in (*parts, HERE / "index.html", HERE / "app.js"):
            shutil.copyfile(file, folder / file.name)
        (folder / "style.css").write_text(page.STYLE + (HERE / "style.css").read_text())
        (folder / "model.json").write_text(json.dumps(told, indent=2) + "\n")
        written = {file.name for file in folder.iterdir()}
    for left in before - written:  # whoever publishes the folder would publish them
        (Path(out) / left).unlink(missing_ok=True)
    errors = ", ".join(f"{name} form {form['error']:.1e}" for name, form in told["forms"].items())
    log(f"{Path(out) / 'index.html'}: relative errors against PyTorch in float64: {errors}")
    return Path(out) / "index.html"


def _earlier(out: Path) -> set[str]:
    """Return the names of the examples of an earlier page in a folder, and of its model where the native engine ran that."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        told = json.loads(read_text(out / "model.json"))
        examples = {name for shown in told["examples"] if re.fullmatch(EXAMPLE, name := shown["file"])}
        return examples | ({MODEL} if told["native"] else set())
    return set()


def serve(folder: str | os.PathLike[str], port: int = 8000, log: Log = print) -> None:
    """Serve the folder to this machine until Ctrl-C. Raises ValueError where the port is taken."""
    with suppress(KeyboardInterrupt), server(folder, port) as running:
        log(f"http://127.0.0.1:{running.server_port} (Ctrl-C ends it)")
        running.serve_forever()


def server(folder: str | os.PathLike[str], port: int = 0) -> ThreadingHTTPServer:
    """Return a server that is not running yet; port 0: any that is free."""
    try:
        return Server(("127.0.0.1", port), partial(Handler, directory=os.fspath(folder)))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port}: cannot be used ({getattr(error, 'strerror', None) or error}); name another") from None


class Server(ThreadingHTTPServer):
    """Says nothing of browsers that go away in the midst of a file."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(SimpleHTTPRequestHandler):
    """Serves files with the headers without which browsers give a page one thread and a coarse clock."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def send_head(self) -> Any:
        if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403, "not asked for by its own name")  # by a page of a stranger whose name leads here
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------- what lies in the folder


def _write(net: nn.Module, original: nn.Module, path: Path) -> dict[str, Any]:
    """Write one form as an ONNX file for one image, proved in ONNX Runtime. Raises ValueError if it computes something else."""
    from repvgg.deploy.engines import onnxruntime

    manifest = zoo.manifest_of(net)
    signature = Signature(manifest.preprocessing.input_size, batch=1)
    path.write_bytes(to_onnx(net, signature, manifest.to_json(), merge_norms=False))
    images = random_images(signature)
    parity = compare(onnxruntime.open_file(path, Options()).in_turns(images, 1), reference(original, images))
    if not parity.ok:
        raise ValueError(f"{path.name} computes something else, so it was not kept: {parity}")
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "operators": len(read(path)),
        "parameters": sum(p.numel() for p in net.parameters()),
        "error": parity.error.relative,
    }


def _native(model: nn.Module, folder: Path, log: Log) -> bool:
    """Write what the page needs to run the deploy form in the native engine too; without the engine it does without, in words."""
    try:
        files = [file for file in engine_files() if file.suffix in (".mjs", ".wasm")]
        parity, _ = write_model(model, folder)
    except ValueError as error:
        log(f"the page runs onnxruntime-web alone: {error}")
        return False
    for file in files:
        shutil.copyfile(file, folder / file.name)
    log(f"native engine: {parity}")
    return True


def _example(source: str, channels: int, path: Path) -> dict[str, str]:
    array = decode(source, channels).permute(1, 2, 0).squeeze(2).numpy()
    image = Image.fromarray(array)
    image.thumbnail((LONGEST, LONGEST))
    image.save(path)
    return {"file": path.name, "name": Path(source).name}


def runtime_files(folder: str | os.PathLike[str] | None = None, log: Log = print) -> list[Path]:
    """Return onnxruntime-web's files that the page needs: from `folder` (or below it, as npm lays them), else fetched by npm, once.

    Raises ValueError where they are not there or cannot be fetched.
    """
    if folder is not None:
        places = [Path(folder), *(Path(folder) / below for below in ("dist", "package/dist", "node_modules/onnxruntime-web/dist"))]
        found = next((place for place in places if all((place / name).is_file() for name in RUNTIME)), None)
        if found is None:
            raise ValueError(f"--runtime {os.fspath(folder)}: does not hold onnxruntime-web's {', '.join(RUNTIME)}")
        return [found / name for name in RUNTIME]
    kept = cache_folder() / PACKAGE
    if not all((kept / name).is_file() for name in RUNTIME):
        _fetch(kept, log)
    return [kept / name for name in RUNTIME]


def _fetch(kept: Path, log: Log) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"the page needs {PACKAGE}, which npm fetches, and there is no npm: install Node.js, or name a folder that has its "
            "files with --runtime"
        )
    log(f"fetching {PACKAGE} with npm, once")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([npm, "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True)  # noqa: S603
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packed:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            raise ValueError(f"npm cannot fetch {PACKAGE} ({reason}): check the connection, or name a folder with --runtime")
        with tarfile.open(packed[0]) as archive, staged(kept) as new:
            for name in RUNTIME:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None  # of this version
                (new / name).write_bytes(member.read())
