"""Decoded images in, rows of predictions out: labels with their probabilities, or the paths of masks."""

import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from repvgg.data.transforms import eval_transform, normalise
from repvgg.models.finite import finite
from repvgg.models.views import Views
from repvgg.models.zoo import dtype_of, manifest_of
from repvgg.predict.labels import named
from repvgg.predict.loading import Decoder, Loaded
from repvgg.predict.masks import Masker, class_names, colours, png
from repvgg.terminal import printable


class Labels:
    """The likeliest classes of images, as rows."""

    schema = pa.schema(
        {
            "key": pa.string(),
            "label": pa.string(),
            "labels": pa.list_(pa.string()),
            "probabilities": pa.list_(pa.float32()),
            "error": pa.string(),
        }
    )

    def __init__(self, network: nn.Module, top: int = 5, device: str = "cpu") -> None:
        manifest = manifest_of(network)
        self.preprocessing = manifest.preprocessing
        self.classes = manifest.classes and [printable(name) for name in manifest.classes]
        self.decoder = Decoder(eval_transform(self.preprocessing), self.preprocessing.input_size[0])
        self.network = network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.top, self.device, self.dtype = top, device, dtype_of(network)

    def rows(self, images: Loaded) -> pa.RecordBatch:
        """Return a row for each image."""
        answers = iter(self._labels(images.pixels)) if images.pixels is not None else iter(())
        found = [None if error else next(answers) for error in images.errors]
        columns = {
            "key": [item.key for item in images.batch.items],
            "label": [self._name(item.label) for item in images.batch.items],
            "labels": [[name for name, _ in labels] if labels else None for labels in found],
            "probabilities": [[x for _, x in labels] if labels else None for labels in found],
            "error": images.errors,
        }
        return pa.RecordBatch.from_pydict(columns, schema=self.schema)

    @torch.inference_mode()
    def _labels(self, pixels: Tensor) -> list[list[tuple[str, float]]]:
        x = normalise(pixels.to(self.device), self.preprocessing)
        return named(finite(self.network, x.to(self.dtype)).float().softmax(1).cpu(), self.classes, self.top)

    def _name(self, label: str | int | None) -> str | None:
        """Return a label's name: where the data only numbers its classes, the one that the model has for it."""
        if isinstance(label, int):
            return self.classes[label] if self.classes and label < len(self.classes) else str(label)
        return label


class Masks:
    """Masks of photos as files, and their paths as rows. save: writes bytes to a path below the folder of predictions."""

    schema = pa.schema({"key": pa.string(), "mask": pa.string(), "error": pa.string()})

    def __init__(self, model: nn.Module, device: str, views: Views, save: Callable[[str, bytes], Any]) -> None:
        self.masker, self.palette, self.save = Masker(model, device, views), colours(class_names(model)), save
        self.preprocessing = self.masker.preprocessing
        self.decoder = Decoder(self.masker.to_network, self.preprocessing.input_size[0])

    def rows(self, images: Loaded) -> pa.RecordBatch:
        """Return a row for each photo, of at most one: they differ in size."""
        masks: list[str | None] = [None] * len(images.batch.items)
        if images.pixels is not None:
            masks = [f"_masks/{images.batch.shard:05d}/{images.batch.start:06d}.png"]
            data = io.BytesIO()
            png(self.masker(images.pixels[0], images.sizes[0]), self.palette).save(data, format="PNG")
            self.save(str(masks[0]), data.getvalue())
        columns = {"key": [item.key for item in images.batch.items], "mask": masks, "error": images.errors}
        return pa.RecordBatch.from_pydict(columns, schema=self.schema)
