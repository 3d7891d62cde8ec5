"""Training form to deploy form as files, verified; and checkpoints in and out of other implementations' keys."""

import os
from contextlib import suppress
from pathlib import Path

from repvgg.disk import Log
from repvgg.fold.algebra import ReparamError
from repvgg.fold.proof import verify
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.checkpoint import PICKLE_SUFFIXES
from repvgg.models.load import load, save, tell_left_out
from repvgg.models.manifest import Preprocessing
from repvgg.models.names import in_run_folder
from repvgg.models.zoo import manifest_of

LARGEST = 320  # pixels a side that the two forms are compared on


def proof_size(preprocessing: Preprocessing) -> tuple[int, int, int]:
    """Return the size of images that two forms are compared on: on larger ones rounding is the same, and float64 slow."""
    channels, *sides = preprocessing.input_size
    height, width = (min(LARGEST, side) for side in sides)
    return channels, height, width


def refuse_itself(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raise ValueError where the target is the file that is converted: of a training form it may be the only one."""
    with suppress(OSError):  # one of them is not there
        if in_run_folder(source).samefile(target):
            raise ValueError(f"{target}: is what is converted, and would be lost: name another file")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to_keys: str | None = None,
    log: Log = print,
) -> None:
    """Fold the model of `source` and write it to `target` once it is proved equal; or only re-spell its keys, losslessly.

    Raises `FileError` for files, `ReparamError` for what cannot be folded, ValueError if it is folded already or the
    target is the source.
    """
    if Path(target).suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise ValueError(
            f"{target}: .safetensors, or .pth for a bare state dict; other runtimes' files are written by repvgg export"
        )
    refuse_itself(source, target)
    model = load(source)
    tell_left_out(model, log)
    manifest = manifest_of(model)
    if to_keys is not None:
        save(model, target, to_keys=to_keys)
        log(f"{target}: {manifest.form} form, {len(model.state_dict())} tensors in {to_keys} keys")
        return
    if manifest.form == "deploy":
        raise ValueError(f"{source}: is in deploy form already, there is nothing to fold (--to-keys re-spells its keys)")
    deploy = reparameterize(model)
    proof = verify(model, deploy, proof_size(manifest.preprocessing))
    log(str(deploy.fold_report))
    log(str(proof))
    if proof.verdict == "cannot be judged":
        log("every part was proved alone, in float64; only the whole cannot be judged: see the line above")
    elif not proof.ok:
        raise ReparamError(f"{source}: the deploy form differs, so it was not written; please report this")
    save(deploy, target)
    log(f"{target}: deploy form")
