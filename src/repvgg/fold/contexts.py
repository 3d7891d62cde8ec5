"""Notice which contexts a forward works under (autocast, no_grad, ...): a graph of it does not show them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CONTEXTS: tuple[Any, ...] = (torch.autocast, torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)


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
