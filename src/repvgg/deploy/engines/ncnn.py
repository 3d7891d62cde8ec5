"""The engine ncnn, on the CPU: plain networks in deploy form, an image at a time.

Its files are written here, straight from the list of layers: a line of text for each, and the weights one after another.
"""

import tempfile
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
import torch
from torch import Tensor, nn

from repvgg.deploy.engines import Engine, ListedOperator, Options, Signature
from repvgg.models.plain import layer_list

MAGIC = 7767517
RELU, SIGMOID = 1, 4  # ncnn's activation types
FLOAT32 = bytes(4)  # the flag before a block of weights that are stored as they are


def build(model: nn.Module, options: Options) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.param"
        write(model, Signature(options.input_size), path)
        return open_file(path, options)


def write(model: nn.Module, signature: Signature, path: Path, metadata: str = "") -> None:
    """Write `path` (.param) and the weights beside it (.bin).

    Raises ValueError for a network that is no plain stack in deploy form.
    """
    layers = layer_list(model)
    if layers is None:
        raise ValueError(f"ncnn files are written of plain networks in deploy form alone, and {type(model).__name__} is none")
    file = _File({name: t.detach().cpu().float().numpy() for name, t in model.state_dict().items()})
    for i, spec in enumerate(layers):
        file.add(spec, "logits" if i == len(layers) - 1 else f"out{i}")
    path.write_text(file.text())
    path.with_suffix(".bin").write_bytes(b"".join(file.weights))


class _File:
    """The lines and weights of a network that grows layer by layer. A line: type, name, numbers of inputs and outputs, their names,
    and parameters by number."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.lines = ["Input images 0 1 images"]
        self.weights: list[bytes] = []
        self.blobs = 1
        self.last = "images"

    def text(self) -> str:
        return "\n".join([str(MAGIC), f"{len(self.lines)} {self.blobs}", *self.lines, ""])

    def add(self, spec: dict[str, Any], top: str) -> None:
        activation = RELU if spec.get("activation") else 0
        if spec["op"] == "conv2d":
            kind = "Convolution" if spec["groups"] == 1 else "ConvolutionDepthWise"
            pairs = {1: "kernel_size", 2: "dilation", 3: "stride", 4: "padding"}  # width; height is 10 further on
            sides = {n + tens: spec[name][axis] for n, name in pairs.items() for tens, axis in ((0, 1), (10, 0))}
            size = self._weight(spec["weight"], spec["bias"])
            groups = {7: spec["groups"]} if spec["groups"] > 1 else {}
            self._line(kind, top, {0: spec["out_channels"], **sides, 5: 1, 6: size, 9: activation, **groups})
        elif spec["op"] == "linear":
            size = self._weight(spec["weight"], spec["bias"])
            self._line("InnerProduct", top, {0: spec["out_features"], 1: 1, 2: size, 9: activation})
        elif spec["op"] == "global_avg_pool":
            self._line("Pooling", top, {0: 1, 4: 1})
        else:
            self._squeeze_excite(spec["path"], spec["channels"], top, bool(spec.get("activation")))

    def _squeeze_excite(self, path: str, channels: int, top: str, relu: bool) -> None:
        trunk, gate = f"{top}_trunk", f"{top}_gate"
        self.lines.append(f"Split {top}_split 1 2 {self.last} {trunk} {gate}")
        self.blobs += 2
        self.last = gate
        self._line("Pooling", f"{gate}_mean", {0: 1, 4: 1})
        for part, activation in (("reduce", RELU), ("expand", SIGMOID)):
            size = self._weight(f"{path}.{part}.weight", f"{path}.{part}.bias")
            outputs = len(self.state[f"{path}.{part}.bias"])
            self._line("InnerProduct", f"{gate}_{part}", {0: outputs, 1: 1, 2: size, 9: activation})
        self._line("Reshape", f"{gate}_map", {0: 1, 1: 1, 2: channels})
        scaled = f"{top}_scaled" if relu else top
        self.lines.append(f"BinaryOp {scaled} 2 1 {trunk} {gate}_map {scaled} 0=2")
        self.blobs += 1
        self.last = scaled
        if relu:
            self._line("ReLU", top, {})

    def _line(self, kind: str, top: str, parameters: dict[int, int]) -> None:
        words = " ".join(f"{key}={value}" for key, value in parameters.items())
        self.lines.append(f"{kind} {top} 1 1 {self.last} {top} {words}".rstrip())
        self.blobs += 1
        self.last = top

    def _weight(self, weight: str, bias: str) -> int:
        self.weights += [FLOAT32, self.state[weight].astype("<f4").tobytes(), self.state[bias].astype("<f4").tobytes()]
        return int(self.state[weight].size)


def open_file(path: Path, options: Options) -> Engine:
    """Return an engine for a .param file with its .bin. Raises ValueError for one that ncnn cannot read."""
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if options.threads:
        net.opt.num_threads = options.threads
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise ValueError(f"{weights.name}, its weights, is missing")
    _refuse_foreign(path, options.input_size[0])
    if weights.stat().st_size != _weight_bytes(path):  # a short file can end the process
        raise ValueError(f"{weights.name}, its weights, is truncated")
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise ValueError("ncnn cannot read it")

    def run(images: Any) -> Any:
        return [_logits(net, image) for image in images]

    return Engine(lambda x: x.float().contiguous().cpu().numpy(), run, _stacked)


def metadata(path: Path) -> None:
    """Return None: these files have no place for it."""


def _layers(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return kinds and parameters of the layers. Raises ValueError for a file that is not ncnn's, or is truncated."""
    lines = path.read_text().splitlines()
    if lines[:1] != [str(MAGIC)] or len(lines) < 2 or lines[1].split()[:1] != [str(len(lines) - 2)]:
        raise ValueError("ncnn cannot read it")
    layers = []
    for words in map(str.split, lines[2:]):
        inputs, outputs = int(words[2]), int(words[3])
        layers.append((words[0], dict(word.split("=", 1) for word in words[4 + inputs + outputs :])))
    return layers


SIDES = (1, 11, 2, 12, 3, 13)  # of kernel, dilation and stride
LARGEST = 1 << 16


def _refuse_foreign(path: Path, channels: int) -> None:
    """Raise ValueError for a file that is not as `write` makes them: ncnn believes numbers of blobs, channels and weights."""
    found = {"images": (channels, False)}  # by blob: channels, and whether it is a vector
    _, counts, first, *lines = path.read_text().splitlines()
    outputs = 1
    for words in map(str.split, lines):
        kind, name, below, above = words[0], words[1], int(words[2]), int(words[3])
        given = {int(n): int(value) for n, value in (word.split("=", 1) for word in words[4 + below + above :])}
        c, vector = found[words[4]]
        sides = all(0 < given.get(n, 0) <= LARGEST for n in SIDES) and all(0 <= given.get(n, -1) <= LARGEST for n in (4, 14))
        out, groups = given.get(0, 0), given.get(7, 1)
        match kind:
            case "Convolution" | "ConvolutionDepthWise":
                weights = out * (c // groups) * given.get(1, 0) * given.get(11, 0) if 0 < groups <= c else -1
                fits = sides and not vector and 0 < out <= LARGEST and given.get(6) == weights and c % groups == out % groups == 0
                result = (out, False)
            case "InnerProduct":
                fits, result = vector and 0 < out <= LARGEST and given.get(2) == out * c, (out, True)
            case "Pooling":
                fits, result = not vector and given == {0: 1, 4: 1}, (c, True)
            case "Reshape":
                fits, result = vector and given == {0: 1, 1: 1, 2: c}, (c, False)
            case "BinaryOp":
                fits, result = below == 2 and found[words[5]] == (c, vector) and given == {0: 2}, (c, vector)
            case _:
                fits, result = kind in ("Split", "ReLU") and not given, (c, vector)
        expected = {"Split": (1, 2), "BinaryOp": (2, 1)}.get(kind, (1, 1))
        new = words[4 + below : 4 + below + above]
        if not fits or (below, above) != expected or len(new) != above or found.keys() & set(new):
            raise ValueError(f"its layer {name} is none that repvgg export writes")
        found.update(dict.fromkeys(new, result))
        outputs += above
    if first != "Input images 0 1 images" or counts != f"{len(lines) + 1} {outputs}":
        raise ValueError("it is none that repvgg export writes")


def _weight_bytes(path: Path) -> int:
    """Return how many bytes of weights the layers of one of our own files read."""
    floats = 0
    for kind, given in _layers(path):
        if kind.startswith("Convolution"):
            floats += 1 + int(given["6"]) + int(given["0"])
        elif kind == "InnerProduct":
            floats += 1 + int(given["2"]) + int(given["0"])
    return 4 * floats


def operators(path: Path) -> list[ListedOperator]:
    """Return the operators in order, without the inputs. Raises ValueError for a file that is not ncnn's."""
    found = []
    for kind, given in _layers(path):
        relu = "with ReLU" if given.get("9") == str(RELU) else ""
        if kind.startswith("Convolution"):
            kernel, stride = (tuple(int(given[number]) for number in numbers) for numbers in (("11", "1"), ("13", "3")))
            found.append(ListedOperator(kind, kernel, stride, int(given.get("7", 1)), relu))
        elif kind != "Input":
            found.append(ListedOperator(kind, note=relu))
    return found


def _logits(net: Any, image: Any) -> Any:
    extractor = net.create_extractor()
    extractor.input("images", ncnn.Mat(image))
    failed, logits = extractor.extract("logits")
    if failed:
        raise ValueError("ncnn cannot run this network")
    return np.array(logits)


def _stacked(logits: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(logits))
