"""Take batch norms into the transposed convolutions before them. These are no `LinearMap`, so no longer stretch can begin there."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import as_linear, split_activation
from repvgg.fold.flow import Value, agree
from repvgg.fold.guards import altered, inside, is_finite
from repvgg.fold.torch_graph import ModuleFlow

SIDE = 5  # of the maps that a fold is checked on


@torch.no_grad()
def fold_transposed(model: nn.Module, read: ModuleFlow, chosen: frozenset[str] | None) -> Iterator[tuple[list[str], float]]:
    """Fold them in place; yield the two paths and the relative float64 error of each.

    chosen: the transposed convolutions to fold, by default all. Raises `ReparamError` where the fold is not proved.
    """
    for norm in list(read.flow.left):
        paths = _pair(model, read, norm)
        if paths and (chosen is None or paths[0] in chosen):
            with inside(paths[0]):
                conv, after = model.get_submodule(paths[0]), model.get_submodule(paths[1])
                affine, activation = split_activation(after)
                new, error = _folded(conv, affine)  # type: ignore[arg-type]
            model.set_submodule(paths[0], new)
            model.set_submodule(paths[1], activation)
            yield paths, error


def _pair(model: nn.Module, read: ModuleFlow, norm: Value) -> list[str] | None:
    """Return the paths of a transposed convolution and of the batch norm which alone reads what that gives, if it does."""
    source = norm.inputs[0]
    paths = [place.path for place in map(read.places.get, (source, norm)) if place is not None and place.path]
    if len(paths) != 2 or read.flow.readers[source] != [norm] or source in read.flow.outputs or not norm.is_norm:
        return None
    conv = model.get_submodule(paths[0])
    if type(conv) is not nn.ConvTranspose2d or altered(conv) or any(map(read.traces.why_not_replaced, paths)):
        return None
    if read.traces.call is None and read.traces.open.get(read.owners([source, norm])[-1]):
        return None  # called in another way, its forward may do something else
    return paths


def _folded(conv: nn.ConvTranspose2d, norm: nn.Module) -> tuple[nn.ConvTranspose2d, float]:
    """Return a transposed convolution that computes what `conv` and then `norm` do, and its relative float64 error."""
    m = as_linear.read(norm)
    scale, shift = m.kernel.flatten(), m.bias
    if len(scale) != conv.out_channels:
        raise ReparamError(f"gives {conv.out_channels} channels to a batch norm of {len(scale)}")
    exact, new = copy.deepcopy(conv).double(), copy.deepcopy(conv).double()
    by_group = exact.weight.unflatten(0, (conv.groups, -1)) * scale.view(conv.groups, 1, -1, 1, 1)
    new.weight = nn.Parameter(by_group.flatten(0, 1))
    new.bias = nn.Parameter((0 if exact.bias is None else exact.bias) * scale + shift)
    noise = torch.randn(2, conv.in_channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    between = exact(noise.to(scale.device))
    error = agree(new(noise.to(scale.device)), copy.deepcopy(norm).double()(between), [between], "")
    new = new.to(conv.weight.dtype)
    for name, tensor in new.named_parameters():
        if not is_finite(tensor):
            raise ReparamError(f"the folded {name} does not fit {tensor.dtype}: convert the model to float32 first")
    return new.requires_grad_(conv.weight.requires_grad).eval(), error
