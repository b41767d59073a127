"""Averages as the result of a run: which checkpoints are kept, tried and chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.algorithms import Msft, Sft
from trainer.algorithms.averages import decay_weights, window_around
from trainer.algorithms.base import Average, Decision, Evaluation, RollBack, Stop
from trainer.algorithms.method import Method
from trainer.config.schema import OVERALL, AverageConfig, MsftConfig

OVERALLS = [2.0, 1.6, 1.2, 1.0, 1.1, 1.3, 1.4]
A = [2.0, 1.0, 1.5, 1.6, 1.7, 1.8, 1.9]
B = [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4]


def make_sft(kind: str, count: int = 3) -> Sft:
    average = AverageConfig(kind=kind, count=count)  # type: ignore[arg-type]
    return Sft(sub_datasets=["a", "b"], mode="min", compute_budget=1.5, average=average)


def evaluations(
    overalls: Sequence[float] = OVERALLS, *, stage: int = 1, **curves: Sequence[float]
) -> list[Evaluation]:
    rows = {"a": A, "b": B, **curves}
    return [
        Evaluation(
            stage=stage,
            index=i,
            epoch=i / 4,
            step=10 * i,
            checkpoint=f"s{stage}e{i}",
            metrics={OVERALL: value, **{name: row[i] for name, row in rows.items()}},
            last=i + 1 == len(overalls),
        )
        for i, value in enumerate(overalls)
    ]


def finish(
    strategy: Method,
    decision: Decision,
    last: Evaluation,
    value: Callable[[Mapping[str, float]], float],
) -> tuple[list[Mapping[str, float]], Decision]:
    """Answer every average with the overall metric ``value`` gives its weights."""
    tried = []
    while isinstance(decision, Average):
        tried.append(decision.weights)
        kept = set(strategy.needs().checkpoints)
        assert kept >= decision.weights.keys()
        metrics = {**last.metrics, OVERALL: value(decision.weights)}
        mean = replace(last, checkpoint=decision.checkpoint, metrics=metrics)
        decision = strategy.on_average(mean)
    return tried, decision


def play_sft(
    kind: str, value: Callable[[Mapping[str, float]], float], count: int = 3
) -> tuple[list[Mapping[str, float]], Decision]:
    strategy, rows = make_sft(kind, count), evaluations()
    for row in rows[:-1]:
        strategy.on_evaluation(row)
    return finish(strategy, strategy.on_evaluation(rows[-1]), rows[-1], value)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("last", {"s1e4": 1.0, "s1e5": 1.0, "s1e6": 1.0}),
        ("best", {"s1e2": 1.0, "s1e3": 1.0, "s1e4": 1.0}),
        ("champions", {"s1e1": 1.0, "s1e6": 1.0}),
        ("decay", dict(zip(["s1e4", "s1e5", "s1e6"], decay_weights(3), strict=True))),
    ],
)
def test_each_kind_tries_its_checkpoints_once_and_the_better_is_the_result(
    kind: str, weights: dict[str, float]
) -> None:
    tried, stop = play_sft(kind, lambda _: 0.9)
    assert tried == [weights]
    assert isinstance(stop, Stop)
    assert stop.checkpoint == "mean.1"
    assert "0.9" in stop.reason
    tried, stop = play_sft(kind, lambda _: 1.0)
    assert tried == [weights]
    assert isinstance(stop, Stop)
    assert stop.checkpoint == "s1e3"


def test_greedy_keeps_only_what_makes_the_average_better() -> None:
    values = {("s1e3", "s1e4"): 1.05, ("s1e3", "s1e2"): 0.8, ("s1e3", "s1e2", "s1e5"): 0.7}
    tried, stop = play_sft("greedy", lambda weights: values[tuple(weights)], count=4)
    assert [tuple(weights) for weights in tried] == list(values)
    assert isinstance(stop, Stop)
    assert stop.checkpoint == "mean.3"


def test_an_average_that_is_not_finite_is_never_the_result() -> None:
    _, stop = play_sft("last", lambda _: math.nan)
    assert isinstance(stop, Stop)
    assert stop.checkpoint == "s1e3"


def test_a_run_without_a_finite_metric_makes_no_average() -> None:
    strategy, rows = make_sft("last"), evaluations([math.nan] * 3)
    decisions = [strategy.on_evaluation(row) for row in rows]
    assert isinstance(decisions[-1], Stop)


def test_carried_values_are_neither_the_best_nor_its_surroundings() -> None:
    strategy, rows = make_sft("best"), evaluations()
    rows[3] = replace(rows[3], carried=("a",))
    decisions = [strategy.on_evaluation(row) for row in rows]
    assert isinstance(decisions[-1], Average)
    assert list(decisions[-1].weights) == ["s1e3", "s1e4", "s1e5"]


@given(st.integers(1, 12))
def test_decay_weights_stand_for_a_decay_of_the_learning_rate(count: int) -> None:
    weights = decay_weights(count)
    assert math.isclose(sum(weights), 1)
    for j in range(count):
        assert math.isclose(sum(weights[j:]), 1 - math.sqrt(j / count))


@given(st.integers(0, 20), st.integers(1, 21), st.integers(1, 8))
def test_a_window_has_its_index_and_stays_inside(index: int, length: int, count: int) -> None:
    index %= length
    window = window_around(index, length, count)
    assert index in window
    assert len(window) == min(count, length)
    assert 0 <= window[0] <= window[-1] < length


@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=14), st.integers(2, 6), st.data())
def test_what_an_average_needs_was_kept_at_every_evaluation(
    overalls: list[float], count: int, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["last", "best", "decay", "champions", "greedy"]))
    curves = {
        name: data.draw(st.lists(st.floats(0, 1), min_size=len(overalls), max_size=len(overalls)))
        for name in "ab"
    }
    strategy, kept = make_sft(kind, count), set()
    for row in evaluations(overalls, **curves):
        decision = strategy.on_evaluation(row)
        kept = {name for name in (*kept, row.checkpoint) if name in strategy.needs().checkpoints}
    if isinstance(decision, Average):
        assert decision.weights.keys() <= kept


def make_msft(**settings: object) -> Msft:
    return Msft(
        sub_datasets=["a", "b"],
        mode="min",
        compute_budget=1.5,
        settings=MsftConfig(**settings),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("overall", "target"), [(1.6, "mean.1"), (1.5, "mean.1"), (1.7, "s1e1")])
def test_a_stage_begins_from_the_average_around_a_peak_unless_the_peak_is_better(
    overall: float, target: str
) -> None:
    strategy = make_msft(rollback_average=3)
    rows = evaluations()
    decisions = [strategy.on_evaluation(row) for row in rows]
    tried, back = finish(strategy, decisions[-1], rows[-1], lambda _: overall)
    assert [list(weights) for weights in tried] == [["s1e0", "s1e1", "s1e2"]]
    assert isinstance(back, RollBack)
    assert (back.checkpoint, back.exclude) == (target, ("a",))


def test_what_an_average_around_a_peak_needs_was_kept() -> None:
    strategy, kept = make_msft(rollback_average=3), set()
    for row in evaluations():
        decision = strategy.on_evaluation(row)
        kept = {name for name in (*kept, row.checkpoint) if name in strategy.needs().checkpoints}
    assert isinstance(decision, Average)
    assert decision.weights.keys() <= kept


def test_an_average_that_was_not_requested_is_an_error() -> None:
    with pytest.raises(ValueError, match="no average was requested"):
        make_sft("none").on_average(evaluations()[0])
