"""ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from repvgg.deploy.engines import Engine, ListedOperator, Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.models.checkpoint import METADATA_KEY

DTYPES = {"tensor(float)": torch.float32, "tensor(uint8)": torch.uint8}


def build(model: nn.Module, options: Options) -> Engine:
    return open_file(to_onnx(model, Signature(options.input_size)), options)


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    path.write_bytes(to_onnx(model, signature, metadata))


def open_file(file: Path | bytes, options: Options) -> Engine:
    """Return an engine for an ONNX file, or for its bytes."""
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
    """Return what `write` was given."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    found: str | None = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    return found


def operators(path: Path) -> list[ListedOperator]:
    """Return the graph's operators in order."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found = []
    for node in graph.node:
        about = {
            a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in ("kernel_shape", "strides", "group")
        }
        kernel, stride = (tuple(about.get(name, ())) for name in ("kernel_shape", "strides"))
        found.append(ListedOperator(node.op_type, kernel, stride, about.get("group", 1)))
    return found


# ----------------------------------------------------------------------------------------------------------------------- INT8


def read(file: Path | bytes) -> Any:
    """Return the graph of an ONNX file, or of its bytes."""
    import onnx

    return onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)


def save(network: Any, path: Path, metadata: str) -> None:
    """Write a graph, its `metadata` in place of any other."""
    del network.metadata_props[:]
    network.metadata_props.add(key=METADATA_KEY, value=metadata)
    path.write_bytes(network.SerializeToString())


def layers(network: Any) -> list[str]:
    """Return the names of the convolutions and the classifier, in order."""
    return [node.name for node in network.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]


def activations(path: Path, images: Any) -> list[Any]:
    """Return what comes out of each ReLU; images: NumPy, float32 [N, C, H, W]."""
    import onnx

    network = onnx.load(path)
    names = [node.output[0] for node in network.graph.node if node.op_type == "Relu"]
    network.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(names, {"images": images}))
