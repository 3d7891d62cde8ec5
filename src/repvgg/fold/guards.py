"""Refuse what a fold would silently change: train mode, damaged tensors, hooks, modules that cannot be copied."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Make errors raised in here name the module at `path`."""
    try:
        yield
    except ReparamError as error:
        raise error.inside(path) from None


def refuse_wrapper(model: object) -> None:
    """Raise `ReparamError` for what is no network, or keeps one inside and does something else when called; it says what to
    pass."""
    kind = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ReparamError(f"{kind} is a wrapper: pass its network, as in reparameterize(x.module.eval())")
    if isinstance(model, torch.jit.ScriptModule):
        raise ReparamError(
            f"{kind} is TorchScript, which cannot be read: fold the network before, or export it to ONNX and fold that"
        )
    if isinstance(model, nn.Module) and (called_as_torch_does(model) or type(model).forward is not nn.Module.forward):
        return
    inner = {**getattr(model, "__dict__", {}), **getattr(model, "_modules", {})}
    names = [name for name, value in inner.items() if isinstance(value, nn.Module) and not name.startswith("_")]
    if names:
        raise ReparamError(f"{kind} is no network but holds one: pass that, as in reparameterize(x.{names[0]}.eval())")
    if isinstance(model, (str, os.PathLike)):
        raise ReparamError(f"{kind} is no network: reparameterize(repvgg.load({os.fspath(model)!r})) folds that of a file")
    if isinstance(model, dict):
        raise ReparamError(f"{kind} is no network: load it into one first (load_state_dict), or give its file to repvgg.load")
    raise ReparamError(f"{kind} is no network: pass a torch.nn.Module in eval mode")


def refuse_train_mode(model: nn.Module) -> None:
    """Raise `ReparamError` naming the first module in train mode: batch statistics make the fold silently wrong."""
    for name, module in model.named_modules():
        if module.training:
            raise ReparamError(
                "is in train mode, where batch norm depends on the batch: call .eval() first",
                name or type(module).__name__,
            )


def altered(module: nn.Module) -> str | None:
    """Return why this object may do something else than its type says, if so."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "carries forward hooks (old-style spectral_norm is one), which folding would lose: remove them first"
    if not called_as_torch_does(module):
        return "has a __call__ of its own, which folding would lose"
    return REPLACED if "forward" in vars(module) and not chosen_forward(module) else None


def chosen_forward(module: nn.Module) -> str:
    """Return the name of that method of its own which a module has in place of its forward (`self.forward = self.forward_fast`)."""
    chosen = vars(module).get("forward")
    own = isinstance(chosen, MethodType) and chosen.__self__ is module
    name = str(getattr(chosen, "__name__", ""))
    return name if own and getattr(type(module), name, None) is getattr(chosen, "__func__", chosen) else ""


def called_as_torch_does(module: nn.Module) -> bool:
    """Tell whether calling a module does nothing besides its forward and hooks."""
    return type(module).__call__.__module__.startswith("torch.")


REPLACED = "has a forward of its own in place of its class's (torch.compile does so): fold the plain module, then compile that"


def refuse_uncopyable(model: nn.Module) -> None:
    """Refuse a model of which a deep copy would stay tied to the original, or cannot be made."""
    for path, module in model.named_modules():
        if "forward" in vars(module) and not chosen_forward(module):
            raise ReparamError(REPLACED, path or type(module).__name__)
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ReparamError(
                    f"`{name}` is the result of a computation, so the module cannot be copied: remove old-style weight_norm or "
                    "spectral_norm, or torch.nn.utils.prune's mask (prune.remove), or run it under torch.no_grad()",
                    path or type(module).__name__,
                )


def copied(model: nn.Module, share_tensors: bool = False) -> nn.Module:
    """Return a deep copy in which each module is in the mode of the original (that of an fx.GraphModule comes back in train mode).

    share_tensors: parameters stay the same objects. Raises `ReparamError` naming what cannot be copied.
    """
    try:
        copy_ = copy.deepcopy(model, {id(p): p for p in model.parameters()} if share_tensors else {})
    except Exception as error:  # whatever a stranger's object raises
        raise _uncopyable(model, error) from None
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in copy_.named_modules():
        module.training = modes.get(path, module.training)
    return copy_


def _uncopyable(model: nn.Module, error: Exception) -> ReparamError:
    """Return the refusal of a model that holds something of which there can be no copy: an open file, a lock."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                if name != "_modules":
                    copy.deepcopy(value)
            except Exception as found:
                why = f"`{name}`, a {type(value).__name__}, cannot be copied ({found}): take it out while the model is folded"
                return ReparamError(why, path or type(module).__name__)
    return ReparamError(f"cannot be copied ({error})", type(model).__name__)


def refuse_without_numbers(model: nn.Module) -> None:
    """Raise `ReparamError` naming the first parameter or buffer that has no numbers yet."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ReparamError("is not initialised yet: call the model with an input first", name)
        if tensor.device.type == "mps":
            raise ReparamError(
                "is on Apple's GPU, which has no float64 to prove a fold in: fold model.cpu(), and move the result", name
            )
        if tensor.is_meta:
            raise ReparamError("is on the meta device, where tensors have no numbers: load the weights first", name)


def refuse_damage(module: nn.Module) -> None:
    """Raise `ReparamError` naming a parameter without channels, or a tensor with NaN or Inf."""
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.numel():
            raise ReparamError("has no channels: take the module out of the model", name)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        refuse_nonfinite(name, tensor)


def refuse_nonfinite(path: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise ReparamError("holds NaN or Inf: the checkpoint is damaged, or training diverged", path)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether there is no NaN and no Inf; by the extremes, in a twentieth of the time that each element would take."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype.itemsize == 1:  # of float8 there are no extremes
        tensor = tensor.float()
    return tensor.numel() == 0 or tensor.is_meta or bool(torch.stack(tensor.aminmax()).isfinite().all())


def parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children by name, one that is there twice included."""
    return [(name, child) for name, child in module._modules.items() if child is not None]
