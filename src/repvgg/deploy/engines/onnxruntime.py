"""ONNX Runtime: on the CPU, and on a GPU by its CUDA and TensorRT providers, where nothing runs on the CPU instead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from repvgg.deploy.engines import DeviceError, Engine, ListedOperator, Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.disk import describe
from repvgg.models.checkpoint import METADATA_KEY

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
# What computes in a precision on a GPU, the best first. TensorRT's float32 is TF32; the CUDA provider computes as the file says.
ON_GPU = {"fp32": (CUDA,), "tf32": (TENSORRT, CUDA), "fp16": (TENSORRT,)}
DTYPES = {"tensor(float)": torch.float32, "tensor(uint8)": torch.uint8}


def build(model: nn.Module, options: Options) -> Engine:
    return open_file(to_onnx(model, Signature(options.input_size)), options)


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    path.write_bytes(to_onnx(model, signature, metadata))


def open_file(file: Path | bytes, options: Options) -> Engine:
    """Return an engine for an ONNX file, or for its bytes. Raises `DeviceError` where it cannot use the GPU asked for."""
    session = _session(file, options)
    images = session.get_inputs()[0]
    batch, dtype = images.shape[0], DTYPES[images.type]
    device = torch.device(options.device)
    place = device.type, device.index or 0
    run = _on_device(session, *place) if device.type == "cuda" else lambda x: session.run_with_ort_values(None, {images.name: x})[0]
    return Engine(  # its own values, so that a run copies neither images nor outputs
        lambda x: onnxruntime.OrtValue.ortvalue_from_numpy(x.to(dtype).contiguous().cpu().numpy(), *place),
        run,
        lambda logits: torch.from_numpy(logits.numpy()),
        batch if isinstance(batch, int) else None,
    )


def _session(file: Path | bytes, options: Options) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads slow down whatever is timed next
    settings.log_severity_level = 4
    if options.threads:
        settings.intra_op_num_threads = options.threads
    if torch.device(options.device).type != "cuda":
        return onnxruntime.InferenceSession(file, settings, providers=[CPU])
    providers = _on_gpu(options)
    wanted = providers[0][0]
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(file, settings, providers=providers)
    except Exception as error:  # the runtime's own kinds, and what its libraries raise
        raise DeviceError(f"ONNX Runtime cannot run this on {options.device} by its {wanted}: {describe(error)}") from None
    if not {*ON_GPU[options.precision]} & {*session.get_providers()}:  # it warns, and goes on without
        raise DeviceError(
            f"ONNX Runtime could not start its {wanted}, whose libraries (CUDA, cuDNN, TensorRT) it does not find here"
        )
    session.disable_fallback()
    return session


def _on_gpu(options: Options) -> list[tuple[str, dict[str, str]]]:
    """Return the providers for a GPU, each with its settings: the one for this precision, and what it leaves goes to CUDA's."""
    here = onnxruntime.get_available_providers()
    names = ON_GPU[options.precision]
    chosen = next((name for name in names if name in here), None)
    if chosen is None:
        raise DeviceError(
            f"ONNX Runtime needs its {' or '.join(names)} for {options.precision} on {options.device}, and this one has "
            f"{', '.join(here)}: pip install onnxruntime-gpu, in place of onnxruntime"
        )
    at = {"device_id": str(torch.device(options.device).index or 0)}
    settings = {
        TENSORRT: {**at, "trt_fp16_enable": str(int(options.precision == "fp16"))},
        CUDA: {**at, "use_tf32": str(int(options.precision == "tf32"))},
    }
    return [(name, settings[name]) for name in dict.fromkeys((chosen, CUDA))]


def _on_device(session: Any, kind: str, index: int) -> Callable[[Any], Any]:
    """Return a run whose images and logits stay on the device."""
    images, logits = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(x: Any) -> Any:
        binding = session.io_binding()
        binding.bind_ortvalue_input(images, x)
        binding.bind_output(logits, kind, index)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()[0]

    return run


def metadata(path: Path) -> str | None:
    """Return what `write` was given."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, settings, providers=[CPU])
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
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=[CPU])
    return list(session.run(names, {"images": images}))
