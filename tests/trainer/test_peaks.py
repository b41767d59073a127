"""Peaks of curves, and the metric of a mixture."""

from __future__ import annotations

import math

import pytest

from trainer.peaks import Champion, earliest_champion, first_best, is_better, overall
from trainer.strategy import Mode


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
    assert first_best(values, mode) == index


@pytest.mark.parametrize("mode", ["max", "min"])
def test_equal_is_not_better_and_anything_finite_beats_nothing(mode: Mode) -> None:
    assert not is_better(0.5, 0.5, mode)
    assert is_better(-3.0, None, mode)
    assert is_better(-3.0, math.nan, mode)
    assert not is_better(math.nan, None, mode)


def test_the_earliest_champion_and_ties_by_name() -> None:
    assert earliest_champion({"b": [1, 2, 1], "a": [1, 2, 1], "c": [1, 1, 2]}, "max") == Champion(
        name="a", index=1
    )
    assert earliest_champion({"a": [math.nan], "b": [1.0]}, "max") == Champion(name="b", index=0)
    assert earliest_champion({"a": [math.nan]}, "max") is None


def test_overall_weights_by_examples_or_not() -> None:
    metrics = {"a": 0.5, "b": 1.0, "ignored": 9.0}
    assert overall(metrics, {"a": 300, "b": 100}, "examples") == 0.625
    assert overall(metrics, {"a": 300, "b": 100}, "sub_datasets") == 0.75


def test_overall_does_not_depend_on_the_order_and_is_nan_if_one_is() -> None:
    metrics = {"a": 0.1, "b": 0.2, "c": 0.3}
    counts = {"a": 3, "b": 7, "c": 11}
    backwards = dict(reversed(counts.items()))
    assert overall(metrics, counts, "examples") == overall(metrics, backwards, "examples")
    assert math.isnan(overall(metrics | {"b": math.nan}, counts, "sub_datasets"))


def test_overall_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no sub-dataset"):
        overall({}, {}, "examples")
