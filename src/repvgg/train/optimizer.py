"""SGD as the paper uses it, AdamW or Muon: which parameters decay, at what learning rate each layer moves; and the official code's
own L2 term."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fold.as_linear import Branches
from repvgg.models.repvgg import RepVGG
from repvgg.train.muon import Muon, turned_kernels
from repvgg.train.recipes import Recipe

STAGES = 5  # the stem is the first; the head comes after the last
BACKBONE = ("stem.", "stages.", "backbone.")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of the parameters that are not frozen."""
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))
    how: dict[str, Any] = {"lr": recipe.lr, "momentum": recipe.momentum, "nesterov": recipe.nesterov}
    if recipe.optimizer == "muon":
        return Muon(groups, torch.bfloat16 if recipe.precision == "bf16" else None, **how)
    return torch.optim.SGD(groups, **how)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return groups of parameters: weight decay on kernels (more than one dimension) alone, not on biases, nor on batch norms'
    weights (section 4.1), but for those of identity branches with `decay_identity`.

    `lr_scale` of each group holds its learning rate as `layer_decay`, `head_lr` and `bn_bias_lr` say. With custom_l2 the kernels
    that it regularises are spared, and so are those that Muon turns, whose `lr_scale` holds `kernel_lr` and no `head_lr`. Raises
    ValueError where stages are not known (outside the family), or the backbone is not.
    """
    layer_decay, head_lr = recipe.layer_decay, recipe.head_lr
    if head_lr != 1 and not (isinstance(model, RepVGG) or hasattr(model, "backbone")):
        raise ValueError(f"--head-lr: the head of {type(model).__name__} is not known here")
    if layer_decay != 1 and not isinstance(model, RepVGG):
        raise ValueError(
            f"--layer-decay: the stages of {type(model).__name__} are not known here; it is for the RepVGG family "
            "(the recipe finetune asks for it): --layer-decay 1"
        )
    spared = {p for block in _two_branches(model) for p in _kernels(block)} if recipe.custom_l2 else set()
    decaying = set(_identities(model)) if recipe.decay_identity else set()
    quick = {m.bias for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    turning = set(turned_kernels(model)) if recipe.optimizer == "muon" else set()
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (STAGES - _stage(name)) if layer_decay != 1 else 1.0
            turned = parameter in turning
            if turned:
                scale *= recipe.kernel_lr / recipe.peak_lr
            elif not name.startswith(BACKBONE):
                scale *= head_lr
            if parameter in quick:
                scale *= recipe.bn_bias_lr
            decays = parameter in decaying or (parameter.dim() > 1 and parameter not in spared and not turned)
            groups.setdefault((scale, decays, turned), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": recipe.weight_decay if decays else 0.0, "lr_scale": scale, "turned": turned}
        for (scale, decays, turned), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def freeze(model: nn.Module, stages: int) -> None:
    """Take the first stages out of training. Their batch norms keep their statistics too, see `keep_still`."""
    if not stages:
        return
    if not isinstance(model, RepVGG):
        raise ValueError(f"--frozen-stages: the stages of {type(model).__name__} are not known here; it is for the RepVGG family")
    for stage in _stages(model)[:stages]:
        stage.requires_grad_(False)


def keep_still(model: nn.Module, stages: int, batch_norms: bool) -> None:
    """Put frozen stages, and all batch norms if asked for, back into eval mode: to be called after each `model.train()`."""
    if stages and isinstance(model, RepVGG):
        for stage in _stages(model)[:stages]:
            stage.eval()
    if batch_norms:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def custom_l2(model: nn.Module) -> Tensor:
    """Return half the squared norm of the kernels that blocks fold to, as the official code's `get_custom_L2` measures it.

    A 3x3 kernel K3 and a 1x1 kernel K1 with the scales t = gamma / sigma of their batch norms (constants here) make one kernel.
    Around its centre K3 counts; in the centre E = t3 K3 + t1 K1 does, as E^2 / (t3^2 + t1^2). Decaying these instead of K3
    and K1 regularises what will be deployed.
    """
    total = next(model.parameters()).new_zeros(())
    for block in _two_branches(model):
        k3, k1 = _kernels(block)
        t3, t1 = (_scale(getattr(block, name).bn) for name in ("conv_kxk", "conv_1x1"))
        centre = k3[:, :, 1:2, 1:2]
        both = t3 * centre + t1 * k1
        total = total + k3.square().sum() - centre.square().sum() + (both.square() / (t3.square() + t1.square())).sum()
    return 0.5 * total


def _identities(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of batch norms that are a branch by themselves."""
    for module in model.modules():
        if isinstance(module, Branches):
            yield from (b.weight for b in module.children() if isinstance(b, nn.BatchNorm2d) and b.weight is not None)


def _two_branches(model: nn.Module) -> Iterator[nn.Module]:
    """Blocks with a 3x3 and a 1x1 branch, each with its batch norm."""
    for module in model.modules():
        if type(module) is Branches and all(hasattr(getattr(module, name, None), "bn") for name in ("conv_kxk", "conv_1x1")):
            yield module


def _kernels(block: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return block.conv_kxk.conv.weight, block.conv_1x1.conv.weight


def _scale(bn: nn.BatchNorm2d) -> Tensor:
    assert bn.running_var is not None
    return (bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach().view(-1, 1, 1, 1)


def _stages(model: RepVGG) -> list[nn.Module]:
    return [model.stem, *model.stages]


def _stage(name: str) -> int:
    first, _, rest = name.partition(".")
    return 0 if first == "stem" else 1 + int(rest.partition(".")[0]) if first == "stages" else STAGES
