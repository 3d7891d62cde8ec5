"""ONNX Runtime on the CPU."""

import onnxruntime
import torch
from torch import nn

from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.engines.onnx_file import to_onnx


def build(model: nn.Module, options: Options) -> Engine:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if options.threads:
        settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(to_onnx(model, options), settings, providers=["CPUExecutionProvider"])
    return Engine(  # its own values, so that a run copies neither images nor outputs
        lambda images: onnxruntime.OrtValue.ortvalue_from_numpy(images.contiguous().cpu().numpy()),
        lambda images: session.run_with_ort_values(None, {"images": images})[0],
        lambda logits: torch.from_numpy(logits.numpy()),
    )
