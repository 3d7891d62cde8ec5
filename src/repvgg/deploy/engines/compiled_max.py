"""PyTorch compiled (torch.compile) at its most thorough: it times many kernels for each operator and records the whole as a CUDA
graph."""

from torch import nn

from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.engines.compiled import compiled


def build(model: nn.Module, options: Options) -> Engine:
    return compiled(model, options, mode="max-autotune")
