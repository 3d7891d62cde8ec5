"""Say what a fold did, and what it left."""

from dataclasses import dataclass, field

from repvgg.fold.proof import Verification


@dataclass
class FoldReport:
    """Tell what `reparameterize` did: module paths folded (with the largest float64 error of their own checks), and left."""

    blocks: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    whole: Verification | None = None

    def __str__(self) -> str:
        worst = max(self.errors.values(), default=0.0)
        lines = [f"folded {len(self.blocks)} blocks and {len(self.pairs)} conv+BN pairs; largest error of a part {worst:.1e}"]
        if self.errors:
            lines.append(f"the whole: {self.whole or 'not checked, only its parts; pass an example input'}")
        lines += [f"left {path}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)
