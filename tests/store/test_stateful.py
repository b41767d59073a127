"""Any sequence of operations, faults among them, against plain dictionaries; the quick form."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.histories import Tally
from tests.support.timelines import TimelineHistories


def test_a_store_is_what_its_history_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    tally = Tally()
    machine = type("Quick", (TimelineHistories,), {"tally": tally})
    short = settings(
        max_examples=15, stateful_step_count=40, deadline=None, database=None, derandomize=True
    )
    run_state_machine_as_test(machine, settings=short)
    assert tally.steps > 300
    assert tally.kills > 0
    assert tally.errors > 0
