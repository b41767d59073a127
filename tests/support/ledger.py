"""Counts of injected faults, and of those that broke a promise.

Example::

    with faults.inject("kill during a save"):
        kill_and_verify()
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Tally:
    """Faults of one kind."""

    injected: int = 0
    survived: int = 0

    @property
    def lost(self) -> int:
        """Faults after which a promise did not hold."""
        return self.injected - self.survived


class Ledger:
    """Counts faults by kind, from any thread."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self._counting = threading.Lock()

    @contextlib.contextmanager
    def inject(self, kind: str) -> Iterator[None]:
        """Count a fault; it was survived if this context, which verifies that, ends well."""
        with self._counting:
            tally = self.tallies.setdefault(kind, Tally())
            tally.injected += 1
        yield
        with self._counting:
            tally.survived += 1

    def table(self) -> str:
        """Return the counts as text, one line a kind and a sum."""
        rows = sorted(self.tallies.items())
        total = Tally(
            injected=sum(tally.injected for _, tally in rows),
            survived=sum(tally.survived for _, tally in rows),
        )
        width = max([len("all"), *(len(kind) for kind, _ in rows)])
        lines = [f"{'fault':{width}}  injected  survived  lost"]
        lines += [
            f"{kind:{width}}  {tally.injected:8,}  {tally.survived:8,}  {tally.lost:4,}"
            for kind, tally in [*rows, ("all", total)]
        ]
        return "\n".join(lines)
