"""Excluded sub-datasets that are evaluated less often, and what that changes in a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from msft_store import Store
from tests.support.runs import kill, outcome
from tests.support.tiny_runs import make_config
from trainer.journal import Journal, effective, read
from trainer.report.flops import Account, find_result_evaluation
from trainer.training import run
from trainer.training.run import resume, start


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four stages; the third begins from a checkpoint with carried values."""
    made = make_config(
        tmp_path_factory.mktemp("cadence"),
        msft__max_stages=4,
        msft__compute_budget=2.5,
        train__lr=0.1,
        log_every=1,
        evaluation__excluded_every=3,
    )
    reference = replace(made, output_dir=f"{made.output_dir}-reference")
    start(reference)
    return reference


def journal(config):
    return effective(read(Path(config.output_dir) / "journal.jsonl"))


def evaluated(config):
    return [record for record in journal(config) if record["event"] == "evaluated"]


def test_excluded_sub_datasets_are_measured_at_every_third_evaluation_and_the_last(config):
    active = {r["stage"]: r["active"] for r in journal(config) if r["event"] == "stage_started"}
    before, carrying = None, 0
    for one in evaluated(config):
        excluded = sorted({"copy", "same", "sum"} - {*active[one["stage"]]})
        is_due = one["index"] % 3 == 0 or one["last"]
        assert one["carried"] == ([] if is_due else excluded)
        for name in one["carried"]:
            assert one["metrics"][name] == before["metrics"][name]
            assert one["losses"][name] == before["losses"][name]
            carrying += 1
        mean = sum(one["metrics"][name] for name in ("copy", "same", "sum")) / 3
        assert one["metrics"]["overall"] == pytest.approx(mean)
        before = one
    assert carrying > 3


def test_only_what_was_measured_is_counted(config):
    full = {one["tokens"] for one in evaluated(config) if not one["carried"] and "tokens" in one}
    assert len(full) == 1
    assert all(one["tokens"] < min(full) for one in evaluated(config) if one["carried"])
    costs = [r["tokens"] for r in journal(config) if "tokens" in r and "split" in r]
    assert Account.from_journal(journal(config)).evaluation.tokens == sum(costs)


def test_a_root_with_carried_values_is_measured_again_in_full(config):
    first = {}
    for one in reversed(evaluated(config)):
        first[one["checkpoint"]] = one
    roots = [one for one in evaluated(config) if one["index"] == 0 and one["stage"] > 1]
    again = [one for one in roots if first[one["checkpoint"]]["carried"]]
    assert again
    for one in roots:
        assert one["reused"] == (one not in again)
        assert one["carried"] == []
    for one in again:
        earlier = first[one["checkpoint"]]
        kept = {*one["losses"]} - {*earlier["carried"]}
        assert {n: one["losses"][n] for n in kept} == {n: earlier["losses"][n] for n in kept}


def test_the_result_is_the_best_of_the_full_evaluations(config):
    full = [one for one in evaluated(config) if not one["carried"]]
    best = min(full, key=lambda one: one["metrics"]["overall"])
    assert find_result_evaluation(journal(config)) == best


def test_the_store_has_no_carried_value(config, monkeypatch, tmp_path):
    metrics = {}
    commit = Store.save

    def saving(self, *args, **kwargs):
        saved = commit(self, *args, **kwargs)
        metrics[saved.id] = saved.metrics
        return saved

    monkeypatch.setattr(Store, "save", saving)
    start(replace(config, output_dir=str(tmp_path / "run"), async_save=False))
    first = {}
    for one in reversed(evaluated(config)):
        first[one["checkpoint"]] = one
    assert metrics.keys() >= first.keys()
    for identity, one in first.items():
        gone = {*one["carried"], "overall"} if one["carried"] else set()
        assert metrics[identity].keys() == one["metrics"].keys() - gone


@pytest.mark.parametrize(
    "place",
    [
        {"event": "evaluated", "stage": 2, "index": 1},
        {"event": "evaluated", "stage": 3, "index": 0},
        {"event": "trained", "stage": 3},
        {"event": "committed", "stage": 4},
    ],
)
@pytest.mark.parametrize("resume_every", [None, 2])
def test_a_kill_changes_nothing(config, tmp_path, place, resume_every):
    directory = tmp_path / "run"
    killed = replace(config, output_dir=str(directory), resume_every=resume_every)
    number = 3 if place["event"] == "trained" else 1
    kill(lambda: start(killed), Journal, "append", call=number, like=place)
    resume(directory)
    assert outcome(directory) == outcome(Path(config.output_dir))
