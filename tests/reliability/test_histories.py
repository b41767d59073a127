"""Thousands of random operations of a store and its timelines, with random faults.

After every step the store equals its model: no committed checkpoint is lost, an interrupted
operation is complete, partial or absent as documented, gc deletes nothing that a checkpoint or a
timeline needs, and every tensor of every checkpoint is as it was saved.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test

from tests.support.histories import Histories, Tally
from tests.support.ledger import Ledger
from tests.support.store_histories import StoreHistories
from tests.support.timelines import TimelineHistories


class AllHistories(StoreHistories, TimelineHistories):
    """Everything at once."""


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize("kind", [TimelineHistories, AllHistories])
def test_random_histories(faults: Ledger, seed: int, kind: type[Histories], *, soak: bool) -> None:
    tally, histories = Tally(), 600 if soak else 70
    machine = type("Long", (kind,), {"tally": tally, "ledger": faults})
    long = settings(
        max_examples=histories,
        stateful_step_count=60,
        deadline=None,
        database=None,
        # A history takes a second or so, which is slow for an example but is what it is for.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(seeded(seed)(machine), settings=long)
    assert tally.steps > 20 * histories
    assert tally.kills > histories / 4
    assert tally.errors > histories / 4
