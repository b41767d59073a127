"""A run that finds no room on the disk pauses: nothing is lost, and it can be resumed.

Invariant: whichever part of a run finds no room, the user gets one :class:`PausedError` that says
what was to be written, what stays in the store, and how to go on.

Example::

    with pausing(directory):
        ...                             # work that writes
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msft_store import OutOfSpaceError, OverBudgetError
from trainer.errors import PausedError
from trainer.files import is_full


def finds_no_room(error: BaseException) -> bool:
    """Return whether an error says that there is no room, on the disk or within ``max_disk``."""
    if isinstance(error, (OutOfSpaceError, OverBudgetError, PausedError)):
        return True
    return isinstance(error, Exception) and is_full(error)


@contextmanager
def pausing(directory: Path) -> Iterator[None]:
    """Raise :class:`PausedError` for whatever finds no room; other errors go on as they are."""
    try:
        yield
    except Exception as error:
        if not finds_no_room(error):
            raise
        advice = "make room on the disk"
        if isinstance(error, OverBudgetError):
            advice = f"raise max_disk in {directory / 'config.yaml'}"
        raise PausedError(
            f"the run is paused, for there is no room: {error}. Nothing that was written before is "
            f"lost: {advice}, then continue with `msft-train resume {directory}`"
        ) from error
