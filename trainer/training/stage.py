"""What a stage trains on, and where it takes up data and schedule.

It begins anew, or where its root stands in an earlier stage.

Example::

    course = course_of(3, begun, known, fresh=order_of, carries=True)
    course.order, course.steps_before
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.algorithms.base import LookAhead, Stage
from trainer.config.schema import Config
from trainer.data.batches import DataOrder, SampledOrder
from trainer.data.sampling import shares
from trainer.data.schedule import Schedule, stage_schedule, uneven_schedule
from trainer.training.replay import Known


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a stage begins."""

    order: DataOrder | SampledOrder
    steps_before: int
    """Optimizer steps from the base to the stage's root that its schedule counts."""


def course_of(
    number: int,
    begun: Mapping[int, tuple[Stage, str | None]],
    known: Mapping[str, Known],
    *,
    fresh: Callable[[Stage], DataOrder | SampledOrder],
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
    if isinstance(earlier.order, SampledOrder):
        raise ValueError("what is drawn by weights cannot be gone on with in another stage")
    return Course(
        order=earlier.order.continued(step=place.step, active=stage.active),
        steps_before=earlier.steps_before + place.step,
    )


def examples_of(config: Config, stage: Stage, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return how many examples of each sub-dataset an epoch of a stage has, at least one of each.

    ``sizes`` are all examples of all sub-datasets. What ``data.sampling`` takes of each follows
    from the whole mixture, so an exclusion does not change what the others have of an epoch.
    """
    sampled = shares(sizes, config.data.sampling, config.data.temperature)
    return {
        name: max(1, round(sizes[name] * sampled[name] * stage.shares.get(name, 1.0)))
        for name in stage.trained
    }


def fresh_order(config: Config, stage: Stage, sizes: Mapping[str, int]) -> DataOrder | SampledOrder:
    """Return the order of a stage that begins anew; one that looks ahead draws by weights."""
    if isinstance(stage.observe, LookAhead):
        return SampledOrder(
            seed=config.seed,
            stage=stage.number,
            sizes={name: sizes[name] for name in stage.trained},
            counts=examples_of(config, stage, sizes),
            batch_size=config.train.batch_size,
        )
    return _plain_order(config, stage, sizes)


def _plain_order(config: Config, stage: Stage, sizes: Mapping[str, int]) -> DataOrder:
    return DataOrder.fresh(
        seed=config.seed,
        stage=stage.number,
        sizes={name: sizes[name] for name in stage.trained},
        counts=examples_of(config, stage, sizes),
        limits=stage.limits,
        batch_size=config.train.batch_size,
    )


def schedule_of(config: Config, stage: Stage, sizes: Mapping[str, int]) -> Schedule:
    """Return the steps and evaluations of a stage."""
    batch_size, eval_every = config.train.batch_size, config.evaluation.eval_every
    if stage.limits:
        return uneven_schedule(
            _plain_order(config, stage, sizes).epoch_sizes(stage.epochs),
            batch_size=batch_size,
            eval_every=eval_every,
            epochs=stage.epochs,
        )
    return stage_schedule(
        examples=sum(examples_of(config, stage, sizes).values()),
        batch_size=batch_size,
        eval_every=eval_every,
        epochs=stage.epochs,
    )
