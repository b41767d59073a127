"""``for_each`` calls a function once for each item, and stops at an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from msft_store.pipeline.parallel import for_each


@pytest.mark.parametrize("workers", [1, 3])
def test_each_item_is_taken_once(workers: int) -> None:
    taken: list[int] = []

    for_each(taken.append, iter(range(100)), workers)

    assert sorted(taken) == list(range(100))


def test_no_item_is_taken_after_an_error() -> None:
    taken: list[int] = []

    def fail_at_three(item: int) -> None:
        taken.append(item)
        if item == 3:
            raise ValueError(item)

    with pytest.raises(ValueError, match="3"):
        for_each(fail_at_three, iter(range(100)), 1)
    assert taken == [0, 1, 2, 3]


def test_of_several_errors_that_of_the_first_item_is_raised() -> None:
    meeting = threading.Barrier(2)

    def fail_together(item: int) -> None:
        meeting.wait(timeout=60)
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        for_each(fail_together, iter(range(2)), 2)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_the_items_is_raised(workers: int) -> None:
    def items() -> Iterator[int]:
        yield 0
        raise KeyError("items")

    with pytest.raises(KeyError, match="items"):
        for_each(lambda _: None, items(), workers)
