"""Plan a stage: the order of its examples, its schedule, and the point where both start.

A stage starts afresh. If rollback points hold the optimizer's state, it continues the data order
and the schedule of the stage in which its root was saved.

Example::

    plan = plan_stage(config, sizes, 3, starts, known)
    plan.order, plan.steps_before
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from trainer.algorithms.base import LookAhead, Stage
from trainer.config.schema import Config
from trainer.data.batches import DataOrder, SampledOrder
from trainer.data.schedule import (
    Schedule,
    evaluation_interval,
    shares,
    stage_schedule,
    uneven_schedule,
)
from trainer.training.replay import KnownEvaluation, StageStart


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The data order of a stage, and its place in the schedule."""

    order: DataOrder | SampledOrder
    steps_before: int
    """Optimizer steps from the base to the stage's root that its schedule counts."""


def plan_stage(
    config: Config,
    sizes: Mapping[str, int],
    number: int,
    starts: Mapping[int, StageStart],
    known: Mapping[str, KnownEvaluation],
) -> StagePlan:
    """Return the plan of stage ``number``.

    If rollback points hold the optimizer's state, the plan continues that of the stage in which the
    root was saved, and so on back to the first stage. ``sizes`` are numbers of training examples,
    ``starts`` those of the stages so far, and ``known`` has the evaluations of all their roots.
    """
    stage, root = starts[number].stage, starts[number].root
    if root is None or not config.restores_optimizer:
        return StagePlan(order=make_order(config, stage, sizes), steps_before=0)
    origin = known[root]
    earlier = plan_stage(config, sizes, origin.stage, starts, known)
    order = cast(DataOrder, earlier.order)  # of MSFT, the only method that restores the optimizer
    return StagePlan(
        order=continue_order(order, config, stage, sizes, step=origin.step),
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
    trained = {name: sizes[name] for name in stage.trained}
    counts = count_examples(config, stage, sizes)
    seed, number, batch_size = config.seed, stage.number, config.train.batch_size
    if isinstance(stage.observe, LookAhead):
        return SampledOrder(
            seed=seed, stage=number, sizes=trained, counts=counts, batch_size=batch_size
        )
    return DataOrder.fresh(
        seed=seed,
        stage=number,
        sizes=trained,
        counts=counts,
        limits=stage.limits,
        floor=stage.floor,
        batch_size=batch_size,
    )


def continue_order(
    order: DataOrder, config: Config, stage: Stage, sizes: Mapping[str, int], *, step: int
) -> DataOrder:
    """Return the order that continues another one, before its step ``step``, as ``stage`` says."""
    trained = {name: sizes[name] for name in stage.trained}
    return order.continued(step=step, sizes=trained, counts=count_examples(config, stage, sizes))


def make_schedule(config: Config, stage: Stage, sizes: Mapping[str, int]) -> Schedule:
    """Return the steps and evaluations of a stage."""
    batch_size, eval_every = config.train.batch_size, config.evaluation.eval_every
    if stage.limits and isinstance(order := make_order(config, stage, sizes), DataOrder):
        schedule = uneven_schedule(
            order.epoch_sizes(stage.epochs),
            batch_size=batch_size,
            eval_every=eval_every,
            epochs=stage.epochs,
        )
    else:
        schedule = stage_schedule(
            examples=sum(count_examples(config, stage, sizes).values()),
            batch_size=batch_size,
            eval_every=eval_every,
            epochs=stage.epochs,
        )
    mixture = replace(stage, active=tuple(sizes), shares={})
    examples = sum(count_examples(config, mixture, sizes).values())
    mixture_steps = -(-examples // batch_size)
    return schedule.evaluated_every(
        evaluation_interval(config.evaluation, mixture_steps=mixture_steps)
    )


def find_carried(
    config: Config, stage: Stage, sizes: Iterable[str], *, index: int, is_last: bool
) -> frozenset[str]:
    """Return the sub-datasets that an evaluation does not measure; ``sizes`` names all of them.

    The evaluation of a stage's root, index 0, and the last one measure all.
    """
    if is_last or index % config.evaluation.excluded_every == 0:
        return frozenset()
    return frozenset(sizes) - {*stage.active}
