"""What happens to a ref that two stores have: pure.

A ref moves to where it is in the source if the source knows the checkpoint that it pointed to in
the target: then who moved it in the source could know of that. Else somebody has moved it in the
target, and it stays.

Example::

    decide("best", here, there, known={"3fa9…"}, force=False)          # "move"
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from msft_store.objects.refs import Ref

TIMELINES = "timelines/"
Decision = Literal["same", "create", "move", "refuse"]


@dataclass(frozen=True, kw_only=True)
class RefMove:
    """A ref that was written."""

    name: str
    before: str | None
    """Id of the checkpoint that it pointed to; ``None``: it is new there."""
    after: str


def travels(name: str, *, timelines: bool) -> bool:
    """Return whether a ref goes along; those of timelines only where that is asked for."""
    return timelines or not name.startswith(TIMELINES)


def left_behind(names: Iterable[str], *, timelines: bool) -> int:
    """Return how many timelines have refs among names that do not go along."""
    left = (name for name in names if not travels(name, timelines=timelines))
    return len({name.removeprefix(TIMELINES).partition("/")[0] for name in left})


def decide(source: Ref, target: Ref | None, *, known: Collection[str], force: bool) -> Decision:
    """Return what becomes of a ref; ``known`` are the ids of the source's checkpoints."""
    if target is None:
        return "create"
    if target.checkpoint == source.checkpoint:
        return "same"
    return "move" if force or target.checkpoint in known else "refuse"


def refusal(source: Ref, target: Ref, *, here: str, there: str) -> str:
    """Return why a ref stays as it is ``there``, and what to do."""
    return (
        f"ref {source.name!r} points to {target.checkpoint[:12]} at {there}, which {here} does "
        f"not have, and to {source.checkpoint[:12]} at {here}"
    )
