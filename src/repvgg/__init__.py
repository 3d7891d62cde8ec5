"""RepVGG: train a multi-branch network, fold it exactly into plain 3x3 convolutions, prove it, deploy it.

    import repvgg
    model = repvgg.create_model("repvgg_a0", num_classes=10)
    ...                                                  # train it
    deploy = repvgg.reparameterize(model.eval())         # a new module: 3x3 conv + ReLU
    print(repvgg.verify(model, deploy, (3, 224, 224)))
    repvgg.save(deploy, "a0.safetensors")

    run = repvgg.train("repvgg_a0", "photos", "runs/photos")     # and evaluate, predict, export, quantize, prune: see api/

Names are imported on first use, so that `import repvgg` costs nothing. `repvgg.train` and `repvgg.predict` are also packages:
modules that can be called.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from repvgg.version import __version__ as __version__

_HOME = {
    "ReparamError": "fold.algebra",
    "as_linear": "fold.as_linear",
    "cost": "measure.costs",
    "evaluate": "api.using",
    "export": "api.files",
    "predict": "api.using",
    "prune": "api.files",
    "quantize": "api.files",
    "train": "api.training",
    "equivalent_kernel": "fold.as_linear",
    "num_paths": "measure.costs",
    "fold_onnx": "fold.onnx",
    "replace_conv": "fold.replace",
    "reparameterize": "fold.reparameterize",
    "verify": "fold.proof",
    "FileError": "disk",
    "create_model": "models.zoo",
    "from_pretrained": "models.load",
    "push_to_hub": "models.push",
    "list_models": "models.names",
    "register_with_timm": "models.in_timm",
    "load_engine": "deploy.load",
    "load": "models.load",
    "save": "models.load",
}

if TYPE_CHECKING:
    from repvgg.api.files import export as export
    from repvgg.api.files import prune as prune
    from repvgg.api.files import quantize as quantize
    from repvgg.api.training import train as train
    from repvgg.api.using import evaluate as evaluate
    from repvgg.api.using import predict as predict
    from repvgg.deploy.load import load_engine as load_engine
    from repvgg.disk import FileError as FileError
    from repvgg.fold.algebra import ReparamError as ReparamError
    from repvgg.fold.as_linear import as_linear as as_linear
    from repvgg.fold.as_linear import equivalent_kernel as equivalent_kernel
    from repvgg.fold.onnx import fold_onnx as fold_onnx
    from repvgg.fold.proof import verify as verify
    from repvgg.fold.reparameterize import reparameterize as reparameterize
    from repvgg.fold.replace import replace_conv as replace_conv
    from repvgg.measure.costs import cost as cost
    from repvgg.measure.costs import num_paths as num_paths
    from repvgg.models.in_timm import register_with_timm as register_with_timm
    from repvgg.models.load import from_pretrained as from_pretrained
    from repvgg.models.load import load as load
    from repvgg.models.load import save as save
    from repvgg.models.names import list_models as list_models
    from repvgg.models.push import push_to_hub as push_to_hub
    from repvgg.models.zoo import create_model as create_model

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'repvgg' has no attribute {name!r}")
    if name in _ROOMS:
        return import_module(f"repvgg.{name}")  # which the front door makes callable
    value = getattr(import_module(f"repvgg.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


# ------------------------------------------------------------------------------------------- rooms that are called like a verb

_ROOMS = ("train", "predict")


class _Verb(ModuleType):
    """A room that can be called: `repvgg.train(...)` is api/training.py's `train`, and `repvgg.train.loop` is a module still."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    @property
    def _function(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"repvgg.{_HOME[name]}"), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


class _FrontDoor(ModuleType):
    """Makes the rooms callable when they are imported, by whomever."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor
