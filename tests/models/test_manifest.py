"""manifest.py: what a file says of its model comes back, and nonsense is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from small_files import MANIFEST

from repvgg.disk import FileError
from repvgg.models.manifest import Manifest, Preprocessing


def test_a_manifest_there_and_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    whole = Manifest({"name": "repvgg_a0", "num_classes": 2, "in_chans": 3, "width": 0.1}, "training", ["cät", "дог"])
    assert Manifest.from_json(whole.to_json()) == whole
    assert json.loads(whole.to_json())["format_version"] == 1


def test_numbers_that_json_has_not() -> None:
    notes = {"loss": float("nan"), "of_epochs": [{"lr": 0.1, "loss": float("-inf")}], "note": "NaN"}
    told = json.loads(replace(MANIFEST, training=notes).to_json(), parse_constant=pytest.fail)
    assert told["training"] == {"loss": None, "of_epochs": [{"lr": 0.1, "loss": None}], "note": "NaN"}


@pytest.mark.parametrize("text", ["", "null", "5", "[]", "{}", '"text"', "{" * 100_000, "[" * 100_000, '{"format_version": 1}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(FileError, match="manifest cannot be used"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_size": (3, 0, 224)},
        {"input_size": (3, 224, 8193)},
        {"input_size": (3, 224)},
        {"input_size": (1, 224, 224)},
        {"input_size": (3, 224.0, 224)},
        {"resize": 0},
        {"interpolation": "area"},
        {"mean": (0.5, 0.5)},
        {"mean": (0.5, 0.5, float("nan"))},
        {"std": (0.5, 0.5, 0.0)},
        {"std": (0.5, float("nan"), 0.5)},
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="preprocessing"):
        replace(Preprocessing(), **wrong)


def test_an_error_is_one_printable_line() -> None:
    assert str(FileError("a\nb\r\x1b[31m\u202ec\udc80 \t d")) == "a b [31m c d"
    assert len(str(FileError("x" * 10_000))) == 500


@pytest.mark.parametrize("told", [5, [2, 0], [0.2], [0.2, "0"], "0.2"])
def test_a_splitting_is_a_share_and_a_seed(told: Any) -> None:
    with pytest.raises(ValueError, match="its splitting is no share and seed"):
        Manifest(None, training={"splitting": told})
    Manifest(None, training={"splitting": [0.2, 0]})
