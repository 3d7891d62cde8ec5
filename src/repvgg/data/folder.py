"""A folder of images: train/<class>/*, val/<class>/*."""

from pathlib import Path

from torch import Tensor
from torchvision.datasets import ImageFolder

from repvgg.data import DataError, Source
from repvgg.data.images import SUFFIXES, decode, is_image
from repvgg.files import Preprocessing


class Folder:
    """The images of one split; a class is a sub-folder."""

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; a class folder has train/<class>/* and val/<class>/*")
        try:
            folder = ImageFolder(str(root), is_valid_file=lambda p: is_image(Path(p)), allow_empty=True)
        except FileNotFoundError:
            raise DataError(f"{root}: holds no class folders") from None
        if classes is not None and (extra := sorted(set(folder.classes) - set(classes))):
            raise DataError(f"{root}: class {extra[0]!r} has no images to train on; it is missing in train/")
        self.classes: list[str] = folder.classes
        own = classes or self.classes
        self.samples = [(path, own.index(self.classes[label])) for path, label in folder.samples]
        suffixes = ", ".join(sorted(SUFFIXES))
        if not self.samples:
            raise DataError(f"{root}: holds no images ({suffixes})")
        if classes is None and (empty := sorted(set(range(len(own))) - {label for _, label in self.samples})):
            raise DataError(f"{root}: class {own[empty[0]]!r} has no images ({suffixes})")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return decode(path), label


def open_folder(root: Path) -> Source:
    train = Folder(root / "train")
    val = Folder(root / "val", train.classes)
    return Source(str(root), train, val, train.classes, Preprocessing())
