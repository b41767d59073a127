"""The metric of a whole mixture."""

from __future__ import annotations

import math

import pytest

from trainer.algorithms.overall import mean_improvement, mean_metric


def test_overall_weights_by_examples_or_not() -> None:
    metrics = {"a": 0.5, "b": 1.0, "ignored": 9.0}
    assert mean_metric(metrics, {"a": 300, "b": 100}, "examples") == 0.625
    assert mean_metric(metrics, {"a": 300, "b": 100}, "sub_datasets") == 0.75


def test_overall_does_not_depend_on_the_order_and_is_nan_if_one_is() -> None:
    metrics = {"a": 0.1, "b": 0.2, "c": 0.3}
    counts = {"a": 3, "b": 7, "c": 11}
    backwards = dict(reversed(counts.items()))
    assert mean_metric(metrics, counts, "examples") == mean_metric(metrics, backwards, "examples")
    assert math.isnan(mean_metric(metrics | {"b": math.nan}, counts, "sub_datasets"))


def test_overall_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no sub-dataset"):
        mean_metric({}, {}, "examples")


def test_the_mean_improvement_mixes_units_and_directions() -> None:
    base = {"a": 0.5, "b": 2.0, "c": 0.0}
    metrics = {"a": 0.6, "b": 1.0, "c": 0.3}
    modes = {"a": "max", "b": "min", "c": "max"}
    assert mean_improvement(base, base, modes) == 0.0
    assert mean_improvement(metrics, base, modes) == pytest.approx((0.2 + 0.5 + 0.3) / 3)
    assert math.isnan(mean_improvement(metrics | {"b": math.nan}, base, modes))
    with pytest.raises(ValueError, match="no sub-dataset"):
        mean_improvement({}, {}, {})
