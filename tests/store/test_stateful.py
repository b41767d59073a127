"""Any sequence of operations, faults among them, against plain dictionaries; the quick form."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.histories import Histories, Tally
from tests.support.store_histories import StoreHistories
from tests.support.timelines import TimelineHistories


class AllHistories(StoreHistories, TimelineHistories):
    """Everything at once."""


@pytest.mark.parametrize("histories", [TimelineHistories, AllHistories])
def test_a_store_equals_its_model_after_a_random_history(
    monkeypatch: pytest.MonkeyPatch, histories: type[Histories]
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    tally = Tally()
    machine = type("Quick", (histories,), {"tally": tally})
    short = settings(
        max_examples=10, stateful_step_count=40, deadline=None, database=None, derandomize=True
    )
    run_state_machine_as_test(machine, settings=short)
    assert tally.steps > 200
    assert tally.kills > 0
    assert tally.errors > 0
