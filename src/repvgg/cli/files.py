"""Commands that turn a model into another file: convert, export, push."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from repvgg.cli.flags import Model, say


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Fold training form to deploy form, verified; or, with --to-keys, rename keys for another implementation.

    Example: repvgg convert runs/photos/best.safetensors photos.safetensors
    """

    source: Annotated[
        Path,
        Positional,
        arg(metavar="MODEL", help="Our file; an official, timm or mmpretrain checkpoint; anybody's .onnx; or timm:NAME."),
    ]
    target: Annotated[
        Path,
        Positional,
        arg(metavar="OUT", help="The file to write: .safetensors, or .pth for a bare state dict; .onnx from .onnx or timm:NAME."),
    ]
    checkpoint: Path | None = None
    """Weights for timm:NAME; random ones without it."""
    to_keys: Literal["repvgg", "official", "timm", "mmpretrain"] | None = None
    """Keep the form, and spell the state dict as this implementation does."""

    def run(self) -> None:
        foreign, from_timm = self.source.suffix == ".onnx", str(self.source).startswith("timm:")
        if self.to_keys and (foreign or from_timm):
            raise ValueError(f"--to-keys is for model files and checkpoints, not for {self.source}")
        if self.checkpoint and not from_timm:
            raise ValueError(f"--checkpoint is for timm:NAME, not for {self.source}")
        from repvgg.models.convert import convert, refuse_itself

        refuse_itself(self.checkpoint or self.source, self.target)
        if foreign:
            from repvgg.fold.onnx import fold_onnx

            say(str(fold_onnx(self.source, self.target)))
            return
        if from_timm:
            from repvgg.deploy.from_timm import convert_timm

            convert_timm(str(self.source).removeprefix("timm:"), self.target, self.checkpoint, say)
            return
        convert(self.source, self.target, self.to_keys, log=say)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export to other runtimes: fold, write, load back, and compare with PyTorch before a file is kept.

    Example: repvgg export runs/photos/best.safetensors --to onnx --out exported
    """

    model: Model
    to: tuple[Literal["onnx", "openvino", "ncnn", "mnn", "pt2", "aotinductor", "web"], ...]
    """Kinds of files; pt2 is torch.export's, aotinductor that compiled for this kind of processor, web a folder with a page."""
    out: Path
    """Folder for the files, and for a report (.json) and an example (.py) of each."""
    batch_size: int = 0
    """Images a run; 0 for any number."""
    any_size: bool = False
    """Take images of any height and width."""
    pixels: bool = False
    """Take uint8 pixels: mean and deviation go into the graph."""
    image_size: tuple[int, int] | None = None
    """Take uint8 pixels of this height and width: resizing and cropping go into the graph too."""
    data: str = ""
    """Compare on images of its validation split, instead of random ones."""
    images: int = 8
    """How many of them."""

    def run(self) -> None:
        from repvgg.api.files import export

        if self.images != type(self).images and not self.data:
            raise ValueError("--images counts those of --data: name it too, or leave out --images")
        export(
            self.model,
            self.to,
            self.out,
            batch_size=self.batch_size,
            any_size=self.any_size,
            pixels=self.pixels,
            image_size=self.image_size,
            data=self.data,
            images=self.images,
            log=say,
        )


@dataclass(frozen=True, kw_only=True)
class Push:
    """Publish a model file on the Hugging Face hub, with a card that says what was measured. Then hf:REPO names it.

    Example: repvgg push runs/photos/best.safetensors me/photos --license mit
    """

    model: Annotated[
        Path,
        Positional,
        arg(metavar="MODEL", help="A model file; the summary of its run, if it lies beside it, goes into the card."),
    ]
    repo: Annotated[str, Positional, arg(metavar="REPO", help="USER/NAME; made if it is not there.")]
    license: str = ""
    """An identifier of the hub's, such as mit or apache-2.0."""
    private: bool = False
    """Make the repository a private one."""
    message: str = ""
    """Message of the commit."""

    def run(self) -> None:
        from repvgg.models.push import push_to_hub

        print(push_to_hub(self.model, self.repo, license=self.license, private=self.private, message=self.message))
