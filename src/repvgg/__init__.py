"""RepVGG: train a multi-branch network, fold it exactly into plain 3x3 convolutions, prove it, deploy it.

    import repvgg
    model = repvgg.create_model("repvgg_a0", num_classes=10)
    ...                                                  # train it
    deploy = repvgg.reparameterize(model.eval())         # a new module: 3x3 conv + ReLU
    print(repvgg.verify(model, deploy, (3, 224, 224)))
    repvgg.save(deploy, "a0.safetensors")

Names are imported on first use, so that `import repvgg` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ReparamError": "algebra",
    "as_linear": "reparam",
    "cost": "costs",
    "equivalent_kernel": "reparam",
    "num_paths": "costs",
    "replace_conv": "replace",
    "reparameterize": "reparam",
    "verify": "reparam",
    "FileError": "files",
    "create_model": "zoo",
    "from_pretrained": "zoo",
    "push_to_hub": "push",
    "list_models": "zoo",
    "load_engine": "deploy.load",
    "load": "zoo",
    "save": "zoo",
}

if TYPE_CHECKING:
    from repvgg.algebra import ReparamError as ReparamError
    from repvgg.costs import cost as cost
    from repvgg.costs import num_paths as num_paths
    from repvgg.deploy.load import load_engine as load_engine
    from repvgg.files import FileError as FileError
    from repvgg.push import push_to_hub as push_to_hub
    from repvgg.reparam import as_linear as as_linear
    from repvgg.reparam import equivalent_kernel as equivalent_kernel
    from repvgg.reparam import reparameterize as reparameterize
    from repvgg.reparam import verify as verify
    from repvgg.replace import replace_conv as replace_conv
    from repvgg.zoo import create_model as create_model
    from repvgg.zoo import from_pretrained as from_pretrained
    from repvgg.zoo import list_models as list_models
    from repvgg.zoo import load as load
    from repvgg.zoo import save as save

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'repvgg' has no attribute {name!r}")
    value = getattr(import_module(f"repvgg.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
