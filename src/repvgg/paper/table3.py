"""Table 3: the members by their layers and multipliers, from the family data; and what follows from them."""

from repvgg.models.names import FAMILY
from repvgg.paper.numbers import TABLE3, Multipliers
from repvgg.paper.result import PaperSettings, Result, Table


def run(settings: PaperSettings) -> Result:
    ours = members()
    same = "equal to the paper's" if ours == TABLE3 else "NOT equal to the paper's"
    rows = [
        (
            p.model,
            ", ".join(map(str, p.layers)),
            ", ".join(map(str, o.layers)),
            *(f"{value:g}" for value in (p.a, o.a, p.b, o.b)),
            ", ".join(map(str, FAMILY[p.model].widths())),
        )
        for p, o in zip(TABLE3, ours, strict=True)
    ]
    header = ("model", "layers of each stage, paper", "here", "a, paper", "here", "b, paper", "here", "channels of each stage")
    return Result(
        "Table 3: the family",
        [Table("Layers and multipliers", header, rows)],
        f"Nothing is measured here, and our family data are {same}. The channels follow from Table 2. B1, B2 and B3 also "
        "exist with 2 or 4 groups in the 3rd, 5th, 7th, ... layer: g2 and g4.",
        {"equal": ours == TABLE3, "members": [vars(member) for member in ours]},
    )


def members() -> tuple[Multipliers, ...]:
    """Read Table 3 off our family data."""
    return tuple(
        Multipliers(name, (1, *FAMILY[name].depths), FAMILY[name].a, FAMILY[name].b) for name in (row.model for row in TABLE3)
    )
