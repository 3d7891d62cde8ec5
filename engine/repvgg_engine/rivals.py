"""The same net in other engines, to be timed beside this one. Each needs its own package, and those that read ONNX need `onnx`."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_engine.layers import Array, Conv, Layer, Pool, SqueezeExcite
from repvgg_engine.library import EngineError

Run = Callable[[], Any]
PACKAGES = {"openvino": ["openvino", "onnx"], "onnxruntime": ["onnxruntime", "onnx"], "ncnn": ["ncnn"], "mnn": ["MNN", "onnx"]}


def rival(name: str, layers: Sequence[Layer], images: Array, precision: str, threads: int) -> Run:
    """A function that runs the net on `images` in another engine and gives the logits. Raises `EngineError` where it cannot."""
    if name not in PACKAGES:
        raise EngineError(f"no engine {name!r} to compare with: {', '.join(PACKAGES)}")
    if missing := [package for package in PACKAGES[name] if find_spec(package) is None]:
        raise EngineError(f"comparing with {name} needs {', '.join(missing)}: pip install {' '.join(missing).lower()}")
    if precision != "fp32" and name != "openvino":
        raise EngineError(f"{name} is compared in fp32 only")
    return {"openvino": _openvino, "onnxruntime": _onnxruntime, "ncnn": _ncnn, "mnn": _mnn}[name](
        layers, images, precision, threads
    )


def to_onnx(layers: Sequence[Layer]) -> bytes:
    """The net as ONNX, for any number and size of images."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    tensors: list[Any] = []
    current = "images"

    def add(op: str, inputs: list[str], **attributes: Any) -> str:
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(array: Array) -> str:
        tensors.append(numpy_helper.from_array(array, f"w{len(tensors)}"))
        return str(tensors[-1].name)

    def convolve(x: str, weight: Array, bias: Array, **attributes: Any) -> str:
        return add("Conv", [x, constant(weight), constant(bias)], kernel_shape=list(weight.shape[2:]), **attributes)

    for layer in layers:
        if isinstance(layer, Conv):
            geometry = {"strides": list(layer.stride), "dilations": list(layer.dilation), "group": layer.groups}
            current = convolve(current, layer.weight, layer.bias, pads=[*layer.padding, *layer.padding], **geometry)
        elif isinstance(layer, SqueezeExcite):
            hidden = add("Relu", [convolve(add("GlobalAveragePool", [current]), layer.reduce[..., None, None], layer.reduce_bias)])
            gate = add("Sigmoid", [convolve(hidden, layer.expand[..., None, None], layer.expand_bias)])
            current = add("Mul", [current, gate])
        else:
            current = add("GlobalAveragePool", [current])
        if not isinstance(layer, Pool) and layer.relu:
            current = add("Relu", [current])
    if any(isinstance(layer, Pool) for layer in layers):
        current = add("Flatten", [current])
    last = next(layer for layer in reversed(layers) if isinstance(layer, Conv))
    first = layers[0]
    assert isinstance(first, Conv)
    flat = nodes[-1].op_type == "Flatten"
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", first.in_channels, "h", "w"])
    output = helper.make_tensor_value_info(current, TensorProto.FLOAT, ["n", last.out_channels, *([] if flat else ["y", "x"])])
    graph = helper.make_graph(nodes, "net", [images], [output], tensors)
    model: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    return model


@cache
def _core() -> Any:
    """One for ever: a Core that goes may leave its thread without a stack for signals."""
    import openvino

    return openvino.Core()


def _openvino(layers: Sequence[Layer], images: Array, precision: str, threads: int) -> Run:
    model = _core().read_model(to_onnx(layers))
    model.reshape(list(images.shape))  # a fixed shape lets it lay everything out beforehand
    hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision], "PERFORMANCE_HINT": "LATENCY"}
    request = _core().compile_model(model, "CPU", {**hints, "INFERENCE_NUM_THREADS": str(threads)}).create_infer_request()
    return lambda: request.infer({0: images}, share_inputs=True, share_outputs=True)[0]


def _onnxruntime(layers: Sequence[Layer], images: Array, precision: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    session = onnxruntime.InferenceSession(to_onnx(layers), options, providers=["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy(images)
    return lambda: session.run_with_ort_values(None, {"images": value})[0].numpy()


def _ncnn(layers: Sequence[Layer], images: Array, precision: str, threads: int) -> Run:
    import ncnn

    lines, weights = ["Input data 0 1 t0"], [b""]
    for i, layer in enumerate(layers):
        if isinstance(layer, Pool):
            lines.append(f"Pooling l{i} 1 1 t{i} t{i + 1} 0=1 4=1")
            continue
        if not isinstance(layer, Conv) or layer.groups > 1:
            raise EngineError("ncnn is compared on plain stacks without groups or squeeze-excite only")
        if i > 0 and isinstance(layers[i - 1], Pool):
            given = f"0={layer.out_channels} 1=1 2={layer.weight.size}"
            lines.append(f"InnerProduct l{i} 1 1 t{i} t{i + 1} {given}")
        else:
            (kh, kw), (sy, sx), (dy, dx), (py, px) = layer.weight.shape[2:], layer.stride, layer.dilation, layer.padding
            shape = f"0={layer.out_channels} 1={kw} 11={kh} 2={dx} 12={dy} 3={sx} 13={sy} 4={px} 14={py} 5=1 6={layer.weight.size}"
            lines.append(f"Convolution l{i} 1 1 t{i} t{i + 1} {shape} 9={int(layer.relu)}")
        weights += [bytes(4), layer.weight.tobytes(), layer.bias.tobytes()]
    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute = threads, False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    with tempfile.TemporaryDirectory() as folder:
        param, binary = Path(folder) / "net.param", Path(folder) / "net.bin"
        param.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines, ""]))
        binary.write_bytes(b"".join(weights))
        net.load_param(str(param))
        net.load_model(str(binary))

    def run() -> Array:
        logits = []
        for image in images:  # it takes one at a time
            extractor = net.create_extractor()
            extractor.input("t0", ncnn.Mat(image).clone())
            logits.append(np.array(extractor.extract(f"t{len(layers)}")[1]).reshape(-1))
        return np.stack(logits)

    return run


def _mnn(layers: Sequence[Layer], images: Array, precision: str, threads: int) -> Run:
    import MNN

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "net.onnx", Path(folder) / "net.mnn"
        source.write_bytes(to_onnx(layers))
        convert = [
            sys.executable,
            "-m",
            "MNN.tools.mnnconvert",
            "-f",
            "ONNX",
            "--modelFile",
            str(source),
            "--MNNModel",
            str(target),
        ]
        subprocess.run([*convert, "--bizCode", "repvgg"], check=True, capture_output=True)  # noqa: S603 - our own words
        net = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": threads},))
        module = MNN.nn.load_module_from_file(str(target), ["images"], [_output_of(layers)], runtime_manager=net)
    given = MNN.expr.convert(MNN.expr.const(images, list(images.shape), MNN.expr.NCHW), MNN.expr.NC4HW4)
    return lambda: MNN.expr.convert(module.forward([given])[0], MNN.expr.NCHW).read()


def _output_of(layers: Sequence[Layer]) -> str:
    import onnx

    return str(onnx.load_model_from_string(to_onnx(layers)).graph.output[0].name)
