"""One process's part in the training of one model: what a step does, and all that must be kept to go on from it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from repvgg.numerics import full_float32
from repvgg.train.augment import mixing
from repvgg.train.distributed import ALONE, World
from repvgg.train.optimizer import custom_l2, freeze, keep_still, make_optimizer
from repvgg.train.recipes import Recipe
from repvgg.train.tasks import CLASSIFICATION, Task

# What each optimizer remembers of a parameter, by the name that it is saved under.
REMEMBERED = {
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"first": "exp_avg", "second": "exp_avg_sq", "steps": "step"},
    "muon": {"turning": "momentum_buffer"},
}


class Trainer:
    """Steps of gradient descent on `model`, which is moved to the device and changed in place."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        num_classes: int,
        *,
        task: Task = CLASSIFICATION,
        world: World = ALONE,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """Raises ValueError for what the recipe asks of this device or model and cannot get."""
        self.recipe, self.num_classes, self.task, self.world, self.seed = recipe, num_classes, task, world, seed
        self.device = torch.device(device)
        full_float32(self.device)
        self.model = self._placed(model)
        freeze(self.model, recipe.frozen_stages)
        self.ema = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True) if recipe.ema else None
        )
        self.optimizer = make_optimizer(self.model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")  # type: ignore[attr-defined]
        self.sums = torch.zeros(2, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        self.summed = self.number = 0
        self.epoch = [0.0, 0.0, 0.0]  # sums of loss and share, and the steps: of those steps of the epoch that `means` has told
        self.mix = mixing(recipe, num_classes)
        # A wrapper is compiled, so that only steps are: not statistics taken anew, nor evaluations, which are other graphs.
        wrapped: Any = torch.compile(self.model, dynamic=False) if recipe.compile else self.model
        self.network: Any = nn.parallel.DistributedDataParallel(wrapped) if world.size > 1 else wrapped

    def _placed(self, model: nn.Module) -> nn.Module:
        if self.recipe.checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise ValueError(f"--checkpointing: {type(model).__name__} cannot do it")
            if self.recipe.compile:
                raise ValueError("--checkpointing does not go with --compile, which itself decides what is computed again")
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        if self.recipe.sync_bn:
            if self.device.type != "cuda":
                raise ValueError(
                    f"--sync-bn needs GPUs: PyTorch has no synchronised batch norm on {self.device.type}; say --no-sync-bn"
                )
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.recipe.precision == "fp64":
            model = model.double()
        return model.to(self.device, memory_format=self._memory_format)  # type: ignore[call-overload, no-any-return]

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.recipe.channels_last else torch.preserve_format

    @property
    def best_model(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average, if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def train(self) -> None:
        """Prepare for the steps of an epoch."""
        self.model.train()
        keep_still(self.model, self.recipe.frozen_stages, self.recipe.freeze_bn)

    def step(self, parts: Sequence[tuple[Tensor, Tensor]], lr: float, number: int, images: int = 0) -> None:
        """Take one step.

        parts: this process's normalised images [N, C, H, W] and labels [N] or masks [N, H, W]; number: of the step in the run.
        images: how many all processes have together, by which parts of unequal size are weighted; 0 where all are equal.
        It does not wait for the device: what the loss was is asked of `means`.
        """
        torch.manual_seed(hash((self.seed, number, self.world.rank)) % 2**63)  # of mixing and dropout: the same when resumed here
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        for i, (x, y) in enumerate(parts, 1):
            with nullcontext() if i == len(parts) or self.world.size == 1 else self.network.no_sync():
                loss, right = self._loss(x, y)
                share = len(x) * self.world.size / images if images else 1 / len(parts)
                self.scaler.scale(loss * share).backward()
            self.sums += torch.stack([loss.detach(), right]).to(self.sums) * share
        self.summed, self.number = self.summed + 1, number
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def means(self) -> tuple[float, float]:
        """Return the loss and the share of images (of masks, pixels) recognised, over all processes and the steps since the last
        call; to be called by all processes alike. Raises FloatingPointError if the loss is no number.
        """
        loss, share = (self.world.total(self.sums) / (max(1, self.summed) * self.world.size)).tolist()
        first, last = self.number - self.summed + 2, self.number + 1  # counted from 1, as in metrics.jsonl
        self.epoch = [a + self.summed * b for a, b in zip(self.epoch, (loss, share, 1.0), strict=True)]
        self.summed = 0
        self.sums.zero_()
        if not math.isfinite(loss):
            raise diverged(f"steps {first} to {last}: the loss is {loss}")
        return loss, share

    def epoch_means(self) -> tuple[float, float]:
        """Return what `means` does, but over all steps of the epoch, those of an earlier process too; another epoch begins."""
        if self.summed:
            self.means()
        (loss, share, steps), self.epoch = self.epoch, [0.0, 0.0, 0.0]
        return loss / max(1.0, steps), share / max(1.0, steps)

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        target = y
        if self.mix is not None:
            x, target = self.mix(x, y)
        outputs = self._forward(self.network, x)
        loss = self.task.loss(outputs, target, self.recipe)
        if self.recipe.custom_l2:
            loss = loss + self.recipe.weight_decay * custom_l2(self.model)
        with torch.no_grad():
            return loss, self.task.right(outputs, y)

    def _forward(self, network: Any, x: Tensor) -> Any:
        """Run a network, and return what it returns in fp32 at least."""
        x = x.contiguous(memory_format=self._memory_format if self.recipe.channels_last else torch.contiguous_format)
        if self.recipe.precision == "fp64":
            return network(x.double())
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.recipe.precision)
        with torch.autocast(self.device.type, half) if half else nullcontext():
            outputs = network(x)
        return tuple(o.float() for o in outputs) if isinstance(outputs, tuple) else outputs.float()

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits of `best_model`, which must be in eval mode."""
        return self._forward(self.best_model, x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def renew_statistics(self, batches: Iterable[Tensor]) -> None:
        """Take the running statistics of all batch norms in training anew: those of these images, with the weights as they are.

        Running means over a few steps, in which the weights have moved far, describe no network. batches: normalised images
        [N, C, H, W].
        """
        models = list(dict.fromkeys((self.model, self.best_model)))
        norms: list[tuple[nn.modules.batchnorm._BatchNorm, float | None]] = []
        for model in models:
            model.train()
            keep_still(model, self.recipe.frozen_stages, self.recipe.freeze_bn)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
                    norms.append((module, module.momentum))
                    module.reset_running_stats()
                    module.momentum = None  # the mean over all that it sees
        for x in batches:
            for model in models:
                self._forward(model, x)
        for module, momentum in norms:
            module.momentum = momentum

    def settle(self) -> None:
        """Prepare for evaluating and saving: eval mode, one process's statistics in all, and numbers that a file may hold.

        Where a synchronised batch norm saw a constant channel, rounding may leave its variance below zero, which no file may hold:
        zero takes its place. Raises FloatingPointError for numbers that are not finite.
        """
        for model in dict.fromkeys((self.model, self.best_model)):  # in one order: processes exchange buffers here
            model.eval()
            self.world.copy_buffers(model)
            refuse_infinite(model.state_dict())
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                    module.running_var.clamp_(min=0)

    # ------------------------------------------------------------------------------------------------------------ its state

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, statistics, momentum and the moving average. Raises FloatingPointError if one is not finite."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        kinds = REMEMBERED[self.recipe.optimizer]
        for name, parameter in self.model.named_parameters():
            remembered = self.optimizer.state[parameter]
            found |= {f"{kind}.{name}": remembered[key] for kind, key in kinds.items() if remembered.get(key) is not None}
        if self.ema is not None:
            found |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        refuse_infinite(found)
        return {**found, "figures": torch.tensor([*self.sums.tolist(), self.summed, *self.epoch], dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor], scaler: dict[str, Any]) -> None:
        """Go on from the `tensors()` and the `scaler.state_dict()` of an earlier trainer of the same model.

        Where the recipe is another, a new optimizer remembers nothing, and a new moving average begins at the weights as they are.
        """
        groups = defaultdict[str, dict[str, Tensor]](dict)
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            groups[kind][rest] = tensor
        self.model.load_state_dict(groups["model"])
        for name, parameter in self.model.named_parameters():
            for kind, key in REMEMBERED[self.recipe.optimizer].items():
                if (saved := groups[kind].get(name)) is not None:
                    # In the gradient's own layout: a sum of the same numbers in another order would round otherwise.
                    like = parameter if saved.dim() else saved
                    self.optimizer.state[parameter][key] = torch.empty_like(like).copy_(saved)
        if self.ema is not None and "ema" in groups:
            self.ema.load_state_dict(groups["ema"])
        elif self.ema is not None:
            self.ema.module.load_state_dict(groups["model"])
        for figures in groups["figures"].values():
            loss, share, summed, *self.epoch = figures.tolist()
            self.sums, self.summed = self.sums.new_tensor([loss, share]), int(summed)
        if scaler:
            self.scaler.load_state_dict(scaler)


def refuse_infinite(tensors: dict[str, Tensor]) -> None:
    """Raise FloatingPointError, naming the first tensor that holds NaN or Inf; the device is waited for once."""
    # AdamW counts its steps on the CPU, whatever the device.
    some = {name: tensor for name, tensor in tensors.items() if not name.startswith("steps.")}
    numbers = {name: tensor for name, tensor in some.items() if tensor.is_floating_point()}
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in numbers.values()]).tolist() if numbers else []
    for name, whole in zip(numbers, finite, strict=True):
        if not whole:
            raise diverged(f"{name} holds NaN or Inf")


def diverged(how: str) -> FloatingPointError:
    return FloatingPointError(f"{how}: training diverged, lower --lr. What was saved before is intact")
