"""meter.py: progress in plain lines."""

import pytest

from repvgg.predict import meter as metering
from repvgg.predict.meter import Meter


def test_progress_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "PLAIN_EVERY", -1.0)
    said: list[str] = []
    with Meter(3000, said.append) as meter:
        meter.add(1000)
        meter.add(1000)
    assert [line.rsplit(", ", 1)[0] for line in said] == [
        "1,000 images of 3,000, 0.0 min left",
        "2,000 images of 3,000, 0.0 min left",
    ]
    assert all(line.endswith(" img/s") for line in said)
    with Meter(None, said.append) as meter:
        meter.add(1000)
    assert said[-1].startswith("1,000 images, ")
