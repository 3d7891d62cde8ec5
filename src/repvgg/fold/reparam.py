"""Fold a trained network into its deploy form, exactly, and prove it.

    deploy = reparameterize(model.eval())          # a new module; each folded part verified alone in float64
    print(deploy.fold_report)                      # what was folded, what was left and why
    print(verify(model, deploy, (3, 224, 224)))    # the whole model, against a float64 reference

`as_linear(module)` reads a module tree as one linear map. It dispatches on the *exact* type of each module: a subclass may do
something else, so it is refused until its author says what it means:

    @as_linear.register(MyBlock)
    def _(module, channels): return add(as_linear.child("a", module.a, channels), as_linear.child("b", module.b, channels))
"""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from repvgg.fold.algebra import LinearMap, Pair, ReparamError, add, batch_norm, compose, identity

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
        outputs: Iterator[Tensor] = (branch(x) for _, branch in _parts(self))  # one at a time: fewer are alive at once
        return reduce(torch.add, outputs)


class Chain(nn.Sequential):
    """Its children one after the other, as one block: it folds whole or is refused. A plain Sequential folds part by part."""


# ------------------------------------------------------------------------------------------------ modules as linear maps


class _AsLinear:
    """`as_linear(module, channels=None) -> LinearMap`: the eval-mode meaning of a module tree, in float64.

    `channels` tells modules that fit any number of channels (an identity, a pool) how many they see. Raises `ReparamError` for
    what is not linear, is in train mode, carries hooks, or holds non-finite numbers. Readers of a module that has parts use
    `as_linear.child`, so that errors name the part by its path.
    """

    def __init__(self) -> None:
        self._readers: dict[type | str, Reader] = {}

    def register(self, *types: type | str) -> Callable[[Reader], Reader]:
        """Say what modules of exactly these types mean; a type may be named "module.Class" to spare its import."""

        def remember(reader: Reader) -> Reader:
            self._readers.update(dict.fromkeys(types, reader))
            return reader

        return remember

    @property
    def types(self) -> list[type]:
        return [t for t in self._readers if isinstance(t, type)]

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
            raise ReparamError(why_unknown(module))
        if reason := altered(module):
            raise ReparamError(reason)
        _refuse_damage(module)
        return reader(module, channels)

    def child(self, name: str, module: nn.Module, channels: int | None) -> LinearMap:
        """As `read`, for the part `name` of a larger module: errors say so."""
        with inside(name):
            return self.read(module, channels)


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Errors raised here are about something within the module at `path`."""
    try:
        yield
    except ReparamError as error:
        raise error.inside(path) from None


as_linear = _AsLinear()


@as_linear.register(nn.Conv2d)
def _convolution(m: nn.Conv2d, channels: int | None) -> LinearMap:
    return conv_map(m)


def conv_map(m: nn.Conv2d) -> LinearMap:
    """A convolution's parameters and geometry as a map."""
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


NO_STATISTICS = "has no running statistics (track_running_stats=False), so its output depends on the batch"


@as_linear.register(nn.BatchNorm2d, nn.SyncBatchNorm, "torchvision.ops.misc.FrozenBatchNorm2d")
def _batch_norm(m: nn.BatchNorm2d, channels: int | None) -> LinearMap:
    if m.running_mean is None or m.running_var is None:
        raise ReparamError(NO_STATISTICS)
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


@as_linear.register(nn.Sequential, Chain)
def _sequential(m: nn.Sequential, channels: int | None) -> LinearMap:
    channels = channels or _channels_into(m)
    maps: list[LinearMap] = []
    for name, child in _parts(m):
        maps.append(as_linear.child(name, child, maps[-1].out_channels if maps else channels))
    return compose(*_on_one_device(maps)) if maps else identity(_needed(channels))


@as_linear.register(Branches)
def _branches(m: Branches, channels: int | None) -> LinearMap:
    channels = channels or _channels_into(m)
    return add(*_on_one_device([as_linear.child(name, child, channels) for name, child in _parts(m)]))


CONVOLUTIONS: set[type] = {nn.Conv2d}


def register_convolution(cls: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """Class decorator: this subclass computes what `nn.Conv2d` with the same parameters does, in another way."""
    as_linear.register(cls)(_convolution)
    CONVOLUTIONS.add(cls)
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


@torch.no_grad()
def reparameterize(model: nn.Module) -> nn.Module:
    """A new module in deploy form: every foldable block and conv+BN pair of `model` is one convolution with bias.

    Works on any module tree; what cannot be folded stays as it is. `fold_report` of the result lists both. Each folded part
    was compared with the original alone, in float64, on an input made for its channels and kernel. Children that a module names in
    its `training_only` (an auxiliary head) become None. `model` is not changed.

    Raises `ReparamError` if a module is in train mode, a block contains something that is not linear, a parameter is not
    finite, a running variance is not positive, a folded kernel does not fit the parameters' dtype, or the model is compiled.
    """
    refuse_train_mode(model)
    refuse_uncopyable(model)
    for name, parameter in model.named_parameters():
        _refuse_nonfinite(name, parameter)
    report = FoldReport()
    deployed = copy.deepcopy(model)
    for module in deployed.modules():
        for name in getattr(module, "training_only", ()):
            setattr(module, name, None)
    folded = _fold_blocks(deployed, "", report, {})
    if any(_resembles_batch_norm(m) for m in folded.modules()):
        _fold_pairs(folded, report)
    folded.fold_report = report  # type: ignore[assignment]
    return folded


def is_foldable(module: nn.Module) -> bool:
    """Whether `reparameterize` would replace this module as one block; a conv or a BN alone is already one operator."""
    if as_linear.reader(module) is None or is_batch_norm(module) or type(module) in (nn.Sequential, *CONVOLUTIONS):
        return False
    return bool(_floats(module))  # an identity or a pool has nothing to fold


def _fold_blocks(module: nn.Module, path: str, report: FoldReport, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The convolution that `module` folds into; or, if it is no block, itself with the blocks inside it folded."""
    if module in done:  # one module in two places stays one
        return done[module]
    if is_foldable(module):
        with inside(path):
            m = as_linear.read(module)
            report.errors[path] = check_part(module, m)
            done[module] = as_conv(m, like=_main_tensor(module))
        report.blocks.append(path)
        return done[module]
    if isinstance(module, Branches):
        report.left[path] = why_unknown(module)
    done[module] = module
    for name, child in _parts(module):
        module._modules[name] = _fold_blocks(child, f"{path}.{name}" if path else name, report, done)
    return module


def _fold_pairs(model: nn.Module, report: FoldReport) -> None:
    """Conv+BN that are siblings in some module's forward: the BN's only input is that conv, and the conv has no other user."""
    found = find_pairs(model)
    for conv_path, norm_path in found.pairs:
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        if reason := _unfoldable(conv, found.uses[conv_path]) or _unfoldable(norm, found.uses[norm_path]):
            report.left[norm_path] = reason
            continue
        affine, activation = split_activation(norm)
        with inside(norm_path):
            gain = as_linear.read(affine)
        with inside(conv_path):
            folded = compose(as_linear.read(conv), gain)
            report.errors[conv_path] = check_part(nn.Sequential(conv, affine), folded)
            model.set_submodule(conv_path, as_conv(folded, like=_main_tensor(conv)))
        model.set_submodule(norm_path, activation)
        report.pairs.append((conv_path, norm_path))
    refuse_lost_pairs(model, found, "folded")
    for path, module in model.named_modules():
        if _resembles_batch_norm(module):
            hidden = path in found.hidden
            reason = "its parent's forward cannot be traced" if hidden else "no convolution feeds this batch norm alone"
            report.left.setdefault(path, reason)


def _unfoldable(module: nn.Module, uses: int) -> str | None:
    """Why this conv or batch norm cannot be half of a pair, if so."""
    cls = type(module).__name__
    if reason := altered(module):
        return f"its {cls} {reason}"
    if type(module) not in CONVOLUTIONS and not is_batch_norm(module):
        return f"its {why_unknown(module)}"
    if isinstance(module, nn.Conv2d) and _pads_unevenly(module):
        return f"its {cls} {UNEVEN}"
    if is_batch_norm(module) and module.running_mean is None:
        return f"its {cls} {NO_STATISTICS}"
    return f"its {cls} is used in more than one place" if uses > 1 else None


def split_activation(norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A batch norm as its affine part and what it does after that (timm's BatchNormAct2d has an activation inside)."""
    affine = copy.deepcopy(norm)
    for name, _ in _parts(affine):
        affine._modules[name] = nn.Identity()
    return affine, _activation_of(norm) or nn.Identity().eval()


@dataclass
class Pairs:
    """Paths of every conv whose output goes to a batch norm and nowhere else, and of that batch norm."""

    pairs: list[tuple[str, str]] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)  # calls seen, or places where it is registered
    hidden: dict[str, str] = field(default_factory=dict)  # modules called by a parent whose forward cannot be traced


def find_pairs(model: nn.Module) -> Pairs:
    """Traces the forward of every module in the tree by itself, on a copy (a forward may store what it sees)."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    names = {module: path for path, module in model.named_modules()}
    found = Pairs()
    for parent, path in names.items():
        if _calls_nothing(parent):
            continue
        try:
            graph = _SiblingTracer().trace(parent, _defaults(parent))
        except Exception:
            found.hidden.update({names[child]: path for child in _called_by(parent)})
            continue
        for node in graph.nodes:
            if node.op == "get_attr" and "." in node.target:  # a child's weight used by hand counts as a call of that child
                found.uses[names[parent.get_submodule(node.target.rpartition(".")[0])]] += 1
            elif node.op == "call_module":
                module = parent.get_submodule(str(node.target))
                found.uses[names[module]] += 1
                source = node.args[0] if node.args else None
                if _resembles_batch_norm(module) and isinstance(source, fx.Node) and source.op == "call_module":
                    conv = parent.get_submodule(str(source.target))
                    if isinstance(conv, nn.Conv2d) and len(source.users) == 1:
                        found.pairs.append((names[conv], names[module]))
    found.uses |= Counter(names[child] for parent in names for _, child in _parts(parent))
    return found


def refuse_lost_pairs(model: nn.Module, found: Pairs, done: str) -> None:
    """Raise `ReparamError` naming a parent whose forward could be traced when `found` was, and now, its parts `done`, cannot."""
    if broken := set(find_pairs(model).hidden.values()) - set(found.hidden.values()):
        raise ReparamError(f"uses a {done} conv or batch norm in another way than calling its own child of that name", min(broken))


def _called_by(parent: nn.Module) -> Iterator[nn.Module]:
    """Its children, and in place of a ModuleList or ModuleDict those that it holds."""
    for _, child in _parts(parent):
        if _parts(child) and _calls_nothing(child):
            yield from _called_by(child)
        else:
            yield child


def _calls_nothing(module: nn.Module) -> bool:
    """It has no children, or no forward (a ModuleList)."""
    return not _parts(module) or type(module).forward is nn.Module.forward


class _SiblingTracer(fx.Tracer):
    """Traces one module's own forward; every module it calls is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


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
        return (
            math.isfinite(self.error.relative)  # where a's own rounding is infinite too, nothing is proved
            and self.error.relative <= max(self.bound, 3 * self.own.relative)
            and self.error.of_deviation <= max(DEVIATION_FACTOR * self.bound, 3 * self.own.of_deviation)
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
    if images < 2:
        raise ValueError(f"images is {images}: the deviation across images needs at least 2")
    for model in (a, b):
        refuse_train_mode(model)
    refuse_uncopyable(a)
    like = next(b.parameters())
    x = torch.randn(images, *input_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.to(like.dtype).to(like.device)  # rounded first, so that all see the same images
    reference = _tensors(copy.deepcopy(a).double()(x.double()))
    own = _tensors(copy.deepcopy(a).to(like.dtype)(x))
    return Verification(distance(_tensors(b(x)), reference), distance(own, reference), MODEL_BOUND[like.dtype], like.dtype)


def distance(got: list[Tensor], wanted: list[Tensor]) -> Error:
    """Of outputs from the float64 reference. Raises `ReparamError` where they differ in number or shape."""
    if [g.shape for g in got] != [w.shape for w in wanted]:
        raise ReparamError("the two models' outputs differ in number or shape")
    if not wanted:
        raise ReparamError("the models return no tensors of floating point to compare")
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


def check_part(original: nn.Module, folded: LinearMap) -> float:
    """Relative float64 error of a module in eval mode, on noise just large enough for every tap, border and a second step."""
    geometry = zip(folded.kernel_size, folded.dilation, folded.stride, folded.padding, strict=True)
    size = [d * (k - 1) + 1 + 2 * s + p for k, d, s, p in geometry]
    noise = torch.Generator().manual_seed(folded.in_channels * 31 + folded.kernel_size[0])
    x = torch.randn(2, folded.in_channels, *size, generator=noise, dtype=torch.float64).to(folded.kernel.device)
    wanted, got = copy.deepcopy(original).double()(x), folded(x)
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
        if not _is_finite(tensor):
            raise ReparamError(f"the folded {name} does not fit {like.dtype}: convert the model to float32 first")
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return conv.eval()


def conv_padding(m: nn.Conv2d) -> Pair:
    """Padding of a convolution as two numbers of pixels, "same" and "valid" resolved."""
    if m.padding == "valid":
        return 0, 0
    if _pads_unevenly(m):
        raise ReparamError(UNEVEN)
    if m.padding == "same":
        rows, columns = (d * (k - 1) // 2 for k, d in zip(_two(m.kernel_size), _two(m.dilation), strict=True))
        return rows, columns
    return _two(m.padding)


UNEVEN = 'with padding="same" and an even kernel pads one side more than the other'


def _pads_unevenly(m: nn.Conv2d) -> bool:
    return m.padding == "same" and any(d * (k - 1) % 2 for k, d in zip(m.kernel_size, m.dilation, strict=True))


def _two(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def is_batch_norm(module: nn.Module) -> bool:
    """Of a type whose affine part we know; a stranger's subclass is not."""
    return as_linear.reader(module) in (_batch_norm, _batch_norm_act)


def _resembles_batch_norm(module: nn.Module) -> bool:
    return is_batch_norm(module) or isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))


def _activation_of(norm: nn.Module) -> nn.Module | None:
    """What timm's BatchNormAct2d does after its batch norm, if anything."""
    after = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    return nn.Sequential(*after).eval() if len(after) > 1 else after[0] if after else None


def altered(module: nn.Module) -> str | None:
    """Why this object may do something else than its type says."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "carries forward hooks (old-style spectral_norm is one), which folding would lose: remove them first"
    return REPLACED if "forward" in vars(module) else None


REPLACED = "has a forward of its own in place of its class's (torch.compile does so): fold the plain module, then compile that"


def refuse_uncopyable(model: nn.Module) -> None:
    """What a deep copy would tie to the original, or cannot copy at all."""
    for path, module in model.named_modules():
        if "forward" in vars(module):
            raise ReparamError(REPLACED, path or type(module).__name__)
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ReparamError(
                    f"`{name}` is the result of a computation, so the module cannot be copied: remove old-style weight_norm or "
                    "spectral_norm, or run it under torch.no_grad()",
                    path or type(module).__name__,
                )


def _refuse_damage(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        _refuse_nonfinite(name, tensor)


def _refuse_nonfinite(path: str, tensor: Tensor) -> None:
    if not _is_finite(tensor):
        raise ReparamError("holds NaN or Inf: the checkpoint is damaged, or training diverged", path)


def _is_finite(tensor: Tensor) -> bool:
    """No NaN, no Inf; by the extremes, which takes a twentieth of the time that looking at each element does."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def why_unknown(module: nn.Module) -> str:
    cls = type(module).__name__
    if hasattr(module, "parametrizations"):
        return f"{cls} is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    known = next((t for t in as_linear.types if isinstance(module, t)), None)
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
        if is_batch_norm(m):
            return int(m.running_mean.numel()) if m.running_mean is not None else None  # type: ignore[operator]
    return None


def _on_one_device(maps: list[LinearMap]) -> list[LinearMap]:
    """An identity or a pool has no tensors to say where it lives: put it where the others are."""
    device = next((m.kernel.device for m in maps if m.kernel.device.type != "cpu"), torch.device("cpu"))
    return [replace(m, kernel=m.kernel.to(device), bias=m.bias.to(device)) for m in maps]


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children by name, one that is there twice included."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _floats(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def _main_tensor(module: nn.Module) -> Tensor:
    """Its largest kernel: what has the dtype, device and memory format that the module is in."""
    return max(_floats(module), key=lambda t: (t.dim() == 4, t.numel()))


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def _ratio(error: float, size: float) -> float:
    if error != error:
        return float("inf")
    return error / size if size else (0.0 if error == 0 else float("inf"))
