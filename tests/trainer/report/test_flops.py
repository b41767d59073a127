"""FLOPs and tokens, compared with values computed by hand for N = 100, L = 2, d = 5.

A forward pass costs 200 a token and 40 per attended token, training 600 and 120.
"""

from __future__ import annotations

from typing import Any

from trainer.report.flops import Account, ModelSize, Work, path_ends

START = {"event": "run_started", "model": {"parameters": 100, "layers": 2, "hidden": 5}}


def numbered(*records: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"seq": seq, **record} for seq, record in enumerate(records)]


def stage(number: int, root: str) -> dict[str, Any]:
    return {"event": "stage_started", "stage": number, "root": root, "step": 10 * (number - 1)}


def trained(stage: int, step: int, tokens: int = 10, **more: int) -> dict[str, Any]:
    record = {"event": "trained", "stage": stage, "step": step, "tokens": tokens}
    return record | {"attention_tokens": 0, "padded_tokens": 0} | more


def evaluated(stage: int, step: int, checkpoint: str, **more: int) -> dict[str, Any]:
    record = {"event": "evaluated", "stage": stage, "step": step, "checkpoint": checkpoint}
    return record | {"tokens": 0} | more


def stop(checkpoint: str) -> dict[str, Any]:
    return {"event": "decided", "decision": "stop", "checkpoint": checkpoint}


TWO_STAGES = [
    START,
    stage(1, "base"),
    evaluated(1, 0, "base"),
    trained(1, 5, tokens=10),
    evaluated(1, 5, "A"),
    trained(1, 10, tokens=20),
    evaluated(1, 10, "B"),
    stage(2, "A"),
    evaluated(2, 10, "A"),
    trained(2, 15, tokens=40),
    evaluated(2, 15, "C"),
    trained(2, 20, tokens=80),
    evaluated(2, 20, "D"),
]


def test_the_formula() -> None:
    size = ModelSize(parameters=100, layers=2, hidden=5)
    assert size.forward(7, 3) == 200 * 7 + 40 * 3
    assert size.training(7, 3) == 600 * 7 + 120 * 3


def test_every_row_by_hand() -> None:
    account = Account.from_journal(
        numbered(
            START,
            stage(1, "base"),
            evaluated(1, 0, "base", tokens=50, attention_tokens=30, padded_tokens=4),
            trained(1, 5, tokens=10, attention_tokens=60, padded_tokens=3),
            evaluated(
                1, 5, "A", tokens=50, attention_tokens=30, generated_tokens=6,
                generated_attention_tokens=20,
            ),
            trained(1, 10, tokens=20, attention_tokens=80),
            evaluated(1, 10, "B"),
            stop("A"),
            {"event": "tested", "tokens": 5, "generated_tokens": 1, "padded_tokens": 2},
        )
    )  # fmt: skip
    assert account.kept == Work(tokens=10, flops=600 * 10 + 120 * 60)
    assert account.rolled_back == Work(tokens=20, flops=600 * 20 + 120 * 80)
    assert account.trained == Work(tokens=30, flops=600 * 30 + 120 * 140)
    assert account.padding == Work(tokens=9, flops=600 * 3 + 200 * 6)
    assert account.evaluation == Work(tokens=105, flops=200 * 105 + 40 * 60)
    assert account.generation == Work(tokens=7, flops=200 * 7 + 40 * 20)
    assert account.repeated == Work()


def test_kept_is_the_path_through_both_stages() -> None:
    records = numbered(*TWO_STAGES, stop("C"))
    account = Account.from_journal(records)
    assert path_ends(records) == {1: 5, 2: 15}
    assert (account.kept.tokens, account.rolled_back.tokens) == (10 + 40, 20 + 80)


def test_a_result_from_an_earlier_stage_makes_the_later_ones_rolled_back() -> None:
    records = numbered(*TWO_STAGES, stop("B"))
    assert path_ends(records) == {1: 10}
    assert Account.from_journal(records).kept.tokens == 10 + 20


def test_a_result_that_is_a_root_is_found_where_it_was_trained() -> None:
    assert path_ends(numbered(*TWO_STAGES, stop("A"))) == {1: 5}


def test_the_base_as_result_keeps_nothing() -> None:
    account = Account.from_journal(numbered(*TWO_STAGES, stop("base")))
    assert (account.kept.tokens, account.rolled_back.tokens) == (0, 150)


def test_a_stage_that_went_back_to_its_own_root_is_not_on_the_path() -> None:
    third = [stage(3, "A"), evaluated(3, 20, "A"), trained(3, 25, 5), evaluated(3, 25, "E")]
    records = numbered(*TWO_STAGES, *third, stop("E"))
    assert path_ends(records) == {1: 5, 3: 25}
    assert Account.from_journal(records).kept.tokens == 10 + 5


def test_without_a_result_the_path_leads_to_the_last_step() -> None:
    records = numbered(*TWO_STAGES)
    assert path_ends(records) == {1: 5, 2: 20}
    assert Account.from_journal(records).kept.tokens == 10 + 40 + 80


def test_a_run_that_has_not_trained_yet_has_no_work() -> None:
    assert Account.from_journal(numbered(START)).trained == Work()


def test_void_work_is_repeated_work_and_nothing_else() -> None:
    records = numbered(
        START,
        stage(1, "base"),
        evaluated(1, 0, "base"),
        trained(1, 5, tokens=10),
        evaluated(1, 5, "A", tokens=3, padded_tokens=2),
        {"event": "resumed", "after": 2},
        trained(1, 5, tokens=10),
        evaluated(1, 5, "A", tokens=3),
        stop("A"),
    )
    account = Account.from_journal(records)
    assert account.repeated == Work(tokens=10 + 3 + 2, flops=600 * 10 + 200 * 5)
    assert account.kept.tokens == 10
    assert account.evaluation.tokens == 3
    assert account.padding == Work()
