"""The answer for one image."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first; or why it could not be read.

    engine: what ran the model. explanation: a picture of where the evidence lies.
    """

    path: str
    labels: list[tuple[str, float]]
    error: str | None = None
    engine: str = "pytorch"
    explanation: str | None = None
