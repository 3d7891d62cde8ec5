"""checkpoint.py against mutated files.

PYTHONPATH=tests python tests/models/test_fuzz.py COUNT SEED FOLDER     the test by hand; what it finds is left in FOLDER
"""

import json
import random
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from safetensors.torch import save
from small_files import MANIFEST, SMALL, header, ours, pickled, with_attribute

import repvgg
from repvgg.disk import FileError
from repvgg.models import keys, zoo
from repvgg.models.checkpoint import METADATA_KEY

NASTY: list[Any] = [
    -1,
    0,
    1,
    2,
    3,
    255,
    2**31,
    2**32,
    2**63,
    10**30,
    0.5,
    1e308,
    None,
    True,
    "",
    "x",
    "relu",
    [],
    [0],
    {},
    {"x": 1},
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "?"]


def seeds() -> list[bytes]:
    """Small valid files of every kind."""
    torch.manual_seed(0)
    micro = {form: zoo.create_model("repvgg_micro", num_classes=2, width=1 / 64, deploy=form) for form in (True, False)}
    timm = keys.to_foreign(micro[False].state_dict(), "timm")
    official = keys.to_foreign(micro[True].state_dict(), "official")
    with_manifest = save(
        micro[True].state_dict(), {METADATA_KEY: replace(zoo.manifest_of(micro[True]), preprocessing=SMALL).to_json()}
    )
    bare = with_attribute(METADATA_KEY, MANIFEST.to_json())
    return [
        ours(),
        ours(),
        save(timm),
        with_manifest,
        pickled(bare),
        pickled(bare, True),
        pickled(official),
        pickled({"model": official}, True),
    ]


def mutate(data: bytes, rng: random.Random) -> bytes:
    if data[8:9] == b"{" and rng.random() < 0.6:
        return edit_header(data, rng)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        # Structure is at the beginning and at the end; in between are numbers, of which any will do.
        span = min(len(out), rng.choice((len(data), len(data), 600, 64)))
        at = rng.randrange(span) if rng.random() < 0.7 else len(out) - 1 - rng.randrange(span)
        size = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.choice((0, 0, 0, 0, 1, 1, 2, 3, 4, 5)):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"9", b"}", b'"')) * size
            case 2:
                out[at:at] = rng.randbytes(size)
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = out[rng.randrange(len(out)) :][:size]
            case 5:
                del out[at:]
        if len(out) < 2:
            return bytes(out)
    return bytes(out)


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Other values, names or types at some place of the header, or of the manifest in it."""
    (length,) = struct.unpack("<Q", data[:8])
    fields = json.loads(data[8 : 8 + length])
    metadata = fields.get("__metadata__", {})
    if METADATA_KEY in metadata and rng.random() < 0.8:
        manifest = json.loads(metadata[METADATA_KEY])
        spoil(manifest, rng)
        metadata[METADATA_KEY] = json.dumps(manifest)
    else:
        spoil(fields, rng)
    return header(fields, data[8 + length :])


def spoil(tree: Any, rng: random.Random) -> None:
    branch: Any = tree
    while True:
        places: list[Any] = list(branch) if isinstance(branch, dict) else list(range(len(branch)))
        place = rng.choice(places)
        if not isinstance(branch[place], dict | list) or not branch[place] or rng.random() < 0.1:
            break
        branch = branch[place]
    match rng.randrange(5):
        case 0:
            del branch[place]
        case 1 if isinstance(branch, dict):
            branch[rng.choice(("x", "name", place + "x"))] = branch.pop(place)
        case 2 if isinstance(branch, list):
            branch.append(branch[place])
        case 3 if place == "dtype":
            branch[place] = rng.choice(DTYPES)
        case _:
            branch[place] = rng.choice(NASTY)


def fuzz(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Load `count` mutated files; what loads must run. Raises whatever is neither; the file is then left in `folder`."""
    rng, whole = random.Random(seed), seeds()
    counts = {"loaded": 0, "refused": 0}
    path = folder / "mutated"
    for i in range(count):
        path.write_bytes(mutate(whole[i % len(whole)], rng))
        try:
            model = repvgg.load(path)
        except FileError:
            counts["refused"] += 1
            continue
        size = zoo.manifest_of(model).preprocessing.input_size
        if max(size) <= 64:
            with torch.no_grad():
                model(torch.zeros(1, *size, dtype=next(model.parameters()).dtype))
        counts["loaded"] += 1
    return counts


@pytest.mark.parametrize("count", [1000, pytest.param(5000, marks=pytest.mark.slow)])  # a thousand of them prove the same, quickly
def test_mutated_files(count: int, tmp_path: Path, forks: Forks) -> None:
    """In a process of its own, so that a crash or a hang is seen as one."""
    with forks.script(__file__, [str(count), "1", str(tmp_path)], tmp_path) as process:
        done = process.wait()
    assert done.code == 0, done.err
    counts = json.loads(done.out)
    assert counts["loaded"] + counts["refused"] == count
    assert min(counts.values()) > count / 10, counts  # neither all valid nor all rubbish


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
