"""agreement.py: the sentences say what the numbers do, also of a grid that is not finished."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg.paper import agreement
from repvgg.paper.agreement import B0S, PRINTED, Pilot, correlation, rates_of, spearman, words
from repvgg.paper.grid import TABLES

numbers = st.lists(st.integers(0, 5), min_size=3, max_size=12)


def as_printed(spread: float = 0.5) -> dict[str, list[float | None]]:
    return {name: [top1 - spread, top1, top1 + spread] for name, (_, top1) in B0S.items()}


def test_where_the_papers_numbers_come_from() -> None:
    assert PRINTED["plain"] == ("Neither (plain)", 72.39)
    assert PRINTED["no_1x1"] == ("Identity alone", 74.79)
    assert PRINTED["no_identity"] == ("1x1 alone", 73.15)
    assert PRINTED["repvgg"] == ("Full-featured reparam", 75.14)
    assert PRINTED["residual"] == ("Residual Reorg", 74.56)
    assert set(TABLES) == set(B0S) < set(PRINTED)


def test_the_papers_own_order() -> None:
    said = words(as_printed(), {})
    assert said.startswith("By mean top-1, the order of 11 variants has a rank correlation of 1.00 with the paper's (1: the same).")
    assert "Within one place of the paper's: relu_in_branch, repvgg, no_1x1, residual, identity_no_bn, dirac, acb," in said
    assert "Two places" not in said
    # two standard errors of the difference of two means of three values, of a standard deviation of a half
    assert (
        f"repvgg minus plain: +2.75 points (+2.75 in the paper), n = 3 and 3: more than two standard errors ({(2 / 3) ** 0.5:.2f})."
        in said
    )


def test_another_order() -> None:
    cells = as_printed()
    cells["plain"] = [99.0, 99.5, 100.0]
    assert correlation(cells)[0] == 11
    said = words({**cells, "resnet50": [1.0], "dbb": [100.0]}, {})  # which are in neither order
    assert "Two places or more higher here: plain (place 11 in the paper, 1 here)." in said
    assert "lower" not in said
    assert "repvgg minus plain: -24.36 points (+2.75 in the paper), n = 3 and 3: more than two standard errors" in said
    assert "the other way round." in said


@pytest.mark.parametrize(
    ("full", "plain", "said"),
    [
        (
            [75.0, 76.0, 77.0],
            [75.0, 75.5, 76.0],
            "+0.50 points (+2.75 in the paper), n = 3 and 3: within two standard errors (1.29)",
        ),
        ([75.0, 76.0], [72.0, 72.0, 72.0], "+3.50 points (+2.75 in the paper), n = 2 and 3: too few seeds to tell"),
        ([75.0, None, None], [72.0], "+3.00 points (+2.75 in the paper), n = 1 and 1: too few seeds to tell"),
    ],
)
def test_the_full_block_against_the_plain_one(full: list[float | None], plain: list[float | None], said: str) -> None:
    assert words({"repvgg": full, "plain": plain}, {}).startswith(f"repvgg minus plain: {said}")


def test_what_is_not_finished() -> None:
    pilot: Pilot = {
        "plain": {"0.1": 0.5, "0.05": "diverged", "0.2": None},
        "repvgg": {"0.05": None, "0.1": None, "0.2": 0.6},
        "acb": dict.fromkeys(("0.05", "0.1", "0.2")),
    }
    assert rates_of(pilot) == ["0.05", "0.1", "0.2"]
    said = words({"plain": [50.0, 51.0], "repvgg": [60.0]}, pilot)
    assert said.startswith(
        "Finished so far: 3 of 9 trainings of the pilot (each variant at each learning rate, seed 0), 1 of 6 with"
    )
    assert (
        "Each variant has the best finished of the learning rates 0.05, 0.1, 0.2 for seed 0, by accuracy on the same images" in said
    )
    whole = {name: dict.fromkeys(("0.1", "0.2"), 0.5) for name in B0S}
    assert "inished" not in words(as_printed(), whole)
    assert "has the best of the learning rates 0.1, 0.2 for seed 0" in words(as_printed(), whole)
    assert "seed 0 counts among the n" in words(as_printed(), whole)
    assert words({}, {}) == words({"plain": [None]}, {}) == ""


@given(numbers, st.randoms())
def test_spearman_agrees_with_scipy(values: list[int], random: object) -> None:
    stats = pytest.importorskip("scipy.stats")
    other = [v * 2 + (i % 3) for i, v in enumerate(values)]
    ours = spearman(values, other)
    if len(set(values)) == 1 or len(set(other)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(values, other).statistic)


def test_spearman_of_one_value() -> None:
    assert math.isnan(spearman([1], [2]))


def test_it_needs_no_pytorch() -> None:
    code = f"import sys, {agreement.__name__}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
