"""The methods other than MSFT, on invented curves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.recorded import play
from trainer.algorithms import Continual, Dynamix, Ies, Msft, Sft, SingleRollout
from trainer.algorithms.base import (
    Continue,
    Evaluation,
    ExampleLosses,
    LookAhead,
    Needs,
    Observation,
    RollBack,
    Stage,
    Stop,
)
from trainer.algorithms.dynamix import probabilities, rescale_rewards
from trainer.algorithms.ies import is_mastered
from trainer.config.schema import OVERALL, DynamixConfig, IesConfig, MsftConfig

SIZES = {"a": 30.0, "b": 10.0, "c": 60.0}


def decisions(strategy, stages):
    played = play(strategy, stages)
    return [one.decision for one in played if not isinstance(one.decision, Continue)]


def flat(names, count, **curves):
    """Curves of ``count`` evaluations that rise throughout, where nothing else is given."""
    rising = [index / 10 for index in range(count)]
    return {name: curves.get(name, rising) for name in (*names, OVERALL)}


def test_continual_takes_one_sub_dataset_after_the_other_in_the_given_order():
    strategy = Continual(sub_datasets=["c", "a", "b"], mode="max", compute_budget=0.5)
    overall = [[0.1, 0.2, 0.3], [0.3, 0.9, 0.2], [0.2, 0.1, 0.4]]
    stages = [flat("abc", 3, **{OVERALL: row}) for row in overall]
    assert strategy.first_stage() == Stage(number=1, active=("c",), epochs=0.5)
    first, second, stop = decisions(strategy, stages)
    assert first.stage == Stage(number=2, active=("a",), epochs=0.5)
    assert (first.checkpoint, first.exclude) == ("s1e2", ("c",))
    assert second.stage == Stage(number=3, active=("b",), epochs=0.5)
    assert (second.checkpoint, second.exclude) == ("s2e2", ("a",))
    assert isinstance(stop, Stop)
    assert (stop.checkpoint, stop.exclude) == ("s2e1", ("b",))


def test_a_single_rollout_begins_again_at_the_base_with_each_peak_as_a_limit():
    strategy = SingleRollout(sub_datasets=SIZES, mode="max", compute_budget=1.0)
    rollout = flat("abc", 5, a=[0.1, 0.5, 0.5, 0.4, 0.3], b=[0.9, 0.8, 0.7, 0.6, 0.5])
    assert strategy.needs().checkpoints == ()
    back, stop = decisions(strategy, [rollout, flat("ac", 5) | {"b": [0.9] * 5}])
    assert isinstance(back, RollBack)
    assert (back.checkpoint, back.exclude) == ("s1e0", ("b",))
    assert back.stage == Stage(number=2, active=("a", "c"), epochs=1.0, limits={"a": 0.25})
    assert isinstance(stop, Stop)


def test_a_soft_single_rollout_keeps_a_share_of_each_from_its_peak_on():
    strategy = SingleRollout(sub_datasets=SIZES, mode="max", compute_budget=1.0, floor=0.2)
    rollout = flat("abc", 5, a=[0.1, 0.5, 0.5, 0.4, 0.3], b=[0.9, 0.8, 0.7, 0.6, 0.5])
    back, _ = decisions(strategy, [rollout, flat("ac", 5) | {"b": [0.9] * 5}])
    assert back.exclude == ("b",)
    assert back.stage == Stage(
        number=2, active=("a", "c"), epochs=1.0, shares={"b": 0.2}, limits={"a": 0.25}, floor=0.2
    )
    assert "the second run keeps 0.2 of each from there on" in back.reason


def test_a_single_rollout_keeps_the_base_until_it_has_gone_back():
    strategy = SingleRollout(sub_datasets=SIZES, mode="max", compute_budget=1.0)
    rollout = flat("abc", 5, a=[0.1, 0.5, 0.5, 0.4, 0.3])
    for one in play(
        SingleRollout(sub_datasets=SIZES, mode="max", compute_budget=1.0), [rollout] * 2
    ):
        strategy.on_evaluation(one.evaluation)
        if one.evaluation.stage == 1 and not one.evaluation.last:
            assert strategy.needs().checkpoints == ("s1e0",)
        else:
            assert strategy.needs().checkpoints == ()


@pytest.mark.parametrize(
    ("curves", "why"),
    [
        ({}, "a second run would be the same"),
        ({name: [0.9, 0.1, 0.1, 0.1, 0.1] for name in "abc"}, "before any training"),
    ],
)
def test_a_single_rollout_ends_where_a_second_run_is_of_no_use(curves, why):
    strategy = SingleRollout(sub_datasets=SIZES, mode="max", compute_budget=1.0)
    (stop,) = decisions(strategy, [flat("abc", 5, **curves)])
    assert isinstance(stop, Stop)
    assert why in stop.reason


def test_the_second_run_is_no_longer_than_its_last_limit():
    strategy = SingleRollout(sub_datasets=["a", "b"], mode="max", compute_budget=1.0)
    rollout = flat("ab", 5, a=[0.1, 0.5, 0.4, 0.4, 0.3], b=[0.1, 0.2, 0.9, 0.6, 0.5])
    back = strategy_end(strategy, rollout)
    assert back.stage.epochs == 0.5
    assert back.stage.limits == {"a": 0.25, "b": 0.5}


def strategy_end(strategy, curves):
    """Play one stage to a strategy; return its decision at the end."""
    count = len(curves[OVERALL])
    for index in range(count):
        decision = strategy.on_evaluation(
            Evaluation(
                stage=1,
                index=index,
                epoch=index * 0.25,
                step=index,
                checkpoint=f"s1e{index}",
                metrics={name: values[index] for name, values in curves.items()},
                last=index == count - 1,
            )
        )
    return decision


def losses(epoch, **values):
    return Observation(stage=1, step=epoch, epoch=epoch, values=values)


def test_ies_leaves_out_mastered_examples_and_takes_them_up_again():
    strategy = Ies(
        sub_datasets=["a"],
        mode="min",
        compute_budget=8.0,
        settings=IesConfig(delta=0.05, average=1),
    )
    assert strategy.first_stage().observe == ExampleLosses()
    rows = [[2.0, 1.0, 3.0], [1.0, 0.9, 3.0], [0.5, 0.8, math.nan], [0.0, 0.1, 3.0]]
    mastered = [
        strategy.on_observation(losses(n, a=row)).mastered for n, row in enumerate(rows, start=1)
    ]
    assert mastered == [{}, {}, {"a": (1,)}, {"a": (0,)}]


def test_second_differences_are_averaged_as_far_as_they_are_known():
    curve = [np.array([value]) for value in (4.0, 2.0, 1.0, 0.5, 0.25)]
    second = np.abs(np.diff([4.0, 2.0, 1.0, 0.5, 0.25], n=2))
    for count in (3, 4, 5):
        mean = second[: count - 2].mean()
        assert is_mastered(curve[:count], mean * 1.001).tolist() == [True]
        assert is_mastered(curve[:count], mean * 0.999).tolist() == [False]
    assert is_mastered(curve[:2], 9.0).tolist() == [False]


def test_dynamix_samples_more_from_sub_datasets_with_a_higher_reward():
    strategy = Dynamix(
        sub_datasets=SIZES, mode="min", compute_budget=1.0, settings=DynamixConfig(alpha=0.5)
    )
    assert strategy.first_stage().observe == LookAhead(every=50, examples=16)
    weights = strategy.on_observation(losses(1, a=[0.1], b=[0.3], c=[0.2])).weights
    values = {"a": 0.0, "b": 0.5, "c": 0.25}
    prior = {"a": 0.3, "b": 0.1, "c": 0.6}
    total = sum(math.exp(4 * values[name]) * prior[name] for name in prior)
    for name, share in prior.items():
        wanted = 0.7 * math.exp(4 * values[name]) * share / total + 0.1
        assert weights[name] == pytest.approx(wanted, rel=1e-12)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1), min_size=1),
    st.floats(0, 50),
    st.floats(0, 1),
)
def test_probabilities_add_up_and_keep_the_share_of_exploration(values, beta, gamma):
    prior = {name: (number + 1) for number, name in enumerate(sorted(values))}
    prior = {name: size / sum(prior.values()) for name, size in prior.items()}
    found = probabilities(values, prior, beta=beta, gamma=gamma)
    assert math.fsum(found.values()) == pytest.approx(1)
    assert all(chance >= gamma / len(values) * (1 - 1e-12) for chance in found.values())
    if beta == 0:
        for name, chance in found.items():
            assert chance == pytest.approx((1 - gamma) * prior[name] + gamma / len(values))


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(), min_size=1))
def test_rewards_are_scaled_to_the_unit_interval(rewards):
    found = rescale_rewards(rewards)
    assert found.keys() == rewards.keys()
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize("kind", [Sft, Msft, Continual, SingleRollout])
def test_a_strategy_refuses_observations_that_it_did_not_ask_for(kind):
    strategy = kind(sub_datasets=["a"], mode="min", compute_budget=1.0)
    with pytest.raises(ValueError, match="not observed"):
        strategy.on_observation(losses(1, a=[0.5]))


def test_msft_drops_several_at_the_first_of_their_peaks():
    strategy = Msft(
        sub_datasets=SIZES, mode="max", compute_budget=1.0, settings=MsftConfig(drop_passed=2)
    )
    curves = flat("abc", 5, a=[0.1, 0.2, 0.9, 0.4, 0.3], b=[0.1, 0.5, 0.4, 0.4, 0.3])
    back = strategy_end(strategy, curves)
    assert (back.checkpoint, back.exclude, back.stage.active) == ("s1e1", ("a", "b"), ("c",))
    assert "b peaked first" in back.reason
    assert "then a, at epoch 0.5" in back.reason


def test_msft_drops_only_sub_datasets_that_have_peaked():
    strategy = Msft(
        sub_datasets=SIZES, mode="max", compute_budget=1.0, settings=MsftConfig(drop_passed=3)
    )
    back = strategy_end(strategy, flat("abc", 5, b=[0.1, 0.5, 0.4, 0.4, 0.3]))
    assert back.exclude == ("b",)


def test_soft_exclusion_leaves_a_share():
    strategy = Msft(
        sub_datasets=SIZES,
        mode="max",
        compute_budget=1.0,
        settings=MsftConfig(exclusion="soft", floor=0.2),
    )
    back = strategy_end(strategy, flat("abc", 5, b=[0.1, 0.5, 0.4, 0.4, 0.3]))
    assert back.stage == Stage(number=2, active=("a", "c"), epochs=1.0, shares={"b": 0.2})
    assert back.stage.trained == ("a", "b", "c")


def test_a_robust_rule_waits_for_patience_and_names_what_it_needs():
    settings = MsftConfig(peaks="robust", smoothing=1, margin=0.0, patience=3)
    strategy = Msft(sub_datasets=["a", "b"], mode="max", compute_budget=1.0, settings=settings)
    assert strategy.needs() == Needs(newest=True)
    curves = flat("ab", 5, a=[0.1, 0.2, 0.9, 0.4, 0.3], b=[0.1, 0.5, 0.4, 0.4, 0.3])
    back = strategy_end(strategy, curves)
    assert (back.checkpoint, back.exclude) == ("s1e1", ("b",))
    strategy = Msft(sub_datasets=["a", "b"], mode="max", compute_budget=1.0, settings=settings)
    back = strategy_end(strategy, {**curves, "b": curves["a"]})
    assert (back.checkpoint, back.exclude) == ("s1e4", ())
    strategy = Msft(sub_datasets=["a", "b"], mode="max", compute_budget=1.0, settings=settings)
    for index in range(4):
        strategy.on_evaluation(
            Evaluation(
                stage=1,
                index=index,
                epoch=index * 0.25,
                step=index,
                checkpoint=f"s1e{index}",
                metrics={name: values[index] for name, values in curves.items()},
                last=False,
            )
        )
    assert strategy.needs() == Needs(checkpoints=("s1e1", "s1e2"), newest=True)


def test_an_evaluation_with_carried_values_is_never_the_best():
    strategies = [Msft(sub_datasets=["a", "b"], mode="max", compute_budget=1.0) for _ in range(2)]
    first = flat("ab", 5, a=[0.1, 0.9, 0.5, 0.5, 0.5])
    later = flat("ab", 5, **{OVERALL: [0.1, 0.9, 0.3, 0.8, 0.7]})
    for one in play(strategies[0], [first, later, later, later]):
        index = one.evaluation.index
        carried = ("a",) if one.evaluation.stage > 1 and index in (1, 3) else ()
        strategies[1].on_evaluation(replace(one.evaluation, carried=carried))
    assert (strategies[0].best.index, strategies[0].best.metrics[OVERALL]) == (1, 0.9)
    assert (strategies[1].best.index, strategies[1].best.metrics[OVERALL]) == (4, 0.7)


def test_a_root_that_is_measured_again_can_be_the_best_and_is_kept_by_its_name():
    strategy = Msft(sub_datasets=["a", "b", "c"], mode="max", compute_budget=0.5)
    rows = [
        # stage, index, last, a, b, c, overall, carried
        (1, 0, False, 0.5, 0.1, 0.1, 0.2, ()),
        (1, 1, False, 0.4, 0.2, 0.2, 0.3, ()),
        (1, 2, True, 0.3, 0.3, 0.3, 0.3, ()),
        (2, 0, False, 0.5, 0.1, 0.1, 0.2, ()),
        (2, 1, False, 0.5, 0.9, 0.2, 0.6, ("a",)),
        (2, 2, True, 0.1, 0.8, 0.3, 0.4, ()),
        (3, 0, False, 0.4, 0.9, 0.2, 0.5, ()),
    ]
    for stage, index, last, a, b, c, overall, carried in rows:
        name = {(2, 0): "1.0", (3, 0): "2.1"}.get((stage, index), f"{stage}.{index}")
        if (stage, index) == (3, 0):
            assert strategy.best.checkpoint == "2.2"
            assert strategy.needs().best == (OVERALL,)
        strategy.on_evaluation(
            Evaluation(
                stage=stage,
                index=index,
                epoch=index / 4,
                step=0,
                checkpoint=name,
                metrics={"a": a, "b": b, "c": c, OVERALL: overall},
                last=last,
                carried=carried,
            )
        )
    assert (strategy.best.stage, strategy.best.checkpoint) == (3, "2.1")
    needs = strategy.needs()
    assert (needs.best, needs.checkpoints, needs.newest) == ((), ("2.1",), True)
