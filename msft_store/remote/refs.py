"""Decide how a transfer moves a ref that exists in both stores. Pure functions.

A ref follows the source if the source knows the checkpoint to which the target's ref points:
whoever moved it in the source could see that checkpoint. Otherwise another writer moved it in the
target, and it is left alone.

Example::

    decide_ref("best", here, there, known={"3fa9…"}, force=False)      # "move"
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from msft_store.errors import ConflictError
from msft_store.objects.refs import Ref

TIMELINES = "timelines/"
Decision = Literal["same", "create", "move", "refuse"]


@dataclass(frozen=True, kw_only=True)
class RefMove:
    """A ref that was created or moved in the target.

    Attributes:
        name: The ref's name.
        before: Id of the checkpoint to which it pointed, ``None`` if it is new.
        after: Id of the checkpoint to which it points now.
    """

    name: str
    before: str | None
    after: str


def is_transferred(name: str, *, timelines: bool) -> bool:
    """Return True if a ref is transferred; refs of timelines only on request."""
    return timelines or not name.startswith(TIMELINES)


def count_skipped_timelines(names: Iterable[str], *, timelines: bool) -> int:
    """Return the number of timelines among the names of refs that are not transferred."""
    left = (name for name in names if not is_transferred(name, timelines=timelines))
    return len({name.removeprefix(TIMELINES).partition("/")[0] for name in left})


def decide_ref(source: Ref, target: Ref | None, *, known: Collection[str], force: bool) -> Decision:
    """Return how to transfer a ref; ``known`` holds the ids of the source's checkpoints."""
    if target is None:
        return "create"
    if target.checkpoint == source.checkpoint:
        return "same"
    return "move" if force or target.checkpoint in known else "refuse"


def select_refs_to_move(
    pairs: Iterable[tuple[Ref, Ref | None]],
    *,
    known: Collection[str],
    force: bool,
    source: str,
    target: str,
    hint: str,
) -> list[tuple[Ref, Ref | None]]:
    """Return those pairs of a source's and a target's ref that have to be written.

    ``known`` holds the ids of the source's checkpoints. ``source``, ``target`` and ``hint``, which
    says what to do next, are for the message. Raises :class:`ConflictError` if another writer moved
    a ref of the target, unless ``force`` is true.
    """
    moves, reasons = [], []
    source, target = source.rstrip("/"), target.rstrip("/")
    for mine, theirs in pairs:
        decision = decide_ref(mine, theirs, known=known, force=force)
        if decision == "refuse" and theirs is not None:
            reasons.append(
                f"ref {mine.name!r} points to {theirs.checkpoint[:12]} at {target}, which {source} "
                f"does not have, and to {mine.checkpoint[:12]} at {source}"
            )
        elif decision != "same":
            moves.append((mine, theirs))
    if reasons:
        raise ConflictError(f"{'; '.join(reasons)}. {hint}")
    return moves
