"""The image files that words name: files, folders and globs. Importable without PyTorch."""

import glob
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from repvgg.disk import images_below, read_text

LISTING = "masks.json"  # in a folder of masks that were predicted
Made = dict[str, Any]  # of one image: its path, the files of its mask and overlay, and shares of the pixels


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the paths of the images that files, folders and globs name, each once, sorted within a pattern.

    Raises `ImageError` for a pattern that names none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        matches = [pattern] if path.exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute too
        images = [str(image) for match in matches for image in _images(Path(match))]
        if not images:
            from repvgg.data.images import ImageError

            where = "an address: save the image as a file first" if "://" in pattern else "no such file, and no file fits it"
            raise ImageError(f"{pattern}: {'a folder without images' if path.is_dir() else where}")
        found.update(dict.fromkeys(images))
    return list(found)


def targets(paths: Sequence[str], out: Path | None = None) -> dict[str, Path]:
    """Return where what is made of each image is written, without an ending: in a folder, by default beside the image.

    It is called like the image without its suffix; with it where an image beside it differs in nothing else. Raises ValueError for
    two images of one name.
    """
    alike = Counter(Path(path).with_suffix("") for path in paths)
    found: dict[Path, str] = {}
    for path in paths:
        image = Path(path)
        target = (out or image.parent) / (image.name if alike[image.with_suffix("")] > 1 else image.stem)
        if target in found:
            raise ValueError(f"{path}: {found[target]} has the same name: give each folder an --out of its own")
        found[target] = path
    return {path: target for target, path in found.items()}


def masks_in(folder: Path) -> tuple[list[str], list[Made]]:
    """Return the classes and the masks of a folder that `repvgg predict` wrote masks into; nothing of any other folder."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = json.loads(read_text(folder / LISTING))
        if all(isinstance(made[kind], str) for made in found["images"] for kind in ("mask", "overlay")):
            return list(found["classes"]), list(found["images"])
    return [], []


def _images(path: Path) -> list[Path]:
    """Return a file, or the images below a folder without masks that were made of some."""
    if not path.is_dir():
        return [path]
    found = [path / name for name in images_below(path)]
    made = {
        folder / m[kind]
        for folder in {image.parent for image in found}
        for m in masks_in(folder)[1]
        for kind in ("mask", "overlay")
    }
    return [image for image in found if image not in made]
