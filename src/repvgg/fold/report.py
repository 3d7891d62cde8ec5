"""Say what a fold did, and what it left."""

from dataclasses import dataclass, field

from torch import nn

from repvgg.fold.proof import Verification


@dataclass
class FoldReport:
    """Tell what `reparameterize` did.

    blocks: paths of declared blocks that became one convolution each. stretches: path of a convolution -> what went into it: a
    convolution and its batch norm, or whole branches. left: path -> why. errors: path -> the float64 error of its own check.
    untraceable: why the forward of the whole cannot be followed, if so.
    """

    blocks: list[str] = field(default_factory=list)
    stretches: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    whole: Verification | None = None
    untraceable: str = ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Return those stretches that were two operators, mostly a convolution and its batch norm."""
        return [(names[0], names[1]) for names in self.stretches.values() if len(names) == 2]

    def __str__(self) -> str:
        worst = max(self.errors.values(), default=0.0)
        branches = len(self.stretches) - len(self.pairs)
        lines = [
            f"folded {len(self.blocks)} blocks, {len(self.pairs)} conv+BN pairs and {branches} other stretches; "
            f"largest error of a part {worst:.1e}"
        ]
        if self.untraceable and not self.errors:
            lines.append(f"its forward cannot be followed ({self.untraceable}): fold its parts, as in model.backbone")
        if self.errors:
            lines.append(f"the whole: {self.whole or 'not checked, only its parts; pass an example input'}")
        lines += [f"left {path}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)


class Folded(nn.Module):
    """Declares, for type checkers and editors, what a module that `reparameterize` returns has; no object is made of it."""

    fold_report: FoldReport
