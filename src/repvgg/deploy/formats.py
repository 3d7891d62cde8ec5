"""The kinds of files that `repvgg export` writes, and how one of them is recognised. Imports no runtime, and no PyTorch."""

import os
from dataclasses import dataclass
from pathlib import Path

from repvgg.models.names import in_run_folder


@dataclass(frozen=True)
class Format:
    """A kind of file.

    module: of engines/, which writes and opens it; engine: whose packages that needs. The flags say what it can hold: any number
    of images; uint8 pixels as input.
    """

    module: str
    suffix: str
    engine: str = "eager"
    any_batch: bool = True
    pixels: bool = True


FORMATS = {
    "onnx": Format("onnxruntime", ".onnx", "onnxruntime"),
    "openvino": Format("openvino", ".xml", "openvino"),
    "ncnn": Format("ncnn", ".ncnn.param", "ncnn", any_batch=False, pixels=False),
    "mnn": Format("mnn", ".mnn", "mnn", pixels=False),
    "pt2": Format("graph", ".pt2"),
    "aotinductor": Format("aotinductor", ".aoti.pt2", "aotinductor"),
}

# Exported files that are data; pt2 files are programs.
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".param": "ncnn", ".mnn": "mnn"}


def report_of(path: Path) -> Path:
    """Return where the report on an exported file lies."""
    return path.with_name(path.name + ".json")


def exported_file(path: str | os.PathLike[str]) -> Path | None:
    """Return the exported file that a path names, or that lies in the folder it names; None for anything else, and for the folder
    of a run, which stands for its best model.

    Raises ValueError for a folder with several, and for a pt2 file.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        raise ValueError(f"{path}: a pt2 file is a program; if it is your own, open it with torch.export.load or aoti_load_package")
    if not path.is_dir():
        return path if path.suffix in SUFFIXES else None
    if in_run_folder(path) != path:
        return None
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    if len(found) > 1:
        raise ValueError(f"{path}: holds {', '.join(p.name for p in found)}: name one of them")
    return found[0] if found else None
