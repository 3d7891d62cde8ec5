"""The paper's ImageNet weights, as timm publishes them on the hub."""

from pathlib import Path

from repvgg.models import hub

RELEASED = ("a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4", "d2se")
REPO = "timm/{name}.rvgg_in1k"


def pretrained_file(name: str, revision: str = "main") -> Path:
    """Return the local copy of the paper's weights for this member, fetched through the hub's cache (HF_HUB_OFFLINE is honoured).

    Raises ValueError where none were released and `FileError` if they cannot be fetched.
    """
    if name.removeprefix("repvgg_") not in RELEASED:
        raise ValueError(f"no weights were released for {name}; there are repvgg_{{{','.join(RELEASED)}}}")
    repo = REPO.format(name=name)
    return hub.cached(repo, revision) or hub.fetch(repo, revision)  # they do not change: what was fetched once needs no network


def imagenet_classes() -> list[str]:
    """Return the thousand class names of ImageNet-1k in label order, as torchvision lists them."""
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError:
        raise ValueError("ImageNet's class names need torchvision: pip install torchvision") from None
    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
