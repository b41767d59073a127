"""The journal's records in order, while some of them wait for a commit that is under way.

A record about a commit is written once the commit is durable, and what is recorded after it waits
behind it. So a journal has the same records in the same order however long a commit takes; records
that wait when a process dies are lost with the steps that they tell of, which resume does again.

Example::

    outbox = Outbox(journal)
    outbox.add_later(future, lambda: [("committed", {"checkpoint": future.result().id})])
    outbox.add("trained", step=1)           # waits behind it
    outbox.settle()                         # waits for the commit, writes both
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from trainer.journal import Journal, Record

Line = tuple[str, dict[str, Any]]
"""Event and fields of a record."""

_Waiting = tuple[Future[Any] | None, Callable[[], Iterable[Line]]]


class Outbox:
    """Writes a journal's records in the order in which they were added."""

    def __init__(
        self, journal: Journal | None, told: Callable[[Record], None] = lambda record: None
    ) -> None:
        """Without a journal nothing is written; ``told`` gets each record that was."""
        self._journal = journal
        self._told = told
        self._waiting: deque[_Waiting] = deque()

    def add(self, event: str, **fields: Any) -> None:
        """Write a record, behind those that wait."""
        self.add_later(None, lambda: [(event, fields)])

    def add_later(self, future: Future[Any] | None, lines: Callable[[], Iterable[Line]]) -> None:
        """Write the records that ``lines`` returns once ``future`` is done, at the earliest.

        ``lines`` is called once, when it is its turn, and may wait for ``future``.
        """
        self._waiting.append((future, lines))
        self.write_ready()

    def write_ready(self) -> None:
        """Write what need not wait."""
        while self._waiting:
            future, _ = self._waiting[0]
            if future is not None and not future.done():
                return
            self._write_next()

    def settle(self) -> None:
        """Write everything, and wait for what it tells of.

        An error of a commit is raised; nothing that was added after it is written.
        """
        while self._waiting:
            self._write_next()

    def _write_next(self) -> None:
        _, lines = self._waiting.popleft()
        try:
            for event, fields in lines():
                if self._journal is not None:
                    self._told(self._journal.append(event, **fields))
        except BaseException:
            self._waiting.clear()
            raise
