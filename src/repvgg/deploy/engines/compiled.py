"""PyTorch compiled (torch.compile), with its default backend."""

import logging
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.engines.eager import in_precision, place
from repvgg.disk import in_a_line, out_of_memory


def build(model: nn.Module, options: Options) -> Engine:
    return compiled(model, options)


def compiled(model: nn.Module, options: Options, mode: str | None = None) -> Engine:
    """Return the model compiled whole, in one of torch.compile's modes."""
    network, prepare = place(model, options)
    # Models of one class share their compiled code's cache: beyond its limit the next one would run uncompiled, silently but for
    # fullgraph, which makes that an error, and a model that cannot be compiled whole too.
    torch._dynamo.config.recompile_limit = 1000
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA
    call = in_precision(torch.compile(network, fullgraph=True, mode=mode, dynamic=False), options)

    def run(images: Tensor) -> Any:
        try:
            return call(images)
        except torch._dynamo.exc.TorchDynamoException as error:  # it compiles at the first call: there is no C++ compiler, say
            if out_of_memory(error):
                raise
            raise ValueError(f"torch.compile cannot compile this ({in_a_line(error)})") from None

    return Engine(prepare, run, lambda logits: logits.float().cpu(), options.batch_size)
