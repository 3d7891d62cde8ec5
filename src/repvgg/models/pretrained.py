"""The paper's ImageNet weights, as timm publishes them on the hub."""

from pathlib import Path

from repvgg.models import hub

# Of each member whose weights were released: their top-1 on ImageNet, %, as timm reports it (D2se at 320 pixels).
RELEASED = {
    "repvgg_a0": 72.426,
    "repvgg_a1": 74.474,
    "repvgg_a2": 76.488,
    "repvgg_b0": 75.158,
    "repvgg_b1": 78.370,
    "repvgg_b1g4": 77.608,
    "repvgg_b2": 78.788,
    "repvgg_b2g4": 79.396,
    "repvgg_b3": 80.528,
    "repvgg_b3g4": 80.224,
    "repvgg_d2se": 83.550,
}
REPO = "timm/{name}.rvgg_in1k"


def pretrained_file(name: str, revision: str = "main") -> Path:
    """Return the local copy of the paper's weights for this member, fetched through the hub's cache (HF_HUB_OFFLINE is honoured).

    Raises ValueError where there are none and `FileError` if they cannot be fetched.
    """
    if name not in RELEASED:
        raise ValueError(
            f"timm publishes no weights of {name}: name a file of the authors' own; by name there are {', '.join(RELEASED)}"
        )
    repo = REPO.format(name=name)
    return hub.cached(repo, revision) or hub.fetch(repo, revision)  # they do not change: what was fetched once needs no network


def imagenet_classes() -> list[str]:
    """Return the thousand class names of ImageNet-1k in label order, as torchvision lists them."""
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError:
        raise ValueError("ImageNet's class names need torchvision: pip install torchvision") from None
    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
