"""Exclusion that can be undone, in stages (MSFT) and in one pass (``online``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from trainer.algorithms import Msft, Online
from trainer.algorithms.base import Continue, Decision, Evaluation, RollBack, Stop
from trainer.algorithms.exclusion import Exclusions
from trainer.algorithms.method import Method
from trainer.algorithms.peaks import Champion
from trainer.config.schema import OVERALL, MsftConfig

PLAIN = {"smoothing": 1, "margin": 0.0, "patience": 2}
SIZES = {"a": 30.0, "b": 10.0, "c": 60.0}


def run(
    strategy: Method,
    *,
    stage: int = 1,
    error: float = 0.1,
    ends: bool = True,
    **curves: Sequence[float],
) -> list[Decision]:
    """Pass the curves of one stage to a strategy, until it ends the stage."""
    overall = curves.pop(OVERALL, None)
    decisions: list[Decision] = []
    count = len(next(iter(curves.values())))
    for i in range(count):
        metrics = {name: row[i] for name, row in curves.items()}
        mean = math.fsum(metrics.values()) / len(metrics)
        decisions.append(
            strategy.on_evaluation(
                Evaluation(
                    stage=stage,
                    index=i,
                    epoch=i / 4,
                    step=10 * i,
                    checkpoint=f"s{stage}e{i}",
                    metrics={**metrics, OVERALL: mean if overall is None else overall[i]},
                    errors=dict.fromkeys(curves, error),
                    last=ends and i + 1 == count,
                )
            )
        )
        if isinstance(decisions[-1], RollBack | Stop):
            break
    return decisions


def make_online(**settings: object) -> Online:
    merged = MsftConfig(**{**PLAIN, **settings})  # type: ignore[arg-type]
    return Online(sub_datasets=SIZES, mode="min", compute_budget=2.0, settings=merged)


def make_msft(**settings: object) -> Msft:
    config = MsftConfig(**settings)  # type: ignore[arg-type]
    return Msft(sub_datasets=["a", "b"], mode="min", compute_budget=1.0, settings=config)


FALLING = [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2]
EARLY = [2.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]


def changes(decisions: Sequence[Decision]) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    return {
        i: (one.exclude, one.include)
        for i, one in enumerate(decisions)
        if isinstance(one, Continue) and one.stage is not None
    }


def test_one_pass_excludes_a_sub_dataset_once_its_peak_has_passed_and_goes_on() -> None:
    strategy = make_online()
    decisions = run(strategy, a=EARLY, b=FALLING, c=FALLING)
    assert changes(decisions) == {3: (("a",), ())}
    assert isinstance(decisions[-1], Stop)
    assert strategy.stage.active == ("b", "c")
    assert strategy.stage.epochs == 2.0


def test_one_pass_ends_when_all_have_left() -> None:
    decisions = run(make_online(), a=EARLY, b=EARLY, c=EARLY)
    assert isinstance(decisions[3], Stop)
    assert decisions[3].exclude == ("a", "b", "c")
    assert decisions[3].checkpoint == "s1e1"


def test_a_soft_exclusion_leaves_a_share_in_one_pass() -> None:
    strategy = make_online(exclusion="soft", floor=0.2)
    run(strategy, a=EARLY, b=FALLING, c=FALLING)
    assert dict(strategy.stage.shares) == {"a": 0.2}


def test_a_forgotten_sub_dataset_comes_back_and_may_leave_again() -> None:
    a = [2.0, 1.0, 1.05, 1.1, 1.15, 1.4, 1.2, 1.3, 1.35]
    decisions = run(make_online(return_margin=3.0), a=a, b=FALLING, c=FALLING)
    # It is at 1.4 when it comes back; its new peak, 1.2, has passed two evaluations later.
    assert changes(decisions)[3] == (("a",), ())
    assert changes(decisions)[5] == ((), ("a",))
    assert isinstance(decisions[-1], Stop)


@pytest.mark.parametrize(("margin", "goes_back"), [(0.5, True), (20.0, False), (None, False)])
def test_one_pass_goes_back_only_where_the_overall_was_better_by_the_margin(
    margin: float | None, goes_back: bool
) -> None:
    strategy = make_online(rollback_margin=margin)
    overall = [2.0, 1.0, 1.2, 1.3, 1.3, 1.3, 1.3, 1.3, 1.3]
    decisions = run(strategy, a=EARLY, b=FALLING, c=FALLING, overall=overall)
    if not goes_back:
        assert isinstance(decisions[-1], Stop)
        return
    back = decisions[3]
    assert isinstance(back, RollBack)
    assert (back.checkpoint, back.exclude) == ("s1e1", ("a",))
    # 1.25 epochs of 100 examples are left, and an epoch of b and c has 70.
    assert back.stage.epochs == pytest.approx(1.25 * 100 / 70)
    later = run(strategy, stage=2, a=[1.0] * 4, b=[1.9, 2.0, 2.1, 2.2], c=FALLING[1:5])
    assert changes(later) == {}, "the root of a later stage is no peak"


def test_needs_of_one_pass_hold_the_champions_only_if_it_may_go_back() -> None:
    plain, going_back = make_online(), make_online(rollback_margin=1.0)
    for strategy in (plain, going_back):
        run(strategy, ends=False, a=EARLY[:3], b=FALLING[:3], c=[2.0, 2.1, 2.2])
    assert plain.needs().checkpoints == ()
    assert going_back.needs().checkpoints == ("s1e1", "s1e2")


def test_msft_includes_a_forgotten_sub_dataset_again() -> None:
    strategy = make_msft(return_margin=2.0)
    first = run(strategy, a=[1.0, 1.2, 1.3, 1.4, 1.5], b=FALLING[:5])[-1]
    assert isinstance(first, RollBack)
    assert first.exclude == ("a",)
    second = run(strategy, stage=2, a=[1.0, 1.1, 1.2, 1.3, 1.4], b=FALLING[:5])[-1]
    assert isinstance(second, RollBack)
    assert (second.include, second.stage.active) == (("a",), ("a", "b"))
    assert "a is forgotten and comes back" in second.reason
    kept = make_msft(return_margin=5.0)
    run(kept, a=[1.0, 1.2, 1.3, 1.4, 1.5], b=FALLING[:5])
    second = run(kept, stage=2, a=[1.0, 1.1, 1.2, 1.3, 1.4], b=FALLING[:5])[-1]
    assert isinstance(second, RollBack)
    assert second.include == ()


def test_the_root_of_a_later_stage_is_no_peak_if_asked() -> None:
    for root_peaks, wanted in ((True, ("b",)), (False, ())):
        strategy = make_msft(root_peaks=root_peaks)
        run(strategy, a=[1.5, 1.0, 1.3, 1.4, 1.5], b=FALLING[:5])
        back = run(strategy, stage=2, a=[1.0] * 5, b=[1.0, 1.2, 1.1, 1.05, 1.02])[-1]
        assert isinstance(back, RollBack | Stop)
        assert back.exclude == wanted
    strategy = make_msft(root_peaks=False)
    first = run(strategy, a=[1.0, 1.1, 1.3, 1.4, 1.5], b=FALLING[:5])[-1]
    assert isinstance(first, RollBack)
    assert first.exclude == ("a",), "before any training a sub-dataset may be at its best"


def test_a_stage_ends_if_the_overall_does_not_beat_its_root() -> None:
    strategy = make_msft(overall_window=2)
    decisions = run(strategy, a=[1.0, 1.1, 1.2, 1.3, 1.4], b=[1.0, 1.2, 1.1, 0.9, 0.8])
    assert len(decisions) == 3
    assert isinstance(decisions[-1], RollBack)
    better = make_msft(overall_window=2)
    assert len(run(better, a=FALLING[:5], b=EARLY[:5])) == 5


def test_a_stage_without_a_peak_and_without_a_better_overall_ends_the_run() -> None:
    strategy = make_msft(overall_window=3, root_peaks=False)
    run(strategy, a=[1.5, 1.0, 1.3, 1.4, 1.5], b=FALLING[:5])
    stop = run(strategy, stage=2, a=[1.0] * 4, b=[1.0, 1.2, 1.1, 1.05])[-1]
    assert isinstance(stop, Stop)
    assert "no evaluation is better than the root's" in stop.reason


def test_ties_at_the_earliest_peak_are_dropped_together_as_in_the_papers_code() -> None:
    tie = {"a": [2.0, 1.0, 1.1, 1.2, 1.3], "b": [2.0, 1.0, 1.5, 1.6, 1.7]}
    later = {**tie, "b": [2.0, 1.9, 1.0, 1.1, 1.2]}
    for curves, count, dropped in ((tie, 2, ("a", "b")), (tie, 1, ("a",)), (later, 2, ("a",))):
        strategy = make_msft(drop_count=count)
        end = run(strategy, **curves)[-1]
        assert isinstance(end, RollBack | Stop)
        assert end.exclude == dropped


@pytest.mark.parametrize(
    ("mode", "value", "forgotten"),
    [
        ("min", 1.3, True),
        ("min", 1.2, False),
        ("max", 0.7, True),
        ("max", 0.8, False),
        ("min", math.nan, False),
    ],
)
def test_forgotten_is_worse_by_more_than_the_margin(
    mode: str, value: float, forgotten: bool
) -> None:
    champion = Champion(value=1.0, error=0.1, mode=mode)  # type: ignore[arg-type]
    assert champion.is_forgotten(value, 2.01) is forgotten


def test_a_sub_dataset_that_was_not_measured_stays_excluded():
    excluded = Exclusions(settings=MsftConfig(return_margin=1.0))
    excluded.add("a", Champion(value=0.5, error=0.1, mode="min"))
    assert excluded.find_forgotten({"a": 0.9}) == ("a",)
    assert excluded.find_forgotten({"b": 0.9}) == ()
