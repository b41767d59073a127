"""The decisions of strategies on a divergence, without any training."""

from __future__ import annotations

import math

import pytest

from tests.support.recorded import load_curve, make_msft, play
from trainer.algorithms import Msft, Sft
from trainer.algorithms.base import Continue, Divergence, Evaluation, Needs, RollBack, Skip, Stop
from trainer.config.schema import OVERALL

NAMES = ("a", "b")


def evaluation(index: int, value: float, *, stage: int = 1) -> Evaluation:
    return Evaluation(
        stage=stage,
        index=index,
        epoch=index * 0.25,
        step=index * 10,
        checkpoint=f"s{stage}e{index}",
        metrics={**dict.fromkeys(NAMES, value), OVERALL: value},
        last=index == 8,
    )


def divergence(step: int) -> Divergence:
    epoch = step / 40
    return Divergence(stage=1, epoch=epoch, step=step, what="training loss", value="nan")


def guarded(kind: type[Msft] | type[Sft], max_skips: int) -> Msft | Sft:
    return kind(sub_datasets=NAMES, mode="max", compute_budget=2.0, max_skips=max_skips)


@pytest.mark.parametrize("kind", [Sft, Msft])
def test_a_run_that_may_not_go_back_stops_with_its_best(kind: type[Msft] | type[Sft]) -> None:
    strategy = guarded(kind, 0)
    for index, value in enumerate([0.1, 0.5, 0.4]):
        assert isinstance(strategy.on_evaluation(evaluation(index, value)), Continue)
    decision = strategy.on_divergence(divergence(25))
    assert isinstance(decision, Stop)
    assert decision.checkpoint == "s1e1"
    assert decision.exclude == ()
    assert decision.reason.startswith("training diverged: the training loss is nan; the result is")
    assert strategy.needs() == Needs()
    with pytest.raises(ValueError, match="the run is over"):
        strategy.on_evaluation(evaluation(3, 0.1))


@pytest.mark.parametrize("kind", [Sft, Msft])
def test_a_run_goes_back_to_its_last_evaluation_a_few_times(kind: type[Msft] | type[Sft]) -> None:
    strategy = guarded(kind, 2)
    strategy.on_evaluation(evaluation(0, 0.5))
    strategy.on_evaluation(evaluation(1, 0.4))
    first = strategy.on_divergence(divergence(13))
    assert isinstance(first, Skip)
    assert first.checkpoint == "s1e1"
    assert "back to epoch 0.25 without the 3 batches since then, number 1 of" in first.reason
    assert strategy.needs().newest
    strategy.on_evaluation(evaluation(2, 0.3))
    second = strategy.on_divergence(divergence(21))
    assert isinstance(second, Skip)
    assert second.checkpoint == "s1e2"
    assert not strategy.needs().newest
    third = strategy.on_divergence(divergence(22))
    assert isinstance(third, Stop)
    assert third.checkpoint == "s1e0"
    assert "after going back 2 times already" in third.reason


def test_a_skip_changes_nothing_of_what_the_method_decides() -> None:
    curve = load_curve("ties")
    plain, disturbed = make_msft(curve), make_msft(curve, max_skips=99)
    for one in play(plain, curve["stages"]):
        assert disturbed.on_evaluation(one.evaluation) == one.decision
        assert disturbed.needs().newest == isinstance(one.decision, Continue)
        if isinstance(one.decision, Continue):
            decision = disturbed.on_divergence(divergence(one.evaluation.step + 1))
            assert isinstance(decision, Skip)
            assert decision.checkpoint == one.evaluation.checkpoint
        assert disturbed.needs().champions == plain.needs().champions or isinstance(
            one.decision, RollBack | Continue
        )


def test_without_a_finite_overall_the_result_is_the_last_evaluation() -> None:
    strategy = guarded(Msft, 0)
    for index in range(3):
        assert strategy.needs().newest
        strategy.on_evaluation(evaluation(index, math.nan))
    decision = strategy.on_divergence(divergence(25))
    assert isinstance(decision, Stop)
    assert decision.checkpoint == "s1e2"


def test_a_divergence_before_any_evaluation_raises_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was evaluated"):
        guarded(Sft, 1).on_divergence(divergence(1))
