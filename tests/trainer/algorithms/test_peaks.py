"""Peaks of curves, and the metric of a mixture."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.algorithms.base import Mode
from trainer.algorithms.peaks import (
    PeakRule,
    champions,
    first_best_index,
    is_better,
)


@pytest.mark.parametrize(
    ("values", "mode", "index"),
    [
        ([0.1, 0.4, 0.4, 0.2], "max", 1),
        ([0.1, 0.4, 0.4, 0.2], "min", 0),
        ([math.nan, 0.4, math.inf], "max", 1),
        ([-math.inf, 2.0, 1.0], "min", 2),
        ([math.nan, math.inf], "max", None),
        ([], "max", None),
        ([-0.0, 0.0], "max", 0),
    ],
)
def test_first_best(values: list[float], mode: Mode, index: int | None) -> None:
    assert first_best_index(values, mode) == index


@pytest.mark.parametrize("mode", ["max", "min"])
def test_equal_is_not_better_and_anything_finite_beats_nothing(mode: Mode) -> None:
    assert not is_better(0.5, 0.5, mode)
    assert is_better(-3.0, None, mode)
    assert is_better(-3.0, math.nan, mode)
    assert not is_better(math.nan, None, mode)


def test_champions_come_by_index_and_of_equals_by_name() -> None:
    curves = {"b": [1, 2, 1], "a": [1, 2, 1], "c": [1, 1, 2], "d": [math.nan] * 3}
    errors = dict.fromkeys(curves, [math.nan] * 3)
    assert champions(curves, errors, dict.fromkeys(curves, "max"), PeakRule()) == [
        (1, "a"),
        (1, "b"),
        (2, "c"),
    ]
    assert champions({"a": [math.nan]}, {"a": [0.1]}, {"a": "max"}, PeakRule()) == []


CURVES = st.lists(
    st.tuples(
        st.one_of(st.floats(-5, 5), st.just(math.nan)),
        st.one_of(st.floats(0, 1), st.just(math.nan)),
    ),
    max_size=12,
)


@given(CURVES, st.sampled_from(["max", "min"]))
def test_the_default_rule_is_the_first_best_value(
    curve: list[tuple[float, float]], mode: Mode
) -> None:
    values, errors = [value for value, _ in curve], [error for _, error in curve]
    assert PeakRule().peak(values, errors, mode) == first_best_index(values, mode)


@given(CURVES, st.floats(0, 3), st.floats(0, 1) | st.just(math.nan))
def test_a_margin_never_makes_a_peak_later_and_directions_mirror_each_other(
    curve: list[tuple[float, float]], margin: float, error: float
) -> None:
    # One error for all: a later value that is known better may pass where an equal one did not.
    values, errors = [value for value, _ in curve], [error for _ in curve]
    rule = PeakRule(margin=margin)
    peak, plain = rule.peak(values, errors, "max"), first_best_index(values, "max")
    assert (peak is None) == (plain is None)
    assert peak is None or plain is None or peak <= plain
    assert rule.peak([-value for value in values], errors, "min") == peak


def test_noise_is_smoothed_and_an_improvement_within_the_margin_is_none() -> None:
    noisy = [0.1, 0.5, 0.2, 0.4, 0.45, 0.44]
    none = [math.nan] * 6
    assert PeakRule().peak(noisy, none, "max") == 1
    assert PeakRule(smoothing=2).peak(noisy, none, "max") == 5
    rising = [0.30, 0.40, 0.42, 0.43, 0.47]
    assert PeakRule(margin=2).peak(rising, [0.02] * 5, "max") == 4
    assert PeakRule(margin=4).peak(rising, [0.02] * 5, "max") == 1


def test_a_peak_has_passed_after_some_evaluations() -> None:
    assert [PeakRule().has_passed(3, last) for last in (3, 4)] == [False, True]
    assert [PeakRule(patience=3).has_passed(3, last) for last in (5, 6)] == [False, True]
