"""Retention policies on candidates made by hand: the kept ids and their reasons."""

from __future__ import annotations

import pytest

from msft_store import (
    Candidate,
    Champions,
    DiskBudget,
    InvalidInputError,
    KeepBest,
    KeepLast,
    KeepThese,
    OverBudgetError,
    PeakWindow,
    Policy,
)

NAN = float("nan")


def line(*scores: float, branch: int = 0, size: int = 10) -> list[Candidate]:
    """Return candidates a, b, c … with these values of the metric ``m``."""
    return [
        Candidate(
            id="abcdefghij"[i], metrics={"m": score}, stored_bytes=size, branch=branch, index=i
        )
        for i, score in enumerate(scores)
    ]


def kept(policy: Policy, candidates: list[Candidate]) -> str:
    return "".join(sorted(policy.decide(candidates)))


@pytest.mark.parametrize(
    ("policy", "scores", "expected"),
    [
        (KeepLast(2), (1, 2, 3), "bc"),
        (KeepLast(9), (1, 2), "ab"),
        (KeepBest("m"), (1, 3, 3, 2), "b"),
        (KeepBest("m", 2), (3, 1, 3, 3), "ac"),
        (KeepBest("m", mode="min"), (2, 1, 1), "b"),
        (KeepBest("m"), (NAN, 1, float("inf")), "b"),
        (KeepBest("m"), (NAN, NAN), ""),
        (KeepBest("m"), (0.0, -0.0), "a"),
        (KeepBest("other"), (1, 2), ""),
        (Champions({"m": "max"}), (1, 5, 5), "b"),
        (Champions({"m": "min"}), (1, 5, NAN), "a"),
        (Champions({"m": "max", "x": "max"}), (2, 1), "a"),
        (KeepLast(1) | KeepBest("m"), (9, 1, 2), "ac"),
        (KeepLast(1), (), ""),
        (KeepThese(frozenset("ac")), (1, 2, 3), "ac"),
        (KeepThese(frozenset("az")) | KeepLast(1), (1, 2), "ab"),
        (KeepBest("m") | DiskBudget(99), (), ""),
    ],
)
def test_policies_keep_the_expected_checkpoints(
    policy: Policy, scores: tuple[float, ...], expected: str
) -> None:
    assert kept(policy, line(*scores)) == expected


def test_the_best_loss_is_the_smallest_unless_a_mode_is_given() -> None:
    losses = [
        Candidate(id=id, metrics={"eval_one_loss": value}, index=index)
        for index, (id, value) in enumerate((("a", 2.0), ("b", 1.0), ("c", 3.0)))
    ]
    assert kept(KeepBest("eval_one_loss"), losses) == "b"
    assert kept(KeepBest("eval_one_loss", mode="max"), losses) == "c"


def test_champions_are_of_the_current_branch_and_the_best_of_all() -> None:
    old = line(9, 8)
    new = [
        Candidate(id="x", metrics={"m": 1}, branch=1, index=1),
        Candidate(id="y", metrics={"m": 2}, branch=1, index=2),
    ]
    assert kept(Champions({"m": "max"}), old + new) == "y"
    assert kept(Champions({"m": "max"}) | KeepBest("m"), old + new) == "ay"


@pytest.mark.parametrize(
    ("scores", "window", "expected"),
    [
        ((5, 1), 2, "a"),  # the window is open after one evaluation without improvement
        ((5, 1, 1), 2, "a"),  # the peak has passed: this is the next roll-back
        ((5, 6, 1, 1), 2, "b"),
        ((1, 2, 3), 1, "c"),
    ],
)
def test_a_peak_window_keeps_a_champion_until_it_is_rolled_back_to(
    scores: tuple[float, ...], window: int, expected: str
) -> None:
    assert kept(PeakWindow({"m": "max"}, window), line(*scores)) == expected


def test_only_the_earliest_of_the_passed_peaks_is_kept() -> None:
    rows = [(9, 0, 0), (0, 9, 0), (0, 0, 1), (0, 0, 2)]
    candidates = [
        Candidate(id="abcd"[i], metrics={"p": p, "q": q, "r": r}, index=i)
        for i, (p, q, r) in enumerate(rows)
    ]
    decided = PeakWindow({"p": "max", "q": "max", "r": "max"}, 2).decide(candidates)
    assert "".join(sorted(decided)) == "ad"
    assert "its roll-back is next" in decided["a"][0].text
    assert "0 of 2" in decided["d"][0].text


def test_a_budget_drops_the_least_valuable_first_and_never_the_best() -> None:
    scores = (9, 1, 2, 3, 4)
    assert kept(KeepLast(4) | KeepBest("m"), line(*scores)) == "abcde"
    for budget, expected in [(50, "abcde"), (49, "acde"), (30, "ade"), (10, "a")]:
        policy = KeepLast(4) | KeepBest("m") | DiskBudget(budget)
        assert kept(policy, line(*scores)) == expected
    with pytest.raises(OverBudgetError, match="1 more than the disk budget of 9"):
        (KeepBest("m") | DiskBudget(9)).decide(line(*scores))


def test_the_smallest_of_several_budgets_counts_in_any_order() -> None:
    for policy in (
        DiskBudget(20) | KeepLast(5) | DiskBudget(40),
        (KeepLast(5) | DiskBudget(40)) | DiskBudget(20),
    ):
        assert kept(policy, line(1, 2, 3, 4)) == "cd"


def test_a_budget_alone_keeps_the_newest_that_fit() -> None:
    assert kept(DiskBudget(25), line(1, 2, 3)) == "bc"
    assert kept(DiskBudget(9), line(1, 2, 3)) == ""


def test_a_pinned_checkpoint_is_kept_with_its_reason() -> None:
    candidates = [Candidate(id="p", metrics={}, pinned="pinned as best"), *line(1, 2)]
    decided = KeepLast(1).decide(candidates)
    assert [reason.text for reason in decided["p"]] == ["pinned as best"]
    assert [reason.text for reason in decided["b"]] == ["one of the last 1"]
    with pytest.raises(OverBudgetError):
        DiskBudget(5).decide([Candidate(id="p", metrics={}, stored_bytes=6, pinned="pinned")])


def test_every_reason_is_given() -> None:
    decided = (KeepLast(1) | KeepBest("m", 2) | Champions({"m": "max"})).decide(line(1, 3, 2))
    assert [r.text for r in decided["b"]] == ["best m (3)", "champion of m (3)"]
    assert [r.text for r in decided["c"]] == ["one of the last 1", "number 2 by m (2)"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepLast(True),
        lambda: KeepLast(1.5),  # type: ignore[arg-type]
        lambda: KeepBest("m", 0),
        lambda: KeepBest("m", mode="highest"),  # type: ignore[arg-type]
        lambda: Champions({"m": "up"}),  # type: ignore[dict-item]
        lambda: Champions(["m"]),  # type: ignore[arg-type]
        lambda: PeakWindow({"m": "max"}, 0),
        lambda: PeakWindow({"m": "best"}, 1),  # type: ignore[dict-item]
        lambda: DiskBudget(-1),
    ],
)
def test_invalid_policies_are_refused(make: object) -> None:
    with pytest.raises(InvalidInputError):
        make()  # type: ignore[operator]
