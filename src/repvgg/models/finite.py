"""A network's output, refused where it is NaN or infinite: numbers that are no numbers are not predictions."""

import torch
from torch import Tensor, nn

from repvgg.numerics import full_float32


def finite(model: nn.Module, images: Tensor) -> Tensor:
    """Return what `model` makes of images in eval mode.

    Raises ValueError where that is not finite; it names the first layer whose output is not, and the remedy.
    """
    full_float32(images.device)
    outputs: Tensor = model(images)
    if bool(torch.isfinite(outputs).all()):
        return outputs
    dtype = next((p.dtype for p in model.parameters()), None)
    if dtype is None:  # an engine, which shows nothing of what is inside it
        raise ValueError(f"the output is NaN or infinite in {model}: try --precision fp32, or leave out --engine to learn where")
    name = str(dtype).removeprefix("torch.")
    remedy = (
        f"{name} reaches only {torch.finfo(dtype).max:,.0f}: --engine eager computes in float32"
        if dtype == torch.float16
        else "training diverged, or the file is damaged: use an earlier one"
    )
    raise ValueError(f"the output is NaN or infinite, first after the layer {_first(model, images)} ({name}); {remedy}")


def _first(model: nn.Module, images: Tensor) -> str:
    """Return the path of the first module without children whose output is not finite."""
    found: list[str] = []

    def look(path: str, output: object) -> None:
        if isinstance(output, Tensor) and not found and not bool(torch.isfinite(output).all()):
            found.append(path)

    leaves = [(path, module) for path, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(lambda _, __, output, path=path: look(path, output)) for path, module in leaves]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "that comes last"
