"""The network as ONNX bytes, with any batch size: what several engines start from."""

import copy
import logging
import warnings

import torch
from torch import nn

from repvgg.deploy.engines import Options


def to_onnx(model: nn.Module, options: Options) -> bytes:
    """Raises ValueError if the model cannot be exported."""
    image = torch.zeros(2, *options.input_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            program = torch.onnx.export(
                copy.deepcopy(model).cpu().float(),
                (image,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many types
            raise ValueError(f"{type(model).__name__} cannot be exported to ONNX ({str(error).splitlines()[0][:200]})") from None
    assert program is not None
    serialised: bytes = program.model_proto.SerializeToString()
    return serialised
