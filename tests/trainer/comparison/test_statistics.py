"""Means, standard errors and deviations, by hand and by their properties."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.comparison.results import Estimate, estimate, estimate_difference, standard_deviation

numbers = st.floats(-1e6, 1e6)
by_seed = st.dictionaries(st.integers(0, 9), numbers, max_size=6)


def test_an_estimate_by_hand() -> None:
    found = estimate([0.61, 0.63, 0.62])
    assert found is not None
    assert found.mean == pytest.approx(0.62)
    assert found.error == pytest.approx(0.01 / math.sqrt(3))
    assert found.count == 3
    assert estimate([0.5]) == Estimate(mean=0.5, error=None, count=1)
    assert estimate([]) is None


def test_the_standard_deviation_is_that_of_the_population() -> None:
    assert standard_deviation([1.0, 3.0]) == 1.0
    assert standard_deviation([2.0]) == 0.0


def test_nan_is_not_ignored() -> None:
    found = estimate([0.5, math.nan])
    assert found is not None
    assert math.isnan(found.mean)
    assert found.error is not None
    assert math.isnan(found.error)


@given(st.lists(numbers, min_size=2, max_size=8))
def test_mean_and_error_are_those_of_the_standard_library(values: list[float]) -> None:
    found = estimate(values)
    assert found is not None
    assert min(values) <= found.mean <= max(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-6)
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert found.error == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert standard_deviation(values) == pytest.approx(
        statistics.pstdev(values), rel=1e-6, abs=1e-6
    )


@given(by_seed, by_seed, numbers)
def test_a_paired_difference_excludes_the_common_effect_of_a_seed(
    ours: dict[int, float], theirs: dict[int, float], effect: float
) -> None:
    there, back = estimate_difference(ours, theirs), estimate_difference(theirs, ours)
    shared = set(ours) & set(theirs)
    assert (there is None) == (not shared)
    if there is None or back is None:
        return
    assert there.count == len(shared)
    assert there.mean == pytest.approx(-back.mean, abs=1e-6)
    assert there.error == pytest.approx(back.error)
    moved = estimate_difference(
        {seed: value + effect for seed, value in ours.items()},
        {seed: value + effect for seed, value in theirs.items()},
    )
    assert moved is not None
    assert moved.mean == pytest.approx(there.mean, abs=1e-6)
