"""Open a file that `repvgg export` wrote, in the runtime that it was made for."""

import json
from dataclasses import replace
from pathlib import Path

from repvgg.deploy import engines
from repvgg.deploy.engines import DeviceError, Options, Runtime
from repvgg.deploy.formats import FORMATS, SUFFIXES, report_of
from repvgg.deploy.runner import Runner
from repvgg.disk import in_a_line, read_text
from repvgg.models.manifest import Manifest


def open_exported(path: Path, engine: str, options: Options) -> Runner:
    """Return the file as a `Runner`. engine: "auto", or the name of the file's own.

    Raises ValueError where the file is missing, damaged or not ours, or another engine is asked for.
    """
    wanted = FORMATS[SUFFIXES[path.suffix]]
    if engine not in ("auto", wanted.engine):
        raise ValueError(f"{path}: is for {wanted.engine}, not for {engine}: leave out --engine")
    engines.check(wanted.engine, options.precision, options.device)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    runtime = engines.runtime(wanted.module)
    try:
        text, batch = _metadata(path, runtime)
        if text:
            manifest = Manifest.from_json(text)
            options = replace(options, input_size=manifest.preprocessing.input_size)
            opened = runtime.open_file(path, options)
            return Runner(wanted.engine, replace(opened, batch_size=opened.batch_size or batch), options, manifest)
    except (MemoryError, DeviceError):
        raise
    except Exception as error:  # of any runtime
        reason = in_a_line(error)
        raise ValueError(f"{path}: {wanted.engine} cannot open it, it is damaged or of another version ({reason})") from None
    raise ValueError(f"{path}: was not written by repvgg export, it does not say what goes in and comes out")


def _metadata(path: Path, runtime: Runtime) -> tuple[str | None, int | None]:
    """Return the manifest in a file, or for a format that has no place for one in the report beside it; and the batch size if that
    is fixed and the runtime does not know."""
    if text := runtime.metadata(path):
        return text, None
    if not report_of(path).is_file():
        return None, None
    report = json.loads(read_text(report_of(path)))
    return json.dumps(report["manifest"]), report["input"]["shape"][0]
