"""Plain SFT on recorded curves."""

from __future__ import annotations

import math

import pytest

from tests.support.recorded import Stages, play
from trainer.algorithms import Sft
from trainer.algorithms.base import Continue, Evaluation, Mode, Needs, Stage, Stop
from trainer.config.schema import OVERALL


def run(stages: Stages, mode: Mode = "max", epochs: float = 0.75) -> list[object]:
    strategy = Sft(sub_datasets=["b", "a"], mode=mode, compute_budget=epochs)
    return [one.decision for one in play(strategy, stages)]


@pytest.mark.parametrize(
    ("mode", "overall", "result"),
    [
        ("max", [0.1, 0.4, 0.4, 0.2], "s1e1"),
        ("min", [3.0, 2.0, 2.5, 1.0], "s1e3"),
        ("max", [0.5, 0.4, 0.4, 0.5], "s1e0"),
        ("max", [math.nan, 0.1, math.inf, math.nan], "s1e1"),
    ],
)
def test_one_stage_to_the_end_then_the_first_best_overall(
    mode: Mode, overall: list[float], result: str
) -> None:
    decisions = run([{"a": overall, "b": overall, "overall": overall}], mode)
    assert all(isinstance(decision, Continue) for decision in decisions[:3])
    last = decisions[3]
    assert isinstance(last, Stop)
    assert (last.checkpoint, last.exclude) == (result, ())


def test_without_a_finite_overall_the_end_is_the_result_and_the_reason_states_it() -> None:
    last = run([{"a": [0.1] * 4, "b": [0.2] * 4, "overall": [math.nan] * 4}])[-1]
    assert isinstance(last, Stop)
    assert last.checkpoint == "s1e3"
    assert "no evaluation of the run has a finite overall metric" in last.reason


def test_the_whole_mixture_is_trained_on_and_only_the_best_overall_is_needed() -> None:
    strategy = Sft(sub_datasets=["b", "a"], mode="max", compute_budget=2.0)
    assert strategy.first_stage() == Stage(number=1, active=("a", "b"), epochs=2.0)
    assert strategy.needs() == Needs(newest=True)
    for one in play(strategy, [{"a": [0.1] * 9, "b": [0.1] * 9, OVERALL: [0.1] * 9}]):
        assert one.evaluation.last == isinstance(one.decision, Stop)
        assert strategy.needs() == Needs()


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="no sub-dataset"):
        Sft(sub_datasets=[], mode="max", compute_budget=1.0)


def equal(index, loss, value=0.0, *, last=False):
    return Evaluation(
        stage=1,
        index=index,
        epoch=float(index),
        step=index,
        checkpoint=f"1.{index}",
        metrics={"a": value, "overall": value},
        losses={"a": loss},
        last=last,
    )


def test_of_checkpoints_that_tie_with_the_base_the_lowest_loss_wins() -> None:
    method = Sft(sub_datasets=["a"], mode="max", compute_budget=4.0)
    for index, loss in enumerate([2.0, 1.5, 1.0, 1.2]):
        assert isinstance(method.on_evaluation(equal(index, loss)), Continue)
        # The store cannot rank these by the metric, so it is told which to keep.
        assert method.needs().newest
        assert method.needs().checkpoints == (("1.0", "1.1", "1.2", "1.2")[index],)
    assert method.on_evaluation(equal(4, 3.0, last=True)).checkpoint == "1.2"


def test_a_better_metric_beats_every_loss() -> None:
    method = Sft(sub_datasets=["a"], mode="max", compute_budget=3.0)
    method.on_evaluation(equal(0, 2.0))
    method.on_evaluation(equal(1, 9.0, value=0.1))
    assert not method.needs().newest
    method.on_evaluation(equal(2, 1.0))
    assert method.on_evaluation(equal(3, 1.0, value=0.1, last=True)).checkpoint == "1.1"


def test_an_equal_loss_is_no_tie_that_a_loss_decides() -> None:
    method = Sft(sub_datasets=["a"], mode="min", compute_budget=1.0)
    method.on_evaluation(equal(0, 0.5, value=0.5))
    assert not method.needs().newest
    assert method.on_evaluation(equal(1, 0.5, value=0.5, last=True)).checkpoint == "1.0"
