"""OpenVINO on the CPU, for one batch size."""

from pathlib import Path
from typing import Any

import openvino
import torch
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.engines.graph import Signature, to_onnx
from repvgg.files import METADATA_KEY

HINTS = {"fp32": "f32", "bf16": "bf16"}


def build(model: nn.Module, options: Options) -> Engine:
    return open_file(to_onnx(model, Signature(options.input_size)), options)


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    """`path` (.xml) and the weights beside it (.bin), in float32."""
    network = openvino.Core().read_model(to_onnx(model, signature))
    save(network, path, metadata)


def save(network: Any, path: Path, metadata: str) -> None:
    network.set_rt_info(metadata, METADATA_KEY)
    openvino.serialize(network, path, path.with_suffix(".bin"))


def open_file(file: Path | bytes, options: Options) -> Engine:
    """`file`: an .xml with its .bin beside it, or the bytes of an ONNX file."""
    settings = {"INFERENCE_PRECISION_HINT": HINTS[options.precision], "PERFORMANCE_HINT": "LATENCY"}
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = str(options.threads)
    core = openvino.Core()
    network = core.read_model(file)
    images = network.inputs[0]
    if images.partial_shape.is_dynamic:  # a fixed shape lets it lay everything out beforehand
        batch = images.partial_shape[0]
        network.reshape([options.batch_size if batch.is_dynamic else batch.get_length(), *options.input_size])
    batch_size = images.shape[0]
    dtype = torch.uint8 if images.element_type == openvino.Type.u8 else torch.float32
    request = core.compile_model(network, "CPU", settings).create_infer_request()

    def prepare(images: Tensor) -> Any:
        return images.to(dtype).contiguous().cpu().numpy()

    def run(images: object) -> object:
        return request.infer({0: images}, share_inputs=True, share_outputs=True)[0]

    return Engine(prepare, run, lambda logits: torch.from_numpy(logits.copy()), batch_size)


def metadata(path: Path) -> str | None:
    """What `write` was given."""
    network = openvino.Core().read_model(path)
    return str(network.get_rt_info(METADATA_KEY).astype(str)) if network.has_rt_info(METADATA_KEY) else None
