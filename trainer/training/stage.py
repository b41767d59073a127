"""Plan a stage: the order of its examples, its schedule, and the point where both start.

A stage starts afresh. If rollback points hold the optimizer's state, it continues the data order
and the schedule of the stage in which its root was saved.

Example::

    plan = plan_stage(3, starts, known, fresh=make_order, continues=True)
    plan.order, plan.steps_before
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.algorithms.base import LookAhead, Stage
from trainer.config.schema import Config
from trainer.data.batches import DataOrder, SampledOrder
from trainer.data.sampling import shares
from trainer.data.schedule import Schedule, stage_schedule, uneven_schedule
from trainer.training.replay import KnownEvaluation, StageStart


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The data order of a stage, and its place in the schedule."""

    order: DataOrder | SampledOrder
    steps_before: int
    """Optimizer steps from the base to the stage's root that its schedule counts."""


def plan_stage(
    number: int,
    starts: Mapping[int, StageStart],
    known: Mapping[str, KnownEvaluation],
    *,
    fresh: Callable[[Stage], DataOrder | SampledOrder],
    continues: bool,
) -> StagePlan:
    """Return the plan of stage ``number``.

    With ``continues`` it follows from the plan of the stage in which the root was saved, and so on
    back to the first stage, which starts with the order that ``fresh`` makes.
    """
    stage, root = starts[number].stage, starts[number].root
    if root is None or not continues:
        return StagePlan(order=fresh(stage), steps_before=0)
    origin = known[root]
    earlier = plan_stage(origin.stage, starts, known, fresh=fresh, continues=continues)
    if isinstance(earlier.order, SampledOrder):
        raise ValueError("an order that is drawn by weights cannot continue in another stage")
    return StagePlan(
        order=earlier.order.continued(step=origin.step, active=stage.active),
        steps_before=earlier.steps_before + origin.step,
    )


def count_examples(config: Config, stage: Stage, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the number of examples of each sub-dataset in an epoch of a stage, at least one.

    ``sizes`` are the training examples of all sub-datasets. The share that ``data.sampling`` takes
    of each follows from the whole mixture, so an exclusion does not change the other sub-datasets.
    """
    sampled = shares(sizes, config.data.sampling, config.data.temperature)
    return {
        name: max(1, round(sizes[name] * sampled[name] * stage.shares.get(name, 1.0)))
        for name in stage.trained
    }


def make_order(config: Config, stage: Stage, sizes: Mapping[str, int]) -> DataOrder | SampledOrder:
    """Return the data order of a stage that starts afresh; one with probes draws by weights."""
    if isinstance(stage.observe, LookAhead):
        return SampledOrder(
            seed=config.seed,
            stage=stage.number,
            sizes={name: sizes[name] for name in stage.trained},
            counts=count_examples(config, stage, sizes),
            batch_size=config.train.batch_size,
        )
    return _make_plain_order(config, stage, sizes)


def _make_plain_order(config: Config, stage: Stage, sizes: Mapping[str, int]) -> DataOrder:
    return DataOrder.fresh(
        seed=config.seed,
        stage=stage.number,
        sizes={name: sizes[name] for name in stage.trained},
        counts=count_examples(config, stage, sizes),
        limits=stage.limits,
        batch_size=config.train.batch_size,
    )


def make_schedule(config: Config, stage: Stage, sizes: Mapping[str, int]) -> Schedule:
    """Return the steps and evaluations of a stage."""
    batch_size, eval_every = config.train.batch_size, config.evaluation.eval_every
    if stage.limits:
        return uneven_schedule(
            _make_plain_order(config, stage, sizes).epoch_sizes(stage.epochs),
            batch_size=batch_size,
            eval_every=eval_every,
            epochs=stage.epochs,
        )
    return stage_schedule(
        examples=sum(count_examples(config, stage, sizes).values()),
        batch_size=batch_size,
        eval_every=eval_every,
        epochs=stage.epochs,
    )
