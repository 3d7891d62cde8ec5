"""torch.compile, with its default backend."""

import torch
from torch import nn

from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.engines.eager import in_precision, place


def build(model: nn.Module, options: Options) -> Engine:
    network, prepare = place(model, options)
    return Engine(prepare, in_precision(torch.compile(network), options), lambda logits: logits.float().cpu())
