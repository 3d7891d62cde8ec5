"""WebDataset shards of small images."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def png(grey: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), grey, dtype=np.uint8)).save(out, "png")
    return out.getvalue()


def write_shards(root: Path, sizes: dict[str, list[int]], bad: int | None = None) -> Path:
    """Shards of images, the n-th of which is grey level n and of class n % 4."""
    root.mkdir(exist_ok=True)
    number = 0
    for split, counts in sizes.items():
        for shard, count in enumerate(counts):
            with tarfile.open(root / f"{split}-{shard:03d}.tar", "w") as tar:
                for _ in range(count):
                    content = b"not an image" if number == bad else png(number)
                    for suffix, data in (("png", content), ("cls", str(number % 4).encode())):
                        info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    number += 1
    return root
