"""Shares of the sub-datasets in an epoch, whatever their sizes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.schedule import shares

SIZES = st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 10**9), min_size=1)
TEMPERATURES = st.floats(0.01, 1e6)


@given(SIZES, st.sampled_from(["proportional", "equal", "temperature"]), TEMPERATURES)
def test_an_epoch_has_as_many_examples_as_the_mixture(sizes, sampling, temperature):
    found = shares(sizes, sampling, temperature)
    assert found.keys() == sizes.keys()
    assert all(share >= 0 and math.isfinite(share) for share in found.values())
    assert sum(found[name] * n for name, n in sizes.items()) == pytest.approx(sum(sizes.values()))


@given(SIZES)
def test_proportional_has_every_example_exactly_once(sizes):
    assert shares(sizes, "proportional") == dict.fromkeys(sizes, 1.0)


@given(SIZES)
def test_equal_has_as_much_of_each(sizes):
    found = shares(sizes, "equal")
    each = sum(sizes.values()) / len(sizes)
    assert [found[name] * n for name, n in sizes.items()] == pytest.approx([each] * len(sizes))


@given(SIZES)
def test_temperature_lies_between_proportional_and_equal(sizes):
    assert shares(sizes, "temperature", 1.0) == pytest.approx(shares(sizes, "proportional"))
    assert shares(sizes, "temperature", 1e12) == pytest.approx(shares(sizes, "equal"))


@given(st.integers(1, 10**6), st.integers(1, 10**6), TEMPERATURES)
def test_temperature_is_a_power_of_the_sizes(a, b, temperature):
    found = shares({"a": a, "b": b}, "temperature", temperature)
    odds = (math.log(a) - math.log(b)) / temperature
    assert found["b"] * b == pytest.approx((a + b) / (1 + math.exp(odds)) if odds < 700 else 0.0)


def test_the_example_of_the_docstring():
    sizes = {"a": 900, "b": 100}
    assert shares(sizes, "equal") == pytest.approx({"a": 5 / 9, "b": 5.0})
    assert shares(sizes, "temperature", 2.0) == pytest.approx({"a": 5 / 6, "b": 2.5})


@pytest.mark.parametrize("temperature", [None, 0.0, -1.0, math.nan])
def test_a_temperature_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        shares({"a": 1}, "temperature", temperature)


def test_an_empty_sub_dataset_is_refused():
    with pytest.raises(ValueError, match="needs an example"):
        shares({"a": 1, "b": 0}, "equal")
