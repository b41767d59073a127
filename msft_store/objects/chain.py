"""The depth that a checkpoint may have in a chain of references, by its position in a history.

Against the checkpoint just before it, a checkpoint takes the fewest bytes; but if each one did
that, the chain would be as long as the history. So positions decide, as in a skip list: a few
checkpoints are encoded against old and shallow ones, most against one that is a few steps away.
Pure. Invariant: no depth that a history gives to its checkpoints is above 5.

Example::

    newest_allowed(allowed_depth(4, 4), [2, 3, 2, 1])    # 0: position 4 may have depth 3
"""

from __future__ import annotations

from collections.abc import Iterable

_RHYTHM = (1, 2, 3, 2, 3, 4, 5, 2, 3, 4, 3, 4, 5, 2, 3, 4, 3, 4, 4, 5)
"""Depth of each of 20 consecutive positions; then it begins again."""
_FEW, _DEPTH_OF_FEW = 8, 5
REACH = 2 * len(_RHYTHM)
"""Number of checkpoints, the newest first, among which the rhythm always finds a reference."""


def allowed_depth(position: int, there: int) -> int:
    """Return the largest depth that a checkpoint may have.

    ``position`` is the number of checkpoints that its history had before it, ``there`` the number
    of those that are still there.
    """
    # Few checkpoints of a longer history hardly form a chain, so nearness counts.
    return _DEPTH_OF_FEW if there < min(position, _FEW) else _RHYTHM[position % len(_RHYTHM)]


def newest_allowed(allowed: int, depths: Iterable[int]) -> int | None:
    """Return the place of the first depth that a checkpoint of an allowed depth may refer to.

    ``depths`` are those of the earlier checkpoints, the newest first. The result is ``None`` if the
    checkpoint may refer to none of them.
    """
    return next((place for place, depth in enumerate(depths) if depth < allowed), None)
