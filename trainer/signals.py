"""A clean end on SIGTERM and SIGINT.

Example::

    with Interrupts() as interrupts:
        ...                         # work that calls interrupts.check() where it may end
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 - not an error: the user or the scheduler asked for it
    """A run was ended by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.directory = "RUN"
        """The directory of the run, if known."""


class Interrupts:
    """Records the first signal; a second one has its usual effect, which ends the process."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal was received."""
        if self.number is not None:
            raise Interrupted(self.number)

    def __enter__(self) -> Interrupts:
        """Install the handlers; Python allows that in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._record) for n in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _record(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
