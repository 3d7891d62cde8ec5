"""PyTorch as it is."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, Options

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(model: nn.Module, options: Options) -> Engine:
    network, prepare = place(model, options)
    return Engine(prepare, in_precision(network, options), lambda logits: logits.float().cpu())


def place(model: nn.Module, options: Options) -> tuple[nn.Module, Any]:
    """Return a copy of the model on its device, in its precision and memory format; and a function that does the same to images."""
    form: dict[str, Any] = {"device": options.device, "dtype": DTYPES[options.precision]}
    if options.channels_last:
        form["memory_format"] = torch.channels_last

    def prepare(images: Tensor) -> Tensor:
        return images.to(**form)

    return copy.deepcopy(model).to(**form), prepare


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch compute on so many threads in the `with` block; None: on as many as it does."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_precision(network: Any, options: Options) -> Any:
    """Return `network` without gradients, on as many threads as are asked for; on CUDA with TF32 products if and only if they are
    asked for, and with the fastest of cuDNN's algorithms, found in the first runs.

    These switches are global, so they are set at each call; and by their older names, because torch.compile reads those, and
    they refuse to be read where the newer ones were set.
    """
    tf32 = options.precision == "tf32"
    on_cuda = torch.device(options.device).type == "cuda"

    def run(images: Tensor) -> Tensor:
        if on_cuda:
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        with torch.inference_mode(), on_threads(options.threads):
            logits: Tensor = network(images)
        return logits

    return run
