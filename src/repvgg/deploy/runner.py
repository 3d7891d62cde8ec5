"""An engine as a PyTorch module: what takes a model of ours and only runs it takes a `Runner` too."""

import threading
from typing import Any

import numpy as np
import torch
from torch import nn

from repvgg.deploy.engines import Engine, Options
from repvgg.models.manifest import Manifest


class Runner(nn.Module):
    """An engine as a module without parameters: images float32 [N, C, H, W], NumPy or torch, to logits float32 of the same kind,
    on the same device.

    Any number of images: they are run `batch_size` at a time. Threads may share it: they take turns.
    """

    def __init__(self, name: str, engine: Engine, options: Options, manifest: Manifest | None) -> None:
        super().__init__()
        self.name, self.engine, self.options, self.manifest = name, engine, options, manifest
        self.lock = threading.Lock()
        self.eval()

    @property
    def num_classes(self) -> int | None:
        """Return how many classes the network tells apart, if its manifest says."""
        known = self.manifest and self.manifest.arch
        return known.get("num_classes") if known else len(self.manifest.classes or []) or None if self.manifest else None

    def forward(self, images: Any) -> Any:
        """Return the logits. Raises ValueError for images of another size than it was built for."""
        x = torch.from_numpy(images) if isinstance(images, np.ndarray) else images.detach()
        if tuple(x.shape[1:]) != self.options.input_size:
            wanted = ", ".join(map(str, self.options.input_size))
            raise ValueError(f"images are [N, {wanted}] for this engine, not {list(x.shape)}")
        with self.lock:
            logits = self.engine.in_turns(x, self.options.batch_size)
        return logits.numpy() if isinstance(images, np.ndarray) else logits.to(images.device)

    def extra_repr(self) -> str:
        """Say what it is, for `repr`."""
        return f"{self.name}, {self.options.precision}, batches of {self.options.batch_size}"
