"""Any network of timm: folded and written as ONNX (`repvgg convert timm:mobileone_s0 out.onnx`), or timed (`repvgg bench`)."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from repvgg.deploy.engines import Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.disk import FileError, Log, atomically, in_a_line
from repvgg.fold.algebra import ReparamError
from repvgg.fold.proof import verify
from repvgg.fold.reparameterize import reparameterize
from repvgg.fold.rounding import distance
from repvgg.models.baselines import timm_preprocessing
from repvgg.models.checkpoint import read
from repvgg.models.names import resolve_name

PREFIX = "timm:"
IMAGES = 2
FAR = 1e-3  # relative: how far ONNX Runtime may be from PyTorch in the same precision


def convert_timm(name: str, target: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None, log: Log = print) -> None:
    """Fold timm's network `name` and write it to `target` (.onnx) once both forms, and the file, are proved equal.

    checkpoint: its weights; random ones where there is none, which is said. Raises ValueError for an unknown name, `FileError` for
    files, `ReparamError` where something differs.
    """
    if Path(target).suffix != ".onnx":
        raise ValueError(f"{target}: a network of timm is written as .onnx")
    model = create(name, checkpoint, log)
    size = timm_preprocessing(model).input_size
    deploy = reparameterize(model)
    proof = verify(model, deploy, size)
    log(str(deploy.fold_report))
    log(str(proof))
    if not proof.ok:
        raise ReparamError(f"{PREFIX}{name}: the deploy form differs, so it was not written; please report this")
    file = to_onnx(deploy, Signature(size))
    _refuse_other(deploy, file, size)
    atomically(target, lambda to: to.write_bytes(file))
    log(f"{target}: deploy form, {len(file) / 1e6:.1f} MB")


def resolve(name: str) -> str:
    """Return a network's name as we spell it; that of one which timm alone has begins with timm:. Raises ValueError if unknown."""
    if name.startswith(PREFIX):
        return name
    try:
        return resolve_name(name)
    except ValueError:
        if find_spec("timm") is not None:
            import timm

            if timm.is_model(name):
                return PREFIX + name
        raise


def create(name: str, checkpoint: str | os.PathLike[str] | None = None, log: Log = print) -> nn.Module:
    """Return timm's network of this name, in eval mode. Raises ValueError for an unknown name, `FileError` for its `checkpoint`."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"{PREFIX}{name} comes from timm: pip install timm") from None
    tensors = {} if checkpoint is None else read(checkpoint)[0]
    try:
        model: nn.Module = timm.create_model(name).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"timm cannot make {name}: {in_a_line(error)}") from None
    if checkpoint is None:
        log(f"{PREFIX}{name}: random weights; --checkpoint FILE takes trained ones")
        return model
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise FileError(f"{checkpoint}: does not fit timm's {name}: {str(error).splitlines()[1].strip()}") from None
    return model


@torch.no_grad()
def _refuse_other(deploy: nn.Module, file: bytes, size: tuple[int, int, int]) -> None:
    from repvgg.deploy.engines.onnxruntime import open_file

    images = torch.randn(IMAGES, *size, generator=torch.Generator().manual_seed(0))
    got, wanted = open_file(file, Options(size))(images), deploy(images)
    if not (error := distance([got], [wanted.double()]).relative) <= FAR:
        raise ReparamError(f"the ONNX file differs from PyTorch by {error:.1e}, so it was not written; please report this")
