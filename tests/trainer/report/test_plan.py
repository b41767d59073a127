"""The upper bounds of a run, computed by hand, and the schedule of a stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.algorithms.base import Stage
from trainer.config.schema import (
    AverageConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MsftConfig,
    TrainConfig,
)
from trainer.data.schedule import Schedule, stage_schedule
from trainer.report.flops import ModelSize
from trainer.report.plan import Counts, plan
from trainer.training.stage import make_schedule

SIZE = ModelSize(parameters=100, layers=2, hidden=5)
COUNTS = {
    name: Counts(
        train=count,
        train_tokens=10 * count,
        train_attention_tokens=100 * count,
        validation=4,
        validation_tokens=12,
        validation_attention_tokens=36,
    )
    for name, count in (("a", 40), ("b", 20), ("c", 60))
}


def config(
    method: Literal["msft", "sft"] = "msft",
    peak_window: int | None = None,
    max_stages: int | None = None,
    resume_every: int | None = None,
) -> Config:
    return Config(
        method=method,
        output_dir="out",
        resume_every=resume_every,
        model=ModelConfig(path="m"),
        data=DataConfig(),
        train=TrainConfig(batch_size=10, micro_batch_size=10),
        evaluation=EvalConfig(metric="loss", eval_every=0.5, max_new_tokens=2),
        msft=MsftConfig(compute_budget=1.0, peak_window=peak_window, max_stages=max_stages),
        average=AverageConfig(kind="none"),
    )


def test_the_upper_bound_of_msft_trains_the_whole_mixture_in_every_stage() -> None:
    bound = plan(config(), COUNTS, SIZE, 1000).at_most
    assert (bound.stages, bound.steps) == (6, 6 * 12)
    assert bound.evaluations == 1 + 6 * 2
    assert bound.trained_tokens == 6 * 1200
    assert bound.trained_flops == 600 * 7200 + 120 * 72000
    assert bound.evaluated_tokens == 13 * 36
    assert bound.evaluated_flops == 13 * (200 * 36 + 40 * 108)


def test_with_one_peak_a_stage_the_mixture_shrinks_from_the_smallest() -> None:
    bound = plan(config(), COUNTS, SIZE, 1000).one_peak_a_stage
    assert bound is not None
    assert (bound.stages, bound.steps) == (3, 12 + 10 + 6)
    assert bound.evaluations == 1 + 3 * 2
    assert bound.trained_tokens == 1200 + 1000 + 600


def test_max_stages_limits_both_bounds() -> None:
    made = plan(config(max_stages=2), COUNTS, SIZE, 1000)
    assert made.at_most.stages == 2
    assert made.one_peak_a_stage is not None
    assert made.one_peak_a_stage.steps == 12 + 10


def test_sft_is_one_stage_that_excludes_nothing() -> None:
    made = plan(config(method="sft"), COUNTS, SIZE, 1000)
    assert made.one_peak_a_stage is None
    assert (made.at_most.stages, made.at_most.steps, made.at_most.evaluations) == (1, 12, 3)


def test_generations_count_at_their_longest() -> None:
    counts = {name: replace(count, generates=True) for name, count in COUNTS.items()}
    bound = plan(config(method="sft"), counts, SIZE, 1000).at_most
    looked_back = 2 * 36 + 12 * (1 + 2)
    assert bound.evaluated_tokens == 3 * (36 + 12 * 2)
    assert bound.evaluated_flops == 3 * (200 * 60 + 40 * (108 + looked_back))


@pytest.mark.parametrize(
    ("method", "peak_window", "checkpoints"),
    [("msft", None, 3 + 3), ("msft", 1, 1 + 3), ("msft", 9, 3 + 3), ("sft", None, 2)],
)
def test_disk_is_bounded_by_full_copies(
    method: Literal["msft", "sft"], peak_window: int | None, checkpoints: int
) -> None:
    made = plan(config(method, peak_window=peak_window, resume_every=5), COUNTS, SIZE, 1000)
    assert made.checkpoints == checkpoints
    assert made.rollback_bytes == checkpoints * 1000
    assert made.resume_bytes == 3000


def test_max_disk_is_stated_in_bytes() -> None:
    made = plan(replace(config(), max_disk="1.5x"), COUNTS, SIZE, 2_000_000)
    assert made.max_disk == 3_000_000
    assert "takes 3.0 MB at most (max_disk); the run pauses if it needs more" in made.to_text()


def test_the_text_states_the_values_that_are_unknown_before_the_run() -> None:
    text = plan(config(peak_window=2), COUNTS, SIZE, 2_000_000).to_text()
    assert text.splitlines()[0].split("  ")[0] == "msft, peak window 2"
    assert "at most 5 at once, so at most 10.0 MB if each were a full copy (2.0 MB)" in text
    assert "which is unknown before the run" in text


@pytest.mark.parametrize(
    ("examples", "batch_size", "eval_every", "epochs", "expected"),
    [
        (1000, 64, 0.25, 1.0, Schedule(steps_per_epoch=16, steps=16, evaluations=(4, 8, 12, 16))),
        (100, 10, 0.3, 1.0, Schedule(steps_per_epoch=10, steps=10, evaluations=(3, 6, 9, 10))),
        (10, 64, 0.25, 2.0, Schedule(steps_per_epoch=1, steps=2, evaluations=(1, 2))),
        (100, 10, 0.1, 0.3, Schedule(steps_per_epoch=10, steps=3, evaluations=(1, 2, 3))),
        (10, 10, 0.1, 0.2, Schedule(steps_per_epoch=1, steps=1, evaluations=(1,))),
    ],
)
def test_schedules(
    examples: int, batch_size: int, eval_every: float, epochs: float, expected: Schedule
) -> None:
    made = stage_schedule(
        examples=examples, batch_size=batch_size, eval_every=eval_every, epochs=epochs
    )
    assert made == expected


@given(
    examples=st.integers(1, 5000),
    batch_size=st.integers(1, 128),
    eval_every=st.floats(0.05, 2),
    epochs=st.floats(0.05, 10),
)
def test_evaluations_ascend_to_the_last_step(
    examples: int, batch_size: int, eval_every: float, epochs: float
) -> None:
    made = stage_schedule(
        examples=examples, batch_size=batch_size, eval_every=eval_every, epochs=epochs
    )
    assert made.evaluations[-1] == made.steps
    assert list(made.evaluations) == sorted(set(made.evaluations))
    assert made.evaluations[0] >= 1


def test_a_stage_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        stage_schedule(examples=0, batch_size=1, eval_every=1, epochs=1)


@pytest.mark.parametrize(
    ("cadence", "eval_every", "expected"),
    [
        ("active", 0.5, (3, 6, 9, 12)),  # half an epoch of 60 examples
        ("mixture", 0.5, (5, 10, 12)),  # half an epoch of 100 examples
        ("mixture", 2.0, (12,)),
        ("steps", 7.0, (7, 12)),
        ("steps", 100.0, (12,)),
    ],
)
def test_a_cadence_of_the_mixture_or_in_steps_does_not_follow_the_active_set(
    cadence: Literal["active", "mixture", "steps"], eval_every: float, expected: tuple[int, ...]
) -> None:
    made = replace(config(), evaluation=EvalConfig(cadence=cadence, eval_every=eval_every))
    stage = Stage(number=2, active=("a",), epochs=2.0)
    assert make_schedule(made, stage, {"a": 60, "b": 40}).evaluations == expected


@pytest.mark.parametrize(
    ("cadence", "eval_every", "expected"),
    [("active", 0.5, (3, 6, 8, 9)), ("mixture", 0.5, (3, 6, 9)), ("steps", 4.0, (4, 8, 9))],
)
def test_epochs_of_different_length_have_any_cadence(
    cadence: Literal["active", "mixture", "steps"], eval_every: float, expected: tuple[int, ...]
) -> None:
    made = replace(config(), evaluation=EvalConfig(cadence=cadence, eval_every=eval_every))
    stage = Stage(number=2, active=("a", "b"), epochs=2.0, limits={"b": 1.0})
    assert make_schedule(made, stage, {"a": 30, "b": 30}).evaluations == expected


def test_the_plan_counts_only_what_excluded_every_measures() -> None:
    every = replace(config(), evaluation=EvalConfig(metric="loss", eval_every=0.25))
    seldom = replace(every, evaluation=replace(every.evaluation, excluded_every=4))
    all_measured = plan(every, COUNTS, SIZE, 1000).one_peak_a_stage
    made = plan(seldom, COUNTS, SIZE, 1000).one_peak_a_stage
    assert made is not None
    assert all_measured is not None
    # The base and 3 stages of 4 evaluations; the root of the third stage may be measured again.
    assert (all_measured.evaluations, made.evaluations) == (13, 14)
    assert all_measured.evaluated_tokens == 13 * 36
    assert made.evaluated_tokens == 36 + 4 * 36 + (3 * 24 + 36) + 36 + (3 * 12 + 36)
