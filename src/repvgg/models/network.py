"""The surface of a network that `create_model` made, for editors and type checkers."""

from typing import Any

from torch import Tensor, nn

from repvgg.fold.report import Folded
from repvgg.models.manifest import Manifest


class Network(Folded):
    """Declares what every network of ours has; no object is made of it, and none needs to be. `fold_report` is a deploy form's.

    Comparators come from timm, which names these methods likewise.
    """

    manifest: Manifest
    num_classes: int
    feature_info: Any

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map [N, C, h, w] of images [N, in_chans, H, W]."""
        raise NotImplementedError

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Return the last feature map and those of the stages, as timm's networks do; `intermediates_only=True`: these alone."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits [N, num_classes] of a last feature map."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place of the old one."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        raise NotImplementedError
