"""Tables and numbers as text."""

from __future__ import annotations

import math

import pytest

from trainer.text import Table, bytes_text, count_text, flops_text, metric_text

TABLE = Table(header=("name", "test"), rows=[("arith", "0.4"), ("b", "10.25")])


def test_columns_are_aligned_for_the_terminal() -> None:
    assert TABLE.to_text().splitlines() == [
        "name    test",
        "------------",
        "arith    0.4",
        "b      10.25",
    ]


def test_markdown_aligns_numbers_right() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "| name  |  test |",
        "| ----- | ----: |",
        "| arith |   0.4 |",
        "| b     | 10.25 |",
    ]


def test_words_are_aligned_left() -> None:
    table = Table(header=("a", "why"), rows=[("b", "because")], numeric=False)
    assert table.to_markdown().splitlines()[:2] == ["| a   | why     |", "| --- | ------- |"]
    assert table.to_text().splitlines()[0] == "a  why"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Table(header=("a", "b"), rows=[("c",)]).to_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.41249, "0.412"), (None, "-"), (math.nan, "-"), (math.inf, "inf")],
)
def test_metrics(value: float | None, text: str) -> None:
    assert metric_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_812_345, "4.8 MB"), (2.5e12, "2.5 TB")],
)
def test_bytes(value: float, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 FLOPs"), (1500, "1.50 kFLOPs"), (120 * 10**15, "120.00 PFLOPs"),
     (3 * 10**21, "3000.00 EFLOPs")],
)  # fmt: skip
def test_flops(value: int, text: str) -> None:
    assert flops_text(value) == text


def test_counts_have_separators() -> None:
    assert count_text(1234567) == "1,234,567"
