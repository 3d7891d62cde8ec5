"""Fold a convolution and a batch norm that are siblings in some module's forward."""

from torch import nn

from repvgg.fold.algebra import compose
from repvgg.fold.as_linear import (
    CONVOLUTIONS,
    NO_STATISTICS,
    UNEVEN,
    as_conv,
    as_linear,
    is_batch_norm,
    main_tensor,
    pads_unevenly,
    resembles_batch_norm,
    split_activation,
    why_unknown,
)
from repvgg.fold.guards import altered, inside
from repvgg.fold.proof import check_part
from repvgg.fold.report import FoldReport
from repvgg.fold.trace import find_pairs, refuse_lost_pairs


def fold_pairs(model: nn.Module, report: FoldReport) -> None:
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
            model.set_submodule(conv_path, as_conv(folded, like=main_tensor(conv)))
        model.set_submodule(norm_path, activation)
        report.pairs.append((conv_path, norm_path))
    refuse_lost_pairs(model, found, "folded")
    for path, module in model.named_modules():
        if resembles_batch_norm(module):
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
    if isinstance(module, nn.Conv2d) and pads_unevenly(module):
        return f"its {cls} {UNEVEN}"
    if is_batch_norm(module) and module.running_mean is None:
        return f"its {cls} {NO_STATISTICS}"
    return f"its {cls} is used in more than one place" if uses > 1 else None
