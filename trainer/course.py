"""Where a stage takes up data and schedule: anew, or where its root stands in an earlier stage.

Example::

    course = course_of(3, begun, known, fresh=order_of, carries=True)
    course.order, course.steps_before
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.batches import DataOrder
from trainer.resume import Known
from trainer.strategy import Stage


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a stage begins."""

    order: DataOrder
    steps_before: int
    """Optimizer steps from the base to the stage's root that its schedule counts."""


def course_of(
    number: int,
    begun: Mapping[int, tuple[Stage, str | None]],
    known: Mapping[str, Known],
    *,
    fresh: Callable[[Stage], DataOrder],
    carries: bool,
) -> Course:
    """Return the course of stage ``number``, of those that have ``begun`` with their roots.

    If stages carry their state on, it follows from the stage in which the root was made, and so on
    down to the first one, which begins anew.
    """
    stage, root = begun[number]
    if root is None or not carries:
        return Course(order=fresh(stage), steps_before=0)
    place = known[root]
    earlier = course_of(place.stage, begun, known, fresh=fresh, carries=carries)
    return Course(
        order=earlier.order.continued(step=place.step, active=stage.active),
        steps_before=earlier.steps_before + place.step,
    )
