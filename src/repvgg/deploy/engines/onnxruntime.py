"""ONNX Runtime on the CPU."""

from pathlib import Path

import onnxruntime
import torch
from torch import nn

from repvgg.deploy.engines import Engine, Operator, Options
from repvgg.deploy.engines.graph import Signature, to_onnx
from repvgg.models.checkpoint import METADATA_KEY

DTYPES = {"tensor(float)": torch.float32, "tensor(uint8)": torch.uint8}


def build(model: nn.Module, options: Options) -> Engine:
    return open_file(to_onnx(model, Signature(options.input_size)), options)


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    path.write_bytes(to_onnx(model, signature, metadata))


def open_file(file: Path | bytes, options: Options) -> Engine:
    """`file`: an ONNX file, or its bytes."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    if options.threads:
        settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    images = session.get_inputs()[0]
    batch, dtype = images.shape[0], DTYPES[images.type]
    return Engine(  # its own values, so that a run copies neither images nor outputs
        lambda x: onnxruntime.OrtValue.ortvalue_from_numpy(x.to(dtype).contiguous().cpu().numpy()),
        lambda x: session.run_with_ort_values(None, {images.name: x})[0],
        lambda logits: torch.from_numpy(logits.numpy()),
        batch if isinstance(batch, int) else None,
    )


def metadata(path: Path) -> str | None:
    """What `write` was given."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    found: str | None = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    return found


def operators(path: Path) -> list[Operator]:
    """Of the graph, in order."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found = []
    for node in graph.node:
        about = {
            a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in ("kernel_shape", "strides", "group")
        }
        kernel, stride = (tuple(about.get(name, ())) for name in ("kernel_shape", "strides"))
        found.append(Operator(node.op_type, kernel, stride, about.get("group", 1)))
    return found
