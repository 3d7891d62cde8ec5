"""Photos and rows to measure loading and predicting with, made of noise; and the memory of processes."""

import io
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

IMAGENET, PHONE, QUALITY, SHARE, BLUR = (500, 375), (4000, 3000), 92, 0.5, 0.6


def photo(random: np.random.Generator, size: tuple[int, int]) -> bytes:
    """Return an encoded photo: smooth shapes under a little noise."""
    small = Image.fromarray(random.integers(0, 256, (12, 16, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(BLUR))
    file = io.BytesIO()
    Image.blend(small, noise, SHARE).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def lay_out(root: Path, count: int, size: tuple[int, int] = IMAGENET) -> tuple[str, str, int]:
    """Write photos as a class folder and as shards; return the names of both, and the bytes of one photo on average."""
    random = np.random.default_rng(0)
    encoded = [photo(random, size) for _ in range(count)]
    for split, some in (("train", encoded), ("val", encoded[:8])):
        for i, data in enumerate(some):
            path = root / "folder" / split / "ab"[i % 2] / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (root / "shards").mkdir(exist_ok=True)
        for shard in range(8):
            with tarfile.open(root / "shards" / f"{split}-{shard:03d}.tar", "w") as tar:
                for i in range(shard, len(some), 8):
                    for suffix, content in (("jpg", some[i]), ("cls", str(i % 2).encode())):
                        info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return str(root / "folder"), f"wds:{root / 'shards'}", sum(map(len, encoded)) // count


def write_rows(folder: Path, files: int, each: int, image: Callable[[], bytes]) -> str:
    """Write Parquet files of encoded images, and return the name of the data."""
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for number in range(files):
        columns = {"image": [{"bytes": image(), "path": None} for _ in range(each)], "label": [0] * each}
        table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
        pq.write_table(table, folder / f"test-{number:05d}-of-{files:05d}.parquet")
    return f"hf-stream:{folder}"


def memory(root: psutil.Process) -> float:
    """Return the bytes of a process and all that it started, what they share counted once."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total
