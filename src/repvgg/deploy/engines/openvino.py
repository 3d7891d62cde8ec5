"""OpenVINO on the CPU, for one batch size."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino.passes import ConstantFolding, Manager
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, ListedOperator, Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.models.checkpoint import METADATA_KEY

HINTS = {"fp32": "f32", "bf16": "bf16"}


@cache
def core() -> openvino.Core:
    """Return the only Core of this process, for ever.

    A Core gives its thread a signal stack of its own, and puts back the one it found when it goes. Of two that go in the order in
    which they came, the second puts back the first one's, which is gone: the next signal, be it a child's end, kills the process.
    """
    return openvino.Core()


def build(model: nn.Module, options: Options) -> Engine:
    return open_file(to_onnx(model, Signature(options.input_size)), options)


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    """Write `path` (.xml) and the weights beside it (.bin), in float32."""
    network = core().read_model(to_onnx(model, signature))
    save(network, path, metadata)


def save(network: Any, path: Path, metadata: str) -> None:
    """Write a network, its .bin beside it, with its `metadata`."""
    network.set_rt_info(metadata, METADATA_KEY)
    openvino.serialize(network, path, path.with_suffix(".bin"))


def open_file(file: Path | bytes, options: Options) -> Engine:
    """Return an engine for an .xml with its .bin beside it, or for the bytes of an ONNX file."""
    settings = {"INFERENCE_PRECISION_HINT": HINTS[options.precision], "PERFORMANCE_HINT": "LATENCY"}
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = str(options.threads)
    network = core().read_model(file)
    images = network.inputs[0]
    if images.partial_shape.is_dynamic:  # a fixed shape lets it lay everything out beforehand
        batch = images.partial_shape[0]
        network.reshape([options.batch_size if batch.is_dynamic else batch.get_length(), *options.input_size])
    batch_size = images.shape[0]
    dtype = torch.uint8 if images.element_type == openvino.Type.u8 else torch.float32
    request = core().compile_model(network, "CPU", settings).create_infer_request()

    def prepare(images: Tensor) -> Any:
        return images.to(dtype).contiguous().cpu().numpy()

    def run(images: object) -> object:
        return request.infer({0: images}, share_inputs=True, share_outputs=True)[0]

    return Engine(prepare, run, lambda logits: torch.from_numpy(logits.copy()), batch_size)


def metadata(path: Path) -> str | None:
    """Return what `write` was given."""
    network = core().read_model(path)
    return str(network.get_rt_info(METADATA_KEY).astype(str)) if network.has_rt_info(METADATA_KEY) else None


def operators(path: Path) -> list[ListedOperator]:
    """Return the graph's operators in order, without constants, shapes and what is computed of them alone.

    A convolution's bias is an Add of its own.
    """
    found: list[ListedOperator] = []
    constant: set[str] = set()
    convolutions: set[str] = set()
    for node in core().read_model(path).get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        inputs = [value.get_source_output().get_node().get_friendly_name() for value in node.inputs()]
        if kind in ("Constant", "ShapeOf") or (inputs and constant.issuperset(inputs)):
            constant.add(name)
        elif kind in ("Convolution", "GroupConvolution"):
            convolutions.add(name)
            weight = node.input(1).get_partial_shape()
            groups = weight[0].get_length() if kind == "GroupConvolution" else 1
            kernel = tuple(side.get_length() for side in list(weight)[-2:])
            found.append(ListedOperator(kind, kernel, tuple(node.get_attributes()["strides"]), groups))
        elif kind not in ("Parameter", "Result"):
            biases = kind == "Add" and inputs[0] in convolutions and inputs[1] in constant
            found.append(ListedOperator(kind, note="bias" if biases else ""))
    return found


# ----------------------------------------------------------------------------------------------------------------------- INT8


def read(file: Path | bytes) -> Any:
    """Return the network of an .xml, or of the bytes of an ONNX file.

    Its constants are folded: a bias is then one, and NNCF corrects no other.
    """
    network = core().read_model(file)
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(network)
    return network


def layers(network: Any) -> list[str]:
    """Return the names of the convolutions and the classifier, in order."""
    kinds = ("Convolution", "GroupConvolution", "MatMul")
    return [op.get_friendly_name() for op in network.get_ordered_ops() if op.get_type_name() in kinds]


def largest_inputs(network: Any) -> list[float | None]:
    """Return for each convolution of a network that NNCF quantised, in order, the largest size of a number that its input may
    have; None where the input is not rounded."""
    found: list[float | None] = []
    for op in network.get_ordered_ops():
        if op.get_type_name() in ("Convolution", "GroupConvolution"):
            rounding = op.input_value(0).get_node()
            ends = [rounding.input_value(i).get_node() for i in (1, 2)] if rounding.get_type_name() == "FakeQuantize" else []
            found.append(max(float(np.abs(end.get_data()).max()) for end in ends) if ends else None)
    return found


def activations(path: Path, images: Any) -> list[Any]:
    """Return what comes out of each ReLU; images: NumPy, float32 [N, C, H, W]."""
    network = core().read_model(path)
    relus = [op.output(0) for op in network.get_ordered_ops() if op.get_type_name() == "Relu"]
    count = len(network.outputs)
    network.add_outputs(relus)
    results = core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)
    return [np.array(results[count + i]) for i in range(len(relus))]
