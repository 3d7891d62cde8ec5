"""Say what a fold did, and what it left."""

from dataclasses import dataclass, field


@dataclass
class FoldReport:
    """What `reparameterize` did.

    blocks: paths of declared blocks that became one convolution each. stretches: path of a convolution -> what went into it, a
    convolution and its batch norm or whole branches. left: path -> why. errors: the largest float64 error of each one's own check.
    """

    blocks: list[str] = field(default_factory=list)
    stretches: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Those stretches that were a convolution and a batch norm."""
        return [(names[0], names[1]) for names in self.stretches.values() if len(names) == 2]

    def __str__(self) -> str:
        worst = max(self.errors.values(), default=0.0)
        many = sum(map(len, self.stretches.values()))
        lines = [
            f"folded {len(self.blocks)} blocks, and {many} operators into {len(self.stretches)} convolutions; "
            f"largest error of a part {worst:.1e}"
        ]
        lines += [f"left {path}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)
