"""MSFT's decisions on recorded curves, against answers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.recorded import Decided, curve_names, load_curve, make_msft, play
from trainer.algorithms import Msft
from trainer.algorithms.base import Continue, Evaluation, Needs, RollBack, Stage, Stop
from trainer.config.schema import OVERALL


def as_expected(one: Decided) -> dict[str, Any]:
    decision = one.decision
    assert not isinstance(decision, Continue)
    row: dict[str, Any] = {
        "stage": one.evaluation.stage,
        "index": one.evaluation.index,
        "do": "stop" if isinstance(decision, Stop) else "roll_back",
        "to": decision.checkpoint,
        "exclude": list(decision.exclude),
    }
    if isinstance(decision, RollBack):
        row["next"] = list(decision.stage.active)
    return row


@pytest.mark.parametrize("name", curve_names())
def test_decisions_equal_the_hand_worked_ones(name: str) -> None:
    curve = load_curve(name)
    played = play(make_msft(curve), curve["stages"])
    decided = [one for one in played if not isinstance(one.decision, Continue)]
    wanted = [{k: v for k, v in row.items() if k != "why"} for row in curve["expected"]]
    assert [as_expected(one) for one in decided] == wanted
    for one, row in zip(decided, curve["expected"], strict=True):
        assert row.get("why", "") in one.decision.reason


def test_a_stage_follows_with_the_next_number_and_the_same_budget() -> None:
    curve = load_curve("ties")
    strategy = make_msft(curve)
    assert strategy.first_stage() == Stage(number=1, active=("a", "b", "c"), epochs=1.0)
    decisions = [one.decision for one in play(strategy, curve["stages"])]
    stages = [decision.stage for decision in decisions if isinstance(decision, RollBack)]
    assert stages == [
        Stage(number=2, active=("b", "c"), epochs=1.0),
        Stage(number=3, active=("c",), epochs=1.0),
    ]
    assert strategy.first_stage().number == 1


def test_needs_shrink_with_the_mixture_and_end_with_the_best_overall() -> None:
    curve = load_curve("peak_window")
    strategy = make_msft(curve)
    assert strategy.needs() == Needs(champions=("a", "b", "c"), peak_window=2, newest=True)
    for evaluation in (one.evaluation for one in play(make_msft(curve), curve["stages"])):
        decision = strategy.on_evaluation(evaluation)
        if isinstance(decision, RollBack):
            assert strategy.needs() == Needs(champions=decision.stage.active, peak_window=2)
    assert strategy.needs() == Needs(champions=(), best=(OVERALL,))


def test_a_sub_dataset_that_is_excluded_no_longer_decides() -> None:
    curve = load_curve("ties")
    played = play(make_msft(curve), curve["stages"])
    excluded_earlier = played[9]
    assert excluded_earlier.evaluation.metrics["a"] < 0.5
    assert isinstance(excluded_earlier.decision, RollBack)
    assert excluded_earlier.decision.exclude == ("b",)


def test_twice_as_many_stages_as_sub_datasets_is_the_default_limit() -> None:
    assert Msft(sub_datasets="abc", mode="max", compute_budget=1).max_stages == 6


def test_evaluations_out_of_order_are_refused() -> None:
    curve = load_curve("last_sub_dataset")
    played = play(make_msft(curve), curve["stages"])
    strategy = make_msft(curve)
    with pytest.raises(ValueError, match="expected evaluation 0 of stage 1, got evaluation 1"):
        strategy.on_evaluation(played[1].evaluation)


def test_nothing_follows_the_end() -> None:
    curve = load_curve("last_sub_dataset")
    strategy = make_msft(curve)
    played = play(strategy, curve["stages"])
    with pytest.raises(ValueError, match="the run is over"):
        strategy.on_evaluation(played[-1].evaluation)


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="no sub-dataset"):
        Msft(sub_datasets=[], mode="max", compute_budget=1)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """A random recording, long enough for every run; few distinct values, so that many tie."""
    names = draw(st.sampled_from(["a", "ab", "abc", "abcd"]))
    evaluations = draw(st.integers(1, 5))
    value = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.just(math.nan))
    curve = st.lists(value, min_size=evaluations + 1, max_size=evaluations + 1)
    stage = st.fixed_dictionaries(dict.fromkeys([*names, OVERALL], curve))
    stages = 2 * len(names)
    return {
        "mode": draw(st.sampled_from(["max", "min"])),
        "compute_budget": evaluations * 0.25,
        "peak_window": draw(st.none() | st.integers(1, 4)),
        "stages": draw(st.lists(stage, min_size=stages, max_size=stages)),
    }


@given(curve=runs())
@settings(max_examples=150, deadline=None)
def test_the_same_evaluations_again_give_the_same_decisions(curve: dict[str, Any]) -> None:
    first, again = make_msft(curve), make_msft(curve)
    for one in play(first, curve["stages"]):
        assert again.on_evaluation(one.evaluation) == one.decision
        assert not (one.evaluation.last and isinstance(one.decision, Continue))
    assert again.needs() == first.needs()


@given(curve=runs())
@settings(max_examples=150, deadline=None)
def test_every_named_checkpoint_was_among_the_needed_ones(curve: dict[str, Any]) -> None:
    """A decision names the newest checkpoint, a champion of the stage, or the best overall."""
    mode = max if curve["mode"] == "max" else min
    played = play(make_msft(curve), curve["stages"])
    seen: list[Evaluation] = []
    for one in played:
        seen.append(one.evaluation)
        if isinstance(one.decision, Continue):
            continue
        stage = [e for e in seen if e.stage == one.evaluation.stage]
        finite = [e for e in seen if math.isfinite(e.metrics[OVERALL])]
        champions = set()
        for name in set(one.evaluation.metrics) - {OVERALL}:
            values = [e for e in stage if math.isfinite(e.metrics[name])]
            if values:
                champions.add(mode(values, key=lambda e: e.metrics[name]).checkpoint)
        best = {mode(finite, key=lambda e: e.metrics[OVERALL]).checkpoint} if finite else set()
        assert one.decision.checkpoint in champions | best | {one.evaluation.checkpoint}
