"""OpenVINO on the CPU, for one batch size."""

from typing import Any

import openvino
import torch
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.engines.onnx_file import to_onnx

HINTS = {"fp32": "f32", "bf16": "bf16"}


def build(model: nn.Module, options: Options) -> Engine:
    settings = {"INFERENCE_PRECISION_HINT": HINTS[options.precision], "PERFORMANCE_HINT": "LATENCY"}
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = str(options.threads)
    core = openvino.Core()
    network = core.read_model(to_onnx(model, options))
    network.reshape([options.batch_size, *options.input_size])  # a fixed shape lets it lay everything out beforehand
    request = core.compile_model(network, "CPU", settings).create_infer_request()

    def prepare(images: Tensor) -> Any:
        if len(images) != options.batch_size:
            raise ValueError(f"this OpenVINO engine was built for batches of {options.batch_size}, not {len(images)}")
        return images.contiguous().cpu().numpy()

    def run(images: object) -> object:
        return request.infer({0: images}, share_inputs=True, share_outputs=True)[0]

    return Engine(prepare, run, lambda logits: torch.from_numpy(logits.copy()))
