"""Notice what fx does not: contexts that a forward works under (autocast, no_grad, ...), and tensors made by sizes of others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repvgg.fold.values import ValueOf

CONTEXTS: tuple[Any, ...] = (torch.autocast, torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)


def memory(tensor: torch.Tensor) -> int:
    """Return what tells the memory of a tensor from any other; a view has that of the whole."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse one has none
        return id(tensor)


class WatchedTensors(TorchDispatchMode):
    """Call `check` with the tensors that anything is computed of, before it is: in a trace few are at hand."""

    def __init__(self, check: Callable[[list[torch.Tensor]], None]) -> None:
        super().__init__()
        self.check = check

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.check([t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)])
        return func(*args, **(kwargs or {}))


def _followed(name: str) -> Callable[..., Any]:
    """Return a function of `torch` that gives a value of a trace where a value of a trace is among its arguments."""
    make = getattr(torch, name)

    def made(*args: Any, **kwargs: Any) -> Any:
        value = next((v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if issubclass(type(v), ValueOf)), None)
        return make(*args, **kwargs) if value is None else value.tracer.create_proxy("call_function", made, args, kwargs)

    made.__name__, made.__module__ = name, "torch"  # as which a graph writes it
    return made


# They take numbers, so fx does not see that a value of a trace (a size of an image) is among them.
FACTORIES = {
    name: _followed(name)
    for name in ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
}


@contextmanager
def watched_factories() -> Iterator[None]:
    """Let traces follow tensors whose sizes are values, as long as this lasts."""
    plain = {name: getattr(torch, name) for name in FACTORIES}
    try:
        for name, followed in FACTORIES.items():
            setattr(torch, name, followed)
        yield
    finally:
        for name, make in plain.items():
            setattr(torch, name, make)


@contextmanager
def watched_contexts(note: Callable[[str], object]) -> Iterator[None]:
    """Call `note` with the name of each such context that is entered, by `with` or as a decorator, as long as this lasts."""
    plain = {cls: cls.__enter__ for cls in CONTEXTS}

    def noting(cls: Any, enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def noted(self: Any) -> Any:
            note(f"torch.{cls.__name__}")
            return enter(self)

        return noted

    made = torch.autocast.__init__

    def make(self: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        made(self, device_type if type(device_type) is str else "cpu", *args, **kwargs)  # a trace does not know `x.device.type`

    for cls, enter in plain.items():
        cls.__enter__ = noting(cls, enter)
    torch.autocast.__init__ = make  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = made  # type: ignore[method-assign]
        for cls, enter in plain.items():
            cls.__enter__ = enter
