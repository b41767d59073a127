"""``for_each`` calls a function once for each item, ``in_order`` yields the results in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from msft_store.pipeline.parallel import for_each, in_order


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


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(in_order(lambda item: item * item, iter(range(50)), workers)) == [
        item * item for item in range(50)
    ]


def test_the_caller_works_while_the_first_result_is_not_ready() -> None:
    caller, begun = threading.get_ident(), threading.Event()

    def work(item: int) -> int:
        if threading.get_ident() == caller:
            begun.set()
        else:
            # Nothing but the caller can end this wait.
            assert begun.wait(timeout=60)
        return item

    assert list(in_order(work, iter(range(9)), 2)) == list(range(9))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_error_is_raised_where_its_result_would_come(workers: int) -> None:
    def work(item: int) -> int:
        if item >= 3:
            raise ValueError(item)
        return item

    results = in_order(work, iter(range(20)), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)


def test_only_a_few_results_are_computed_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = in_order(lambda item: item, items(), 2)
    assert next(results) == 0
    assert len(taken) <= 6
    results.close()


def test_an_interrupt_of_the_caller_does_not_wait_for_results_before_it() -> None:
    caller, interrupted = threading.get_ident(), threading.Event()

    def work(item: int) -> None:
        if threading.get_ident() == caller:
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(timeout=60)

    with pytest.raises(KeyboardInterrupt):
        next(in_order(work, iter(range(20)), 2))
