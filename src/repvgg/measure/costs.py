"""The costs of a network, counted without running it.

    print(cost(model, input_size=(3, 224, 224)))
    for layer in cost(model).layers: print(layer.path, layer.operator, layer.output_shape, layer.macs)

The model is copied to PyTorch's meta device, where tensors have shapes but no data, and run once in eval mode; every operator that
PyTorch would execute is recorded. So branches, functional calls and grouped convolutions all count, in any module tree.

Sources: RepVGG (CVPR 2021), section 3.1 (memory, fragmented operators), Figure 3, Tables 4 and 5 (FLOPs, Wino MULs).
"""

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repvgg.disk import in_a_line
from repvgg.fold.guards import copied, refuse_train_mode

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerCost:
    """One executed operator, for one image.

    path: the innermost module that ran it ("" is the model itself); operator: its aten name ("convolution", "relu", "add").
    params: elements of the parameters it reads, given to the first operator that reads them.
    macs, winograd_muls, bytes_moved: see `Cost`. working_bytes, kept_bytes: of activations, while it runs and after it.
    """

    path: str
    operator: str
    output_shape: tuple[int, ...]
    params: int
    macs: int
    winograd_muls: int
    bytes_moved: int
    working_bytes: int
    kept_bytes: int

    @property
    def fragment(self) -> bool:
        """A convolution, a matrix product or a pooling: what section 3.1 counts as an operator of a block."""
        return self.macs > 0 or "pool" in self.operator or self.operator == "mean"


@dataclass(frozen=True)
class Cost:
    """The costs of one image to a model in eval mode, as PyTorch runs it.

    params: elements of all parameters, shared ones once; buffers (running statistics) are none.
    layers: one record per executed operator, in order. Views (reshapes, slices), which move nothing, are no operators.
    peak_activation_bytes: the most that must be kept *between* two operators, each tensor let go after its last use, weights not
        counted. This is Figure 3: for feature maps of one size, a residual block keeps 2x its input, a plain layer 1x.
    peak_working_bytes: the most that exists *while* an operator runs, its output beside what is kept: what a runtime without
        in-place operators must find room for. In Figure 3's setting 3x and 2x.
    """

    params: int
    layers: tuple[LayerCost, ...]
    peak_activation_bytes: int
    peak_working_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-adds, each counted once, of convolutions and matrix products: the paper's "FLOPs".

        Padding counts as if it were data. Biases, batch norms, activations and poolings do not count, as in the paper.
        """
        return sum(layer.macs for layer in self.layers)

    @property
    def winograd_muls(self) -> int:
        """Multiplications with Winograd F(2x2, 3x3): 4/9 of the MACs of a 3x3 convolution of stride and dilation 1, grouped or not;
        all other MACs in full."""
        return sum(layer.winograd_muls for layer in self.layers)

    @property
    def bytes_moved(self) -> int:
        """The memory access cost of section 3.1: every tensor that an operator reads (weights, biases and statistics too) or
        writes, in its own dtype, as if nothing stayed in a cache and no two operators were fused.

        Of a view its elements count, not what it looks into. Outputs that nothing reads (a max pool's indices) do not count.
        """
        return sum(layer.bytes_moved for layer in self.layers)

    @property
    def operators(self) -> int:
        """Executed operators, activations and additions included."""
        return len(self.layers)

    @property
    def fragments(self) -> int:
        """Convolutions, matrix products and poolings. Of one block, this is the paper's number of fragmented operators: 13 in
        NASNet-A, 2 or 3 in a ResNet, 1 in a RepVGG."""
        return sum(layer.fragment for layer in self.layers)

    def inside(self, path: str) -> tuple[LayerCost, ...]:
        """Return the records of the module at `path` ("stages.0") and of all within it."""
        return tuple(layer for layer in self.layers if not path or f"{layer.path}.".startswith(f"{path}."))

    def __str__(self) -> str:
        return "\n".join(
            (
                f"parameters        {self.params / 1e6:10.2f} M",
                f"MACs              {self.macs / 1e9:10.2f} G   multiply-adds counted once",
                f"Winograd MULs     {self.winograd_muls / 1e9:10.2f} G   F(2x2, 3x3)",
                f"bytes moved       {self.bytes_moved / 1e6:10.2f} MB",
                f"peak activations  {self.peak_activation_bytes / 1e6:10.2f} MB  kept between operators",
                f"                  {self.peak_working_bytes / 1e6:10.2f} MB  while one runs",
                f"operators         {self.operators:10d}     {self.fragments} of them convolutions, matrix products and poolings",
            )
        )


def cost(model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224)) -> Cost:
    """Count what one input of `input_size` (channels, height, width) costs `model`, in eval mode whatever mode it is in.

    `model` may be in either form, on any device, in any precision; it is not changed, and nothing is computed. Raises `ValueError`
    if its forward does not run on an input of this size, or needs the data and not only the shapes.
    """
    twin = _on_meta(model)
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    trace = _Trace(twin)
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"):
        try:
            image = torch.empty(1, *input_size, dtype=dtype)
            with trace:
                outputs = twin(image)
        except Exception as error:
            where, reason = trace.path or type(model).__name__, in_a_line(error)
            raise ValueError(f"the model does not run on one input of size {tuple(input_size)}: in {where}: {reason}") from error
    return _count(twin, trace.steps, image, _tensors(outputs))


SUMS = {operator.add, operator.iadd, torch.add, torch.cat, "add", "add_"}


def num_paths(model: nn.Module) -> int:
    """Count the ways from input to output, each branch and shortcut being one: a network as an ensemble (section 4.2).

    `num_paths(model.stages[2])` is the paper's 2 x 3^15 in stage 4 of B0, and 2^8 in that of its residual reorganisation. Ways
    part and meet at additions and concatenations; a product (a gate) is no meeting. Raises ValueError for a network that torch.fx
    cannot trace.
    """
    try:
        graph = fx.Tracer().trace(copied(model))  # fx leaves constants on what it traces
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be traced, so its paths cannot be counted: {error}") from error
    paths: dict[fx.Node, int] = {}
    for node in graph.nodes:
        incoming = [paths[n] for n in tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node)]
        meet = sum if node.target in SUMS else max
        paths[node] = int(node.op == "placeholder") if not incoming else meet(incoming)
    return paths[next(n for n in graph.nodes if n.op == "output")]


def measure_peak_activation(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of activations that `model(x)` holds at its peak, for the whole batch `x`, without weights and buffers.

    `x` is included, because its caller holds it throughout. CUDA: the allocator's peak, with convolution workspaces and its
    rounding to 512 bytes. Elsewhere: the tensors alive after each operator, without what an operator uses inside. Either may be
    above `peak_working_bytes` per image: Python lets go of a tensor only when the frame that names it moves on.

    Raises `ReparamError` if a module is in train mode.
    """
    refuse_train_mode(model)
    with torch.inference_mode(False), torch.no_grad():
        if x.is_cuda:
            return _allocator_peak(model, x)
        lifetimes = _Lifetimes(model, x)
        with lifetimes:
            model(x)
        return lifetimes.peak


# ------------------------------------------------------------------------------------------------------------ tracing


@dataclass(frozen=True)
class _Step:
    """One executed operator; holding its tensors keeps their storages apart (meta tensors hold no memory)."""

    path: str
    func: torch._ops.OpOverload
    reads: list[Tensor]
    writes: list[Tensor]
    macs: int
    winograd_muls: int


class _Trace(TorchDispatchMode):
    """Records every operator that runs, with the path of the module that ran it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._inside = [""]
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, path=path: self._inside.append(path))
            module.register_forward_hook(self._leave)

    @property
    def path(self) -> str:
        """The path of the module that is running, or that failed."""
        return self._inside[-1]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        reads, writes = _tensors((args, kwargs)), _tensors(out)
        is_view = not func._schema.is_mutable and {_storage(t) for t in writes} <= {_storage(t) for t in reads}
        if not is_view:
            macs, winograd_muls = _multiplications(func.overloadpacket, args, out)
            self.steps.append(_Step(self.path, func, reads, writes, macs, winograd_muls))
        return out


def _multiplications(operator: Any, args: Any, out: Any) -> tuple[int, int]:
    """MACs, and how many multiplications remain of them with Winograd."""
    if operator is aten.convolution:
        image, weight, _, stride, _, dilation, transposed = args[:7]
        macs = (image if transposed else out).numel() * weight[0].numel()
        winograd = not transposed and weight.shape[2:] == (3, 3) and set(stride) == set(dilation) == {1}
        return macs, macs // 9 * 4 if winograd else macs
    if operator in _PRODUCTS:
        a, b = args[_PRODUCTS[operator] :][:2]
        macs = a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
        return macs, macs
    return 0, 0


# Matrix products, and the position of their first factor.
_PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.dot: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the meta device, made without copying the weights."""
    memo: dict[int, Any] = {}
    with torch.inference_mode(False):
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(tensor, Tensor):
                    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                    memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        return copy.deepcopy(model, memo).eval()


# ----------------------------------------------------------------------------------------------------------- counting


def _count(model: nn.Module, steps: list[_Step], image: Tensor, outputs: list[Tensor]) -> Cost:
    last_use = {_storage(t): i for i, step in enumerate(steps) for t in step.reads}
    last_use |= {_storage(t): len(steps) for t in outputs}
    unread = {_storage(p): p.numel() for p in model.parameters()}
    layers = []
    alive = _alive(model, steps, image, last_use)
    for step, (working, kept) in zip(steps, alive, strict=True):
        writes = [t for t in step.writes if _storage(t) in last_use]
        moved = sum(_bytes(t) for t in (*step.reads, *writes))
        if moved:
            params = sum(unread.pop(_storage(t), 0) for t in step.reads)
            name = step.func.overloadpacket.__name__
            shape = tuple(step.writes[0].shape) if step.writes else ()
            layers.append(LayerCost(step.path, name, shape, params, step.macs, step.winograd_muls, moved, working, kept))
    peak_working, peak_kept = (max([_bytes(image), *(step[i] for step in alive)]) for i in (0, 1))
    return Cost(sum(p.numel() for p in model.parameters()), tuple(layers), peak_kept, peak_working)


def _alive(model: nn.Module, steps: list[_Step], image: Tensor, last_use: dict[int, int]) -> list[tuple[int, int]]:
    """Bytes of activations alive while each step runs, and after it."""
    seen = {_storage(t) for t in (*model.parameters(), *model.buffers(), image)}
    let_go = [0] * (len(steps) + 1)
    let_go[last_use.get(_storage(image), 0)] += _bytes(image)
    now, alive = _bytes(image), []
    for i, step in enumerate(steps):
        for t in step.writes:
            if _storage(t) in last_use and _storage(t) not in seen:
                seen.add(_storage(t))
                size = t.untyped_storage().nbytes()
                now += size
                let_go[last_use[_storage(t)]] += size
        alive.append((now, now - let_go[i]))
        now -= let_go[i]
    return alive


def _storage(t: Tensor) -> int:
    """Names the memory behind `t`, which its views share."""
    address: int = t.untyped_storage()._cdata
    return address


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---------------------------------------------------------------------------------------------------------- measuring


class _Lifetimes(TorchDispatchMode):
    """Adds up, after each operator of a real run, the memory of all tensors that are still referenced."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self._weights = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._note([x])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._note(_tensors(out))
        return out

    def _note(self, tensors: list[Tensor]) -> None:
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        for storage in (t.untyped_storage() for t in tensors):
            if storage._cdata not in self._weights:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def _allocator_peak(model: nn.Module, x: Tensor) -> int:
    model(x)  # libraries take their lasting workspaces in the first run
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    model(x)
    torch.cuda.synchronize(x.device)
    peak: int = torch.cuda.max_memory_allocated(x.device)
    return peak - before + _bytes(x)
