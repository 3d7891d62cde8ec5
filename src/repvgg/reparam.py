"""Fold a trained network into its deploy form, exactly, and prove it.

    deploy = reparameterize(model.eval())          # a new module; each folded part verified alone in float64
    print(deploy.fold_report)                      # what was folded, what was left and why
    print(verify(model, deploy, (3, 224, 224)))    # the whole model, against a float64 reference

`as_linear(module)` reads a module tree as one linear map. It dispatches on the *exact* type of each module: a subclass may do
something else, so it is refused until its author says what it means:

    @as_linear.register(MyBlock)
    def _(module, channels): return add(as_linear(module.a), as_linear(module.b))
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repvgg.algebra import LinearMap, Pair, ReparamError, add, batch_norm, compose, identity

Reader = Callable[[Any, int | None], LinearMap]

PART_BOUND = 1e-10  # relative error of one folded part in float64; rounding alone is some 1e-15
# Relative error of a whole model against float64, by the precision of its parameters.
MODEL_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same error measured against the deviation of the outputs across images, which a constant output cannot hide in.
DEVIATION_FACTOR = 100


class Branches(nn.Module):
    """The sum of its children, all applied to the same input (equation 1). Folds if each of them does."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.children())  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ modules as linear maps


class _AsLinear:
    """`as_linear(module, channels=None) -> LinearMap`: the eval-mode meaning of a module tree, in float64.

    `channels` tells modules that fit any number of channels (an identity, a pool) how many they see. Raises `ReparamError` for
    what is not linear, is in train mode, carries hooks, or holds non-finite numbers.
    """

    def __init__(self) -> None:
        self._readers: dict[type | str, Reader] = {}

    def register(self, *types: type | str) -> Callable[[Reader], Reader]:
        """Say what modules of exactly these types mean; a type may be named "module.Class" to spare its import."""

        def remember(reader: Reader) -> Reader:
            self._readers.update(dict.fromkeys(types, reader))
            return reader

        return remember

    def reader(self, module: nn.Module) -> Reader | None:
        cls = type(module)
        return self._readers.get(cls) or self._readers.get(f"{cls.__module__}.{cls.__qualname__}")

    def __call__(self, module: nn.Module, channels: int | None = None) -> LinearMap:
        refuse_train_mode(module)
        return self.read(module, channels)

    def read(self, module: nn.Module, channels: int | None = None) -> LinearMap:
        """As `as_linear`, at the running statistics even in train mode."""
        reader = self.reader(module)
        if reader is None:
            raise ReparamError(_why_unknown(module))
        _refuse_damage(module)
        return reader(module, channels)

    def child(self, name: str, module: nn.Module, channels: int | None) -> LinearMap:
        try:
            return self.read(module, channels)
        except ReparamError as error:
            raise error.inside(name) from None


as_linear = _AsLinear()


@as_linear.register(nn.Conv2d)
def _convolution(m: nn.Conv2d, channels: int | None) -> LinearMap:
    bias = m.weight.new_zeros(m.out_channels) if m.bias is None else m.bias
    return LinearMap(
        m.weight.double(),
        bias.double(),
        _two(m.stride),
        conv_padding(m),
        _two(m.dilation),
        m.groups,
        m.padding_mode,
    )


@as_linear.register(nn.BatchNorm2d, nn.SyncBatchNorm, "torchvision.ops.misc.FrozenBatchNorm2d")
def _batch_norm(m: nn.BatchNorm2d, channels: int | None) -> LinearMap:
    if m.running_mean is None or m.running_var is None:
        raise ReparamError("has no running statistics (track_running_stats=False), so its output depends on the batch")
    if bool((m.running_var <= 0).any()):
        channel = int((m.running_var <= 0).nonzero()[0])
        raise ReparamError(
            f"is {float(m.running_var[channel]):g} in channel {channel}; a variance is positive. The checkpoint is damaged or "
            "the channel was constant throughout training: re-estimate the statistics, or set that entry by hand",
            "running_var",
        )
    return batch_norm(m.running_mean, m.running_var, m.eps, m.weight, m.bias)


@as_linear.register("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
def _batch_norm_act(m: nn.BatchNorm2d, channels: int | None) -> LinearMap:
    if _activation_of(m) is not None:
        raise ReparamError("has an activation inside, which is not linear: move it out of the block")
    return _batch_norm(m, channels)


@as_linear.register(nn.Identity, nn.Dropout, nn.Dropout2d)
def _identity(m: nn.Module, channels: int | None) -> LinearMap:
    return identity(_needed(channels))


@as_linear.register(nn.AvgPool2d)
def _average_pool(m: nn.AvgPool2d, channels: int | None) -> LinearMap:
    size = _two(m.kernel_size)
    padding = _two(m.padding)
    if m.ceil_mode or (any(padding) and not m.count_include_pad):
        raise ReparamError("with ceil_mode, or padding that is not counted, is not one linear map at the border")
    c = _needed(channels)
    kernel = torch.full((c, 1, *size), 1 / (m.divisor_override or size[0] * size[1]), dtype=torch.float64)
    return LinearMap(kernel, kernel.new_zeros(c), _two(m.stride), padding, groups=c)


@as_linear.register(nn.Sequential)
def _sequential(m: nn.Sequential, channels: int | None) -> LinearMap:
    if not len(m):
        return identity(_needed(channels))
    maps: list[LinearMap] = []
    for name, child in m.named_children():
        maps.append(as_linear.child(name, child, maps[-1].out_channels if maps else (channels or _channels_into(m))))
    return compose(*_on_one_device(maps))


@as_linear.register(Branches)
def _branches(m: Branches, channels: int | None) -> LinearMap:
    channels = channels or _channels_into(m)
    return add(*_on_one_device([as_linear.child(name, child, channels) for name, child in m.named_children()]))


# Types that fold only together with a neighbour: alone they are already one operator, or none.
_ATOMS: set[type] = {nn.Conv2d, nn.Identity, nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.Sequential}
_CONVOLUTIONS: set[type] = {nn.Conv2d}


def register_convolution(cls: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """Class decorator: this subclass computes what `nn.Conv2d` with the same parameters does, in another way."""
    as_linear.register(cls)(_convolution)
    _ATOMS.add(cls)
    _CONVOLUTIONS.add(cls)
    return cls


def equivalent_kernel(block: nn.Module) -> tuple[Tensor, Tensor]:
    """Kernel [out, in / groups, kh, kw] and bias [out] of a block, float64, differentiable with respect to its parameters.

    Batch norms count at their running statistics, in train mode too, so that a loss may be put on the folded kernel.
    """
    m = as_linear.read(block)
    return m.kernel, m.bias


# ----------------------------------------------------------------------------------------------------------- whole models


@dataclass
class FoldReport:
    """What `reparameterize` did: module paths folded (with the largest float64 error of their own checks), and left."""

    blocks: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = max(self.errors.values(), default=0.0)
        lines = [f"folded {len(self.blocks)} blocks and {len(self.pairs)} conv+BN pairs; largest error of a part {worst:.1e}"]
        lines += [f"left {path}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)


def reparameterize(model: nn.Module) -> nn.Module:
    """A new module in deploy form: every foldable block and conv+BN pair of `model` is one convolution with bias.

    Works on any module tree; what cannot be folded stays as it is. `fold_report` of the result lists both. Each folded part
    was compared with the original alone, in float64, on an input made for its channels and kernel. `model` is not changed.

    Raises `ReparamError` if a module is in train mode, a block contains something that is not linear, a parameter is not
    finite, a running variance is not positive, or a folded kernel does not fit the parameters' dtype.
    """
    refuse_train_mode(model)
    root = nn.ModuleDict({"model": copy.deepcopy(model)})  # so that the model itself can be replaced
    report = FoldReport()
    _fold_blocks(root, "", report, {})
    _fold_pairs(root["model"], report)
    folded = root["model"]
    folded.fold_report = report  # type: ignore[assignment]
    return folded


def is_foldable(module: nn.Module) -> bool:
    """Whether `reparameterize` would replace this module as one block."""
    return type(module) not in _ATOMS and as_linear.reader(module) is not None and not _is_batch_norm(module)


def _fold_blocks(parent: nn.Module, path: str, report: FoldReport, done: dict[nn.Module, nn.Module]) -> None:
    for name, child in list(parent._modules.items()):
        if child is None:
            continue
        child_path = f"{path}.{name}" if path else name
        if is_foldable(child) and child not in done:
            try:
                m = as_linear.read(child)
                report.errors[child_path] = _check_part(child, m)
                done[child] = as_conv(m, like=next(child.parameters()))
            except ReparamError as error:
                raise error.inside(child_path.removeprefix("model").removeprefix(".")) from None
            report.blocks.append(child_path.removeprefix("model").removeprefix("."))
        if child in done:
            setattr(parent, name, done[child])
        else:
            _fold_blocks(child, child_path, report, done)


def _fold_pairs(model: nn.Module, report: FoldReport) -> None:
    """Conv+BN that are siblings in some module's forward: the BN's only input is that conv, and the conv has no other user."""
    names = {id(m): n for n, m in model.named_modules()}
    pairs, calls, untraceable = _calls(model)
    for conv, norm in pairs:
        conv_path, norm_path = names[id(conv)], names[id(norm)]
        if reason := _unfoldable_pair(conv, norm, calls):
            report.left[norm_path] = reason
            continue
        try:
            _refuse_damage(norm)
            affine = _batch_norm(norm, None)  # type: ignore[arg-type]
        except ReparamError as error:
            raise error.inside(norm_path) from None
        parts = as_linear.child(conv_path, conv, None), affine
        folded = compose(*parts)
        report.errors[conv_path] = _check_pair(conv, parts, folded, conv_path)
        for path, new in (
            (conv_path, as_conv(folded, like=conv.weight)),
            (norm_path, _activation_of(norm) or nn.Identity().eval()),
        ):
            _replace_everywhere(model, path, new)
        report.pairs.append((conv_path, norm_path))
    for path, module in model.named_modules():
        if _is_batch_norm(module) and path not in report.left:
            parent = path.rpartition(".")[0]
            report.left[path] = untraceable.get(parent, "no convolution feeds this batch norm alone")


def _calls(model: nn.Module) -> tuple[list[tuple[nn.Conv2d, nn.Module]], Counter[int], dict[str, str]]:
    """Every conv whose output goes to a batch norm alone, how often each module is called, and what resists tracing."""
    pairs: list[tuple[nn.Conv2d, nn.Module]] = []
    calls: Counter[int] = Counter()
    untraceable: dict[str, str] = {}
    for path, parent in model.named_modules():
        if not any(_is_batch_norm(m) for m in parent.modules() if m is not parent):
            continue
        try:
            graph = _SiblingTracer().trace(parent, _defaults(parent))
        except Exception as error:
            untraceable[path] = f"its parent's forward cannot be traced ({type(error).__name__})"
            continue
        for node in graph.nodes:
            if node.op == "get_attr":  # a weight used by hand counts as a call of its owner
                calls[id(_owner(parent, str(node.target)))] += 1
            elif node.op == "call_module":
                module = parent.get_submodule(str(node.target))
                calls[id(module)] += 1
                source = node.args[0] if node.args else None
                if _is_batch_norm(module) and isinstance(source, fx.Node) and source.op == "call_module":
                    conv = parent.get_submodule(str(source.target))
                    if isinstance(conv, nn.Conv2d) and len(source.users) == 1:
                        pairs.append((conv, module))
    return pairs, calls, untraceable


class _SiblingTracer(fx.Tracer):
    """Traces one module's own forward; every module it calls is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _unfoldable_pair(conv: nn.Conv2d, norm: nn.Module, calls: Counter[int]) -> str | None:
    for module in (conv, norm):
        if calls[id(module)] > 1:
            return f"its {type(module).__name__} is used more than once"
        if _has_hooks(module):
            return f"its {type(module).__name__} {HOOKS}"
    if type(conv) not in _CONVOLUTIONS:
        return f"its {_why_unknown(conv)}"
    if not _is_batch_norm(norm):
        return _why_unknown(norm)
    return None


# ------------------------------------------------------------------------------------------------------------------ proofs


@dataclass(frozen=True)
class Error:
    """Distance of outputs from the float64 reference: the largest, relative to the largest output; and relative to the outputs'
    mean standard deviation across images, because a net whose outputs hardly depend on its input looks perfect by the first."""

    relative: float
    of_deviation: float


@dataclass(frozen=True)
class Verification:
    """How well `b` stands for `a`. Both errors are against `a` in float64; `bound` holds for the relative one, a hundred times
    it for the other. `a`'s own rounding in the same precision is measured too: `b` may always be three times as far off."""

    error: Error
    own: Error
    bound: float
    dtype: torch.dtype

    @property
    def max_rel_err(self) -> float:
        return self.error.relative

    @property
    def ok(self) -> bool:
        return self.error.relative <= max(self.bound, 3 * self.own.relative) and (
            self.error.of_deviation <= max(DEVIATION_FACTOR * self.bound, 3 * self.own.of_deviation)
        )

    def __str__(self) -> str:
        return (
            f"{'equal' if self.ok else 'NOT EQUAL'} in {str(self.dtype).removeprefix('torch.')}: relative error "
            f"{self.error.relative:.1e} (bound {self.bound:.0e}; the original's own rounding {self.own.relative:.1e}), "
            f"{self.error.of_deviation:.1e} of the deviation across images (own {self.own.of_deviation:.1e})"
        )


@torch.no_grad()
def verify(a: nn.Module, b: nn.Module, input_size: tuple[int, int, int], images: int = 4, seed: int = 0) -> Verification:
    """Compare two models on random images [images, *input_size]: `b` in its own precision against `a` in float64.

    Both must be in eval mode (`ReparamError` otherwise) and on one device. Outputs may be tensors or trees of tensors.
    """
    for model in (a, b):
        refuse_train_mode(model)
    like = next(b.parameters())
    x = torch.randn(images, *input_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.to(like.dtype).to(like.device)  # rounded first, so that all see the same images
    reference = _tensors(copy.deepcopy(a).double()(x.double()))
    own = _tensors(copy.deepcopy(a).to(like.dtype)(x))
    return Verification(_error(_tensors(b(x)), reference), _error(own, reference), MODEL_BOUND[like.dtype], like.dtype)


def _error(got: list[Tensor], wanted: list[Tensor]) -> Error:
    if [g.shape for g in got] != [w.shape for w in wanted]:
        raise ReparamError("the two models' outputs differ in number or shape")
    off = [float((g.double() - w).abs().max()) for g, w in zip(got, wanted, strict=True)]
    size = [float(w.abs().max()) for w in wanted]
    deviation = [float(w.std(dim=0).mean()) for w in wanted]
    return Error(max(map(_ratio, off, size)), max(map(_ratio, off, deviation)))


def refuse_train_mode(model: nn.Module) -> None:
    """Raise `ReparamError` naming the first module in train mode: batch statistics make the fold silently wrong."""
    for name, module in model.named_modules():
        if module.training:
            raise ReparamError(
                "is in train mode, where batch norm depends on the batch: call .eval() first",
                name or type(module).__name__,
            )


@torch.no_grad()
def _check_part(module: nn.Module, m: LinearMap) -> float:
    return _compare(lambda x: copy.deepcopy(module).double()(x), m, m)


@torch.no_grad()
def _check_pair(conv: nn.Conv2d, parts: tuple[LinearMap, LinearMap], folded: LinearMap, path: str) -> float:
    try:
        return _compare(lambda x: parts[1](copy.deepcopy(conv).double()(x)), folded, parts[0])
    except ReparamError as error:
        raise error.inside(path) from None


def _compare(original: Callable[[Tensor], Tensor], folded: LinearMap, m: LinearMap) -> float:
    """Relative float64 error on noise just large enough to reach every tap, every border and a second stride step."""
    size = [d * (k - 1) + 1 + 2 * s for k, d, s in zip(m.kernel_size, m.dilation, m.stride, strict=True)]
    noise = torch.Generator().manual_seed(m.in_channels * 31 + m.kernel_size[0])
    x = torch.randn(2, m.in_channels, *size, generator=noise, dtype=torch.float64).to(m.kernel.device)
    wanted, got = original(x), folded(x)
    error = _ratio(float((got - wanted).abs().max()), float(wanted.abs().max())) if wanted.shape == got.shape else float("inf")
    if error > PART_BOUND:
        raise ReparamError(f"its folded form differs by {error:.1e} (bound {PART_BOUND:.0e}); please report this")
    return error


# ----------------------------------------------------------------------------------------------------------------- helpers


def as_conv(m: LinearMap, like: Tensor) -> nn.Conv2d:
    """The map as a convolution with bias, in eval mode, in the dtype, device and memory format of `like`."""
    conv: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d,
        m.in_channels,
        m.out_channels,
        m.kernel_size,
        stride=m.stride,
        padding=m.padding,
        dilation=m.dilation,
        groups=m.groups,
        padding_mode=m.padding_mode,
        device=like.device,
        dtype=like.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(m.kernel)
        assert conv.bias is not None
        conv.bias.copy_(m.bias)
    for name, tensor in conv.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ReparamError(f"the folded {name} does not fit {like.dtype}: convert the model to float32 first")
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return conv.eval()


def conv_padding(m: nn.Conv2d) -> Pair:
    """Padding of a convolution as two numbers of pixels, "same" and "valid" resolved."""
    if m.padding == "valid":
        return 0, 0
    if m.padding == "same":
        total = [d * (k - 1) for k, d in zip(_two(m.kernel_size), _two(m.dilation), strict=True)]
        if any(t % 2 for t in total):
            raise ReparamError('with padding="same" and an even kernel pads one side more than the other')
        return total[0] // 2, total[1] // 2
    return _two(m.padding)


def _two(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _is_batch_norm(module: nn.Module) -> bool:
    """Of a type whose affine part we know; a stranger's subclass is not."""
    return as_linear.reader(module) in (_batch_norm, _batch_norm_act)


def _activation_of(norm: nn.Module) -> nn.Module | None:
    """What timm's BatchNormAct2d does after its batch norm, if anything."""
    after = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    return nn.Sequential(*after).eval() if len(after) > 1 else after[0] if after else None


HOOKS = "carries forward hooks (old-style weight_norm is one), which folding would lose: remove them first"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _refuse_damage(module: nn.Module) -> None:
    if _has_hooks(module):
        raise ReparamError(HOOKS)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ReparamError("holds NaN or Inf: the checkpoint is damaged, or training diverged", name)


def _why_unknown(module: nn.Module) -> str:
    cls = type(module).__name__
    if hasattr(module, "parametrizations"):
        return f"{cls} is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    known = next((t for t in (*_ATOMS, nn.BatchNorm2d) if isinstance(module, t)), None)
    if known is not None:
        return f"{cls} is a subclass of {known.__name__} and may compute something else: as_linear.register says what"
    return f"{cls} is not known to be linear: move it out of the block, or say what it means with as_linear.register"


def _needed(channels: int | None) -> int:
    if channels is None:
        raise ReparamError("fits any number of channels: pass as_linear(module, channels)")
    return channels


def _channels_into(module: nn.Module) -> int | None:
    """Input channels of the first module inside that fixes them."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            return m.in_channels
        if _is_batch_norm(m):
            return int(m.running_mean.numel()) if m.running_mean is not None else None  # type: ignore[operator]
    return None


def _on_one_device(maps: list[LinearMap]) -> list[LinearMap]:
    """An identity or a pool has no tensors to say where it lives: put it where the others are."""
    device = next((m.kernel.device for m in maps if m.kernel.device.type != "cpu"), torch.device("cpu"))
    return [replace(m, kernel=m.kernel.to(device), bias=m.bias.to(device)) for m in maps]


def _replace_everywhere(model: nn.Module, path: str, new: nn.Module) -> None:
    old = model.get_submodule(path)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def _owner(parent: nn.Module, tensor_path: str) -> nn.Module:
    return parent.get_submodule(tensor_path.rpartition(".")[0])


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _ratio(error: float, size: float) -> float:
    if error != error:
        return float("inf")
    return error / size if size else (0.0 if error == 0 else float("inf"))
