"""Simulations of other policies on recorded curves, compared with real runs of these policies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.recorded import load_curve
from tests.support.synthetic import FULL, write_run
from tests.support.tiny_runs import make_config
from trainer.cli.main import main
from trainer.errors import ConfigError, RunError
from trainer.journal import Record, effective, read
from trainer.report.flops import Work
from trainer.simulate.policies import expand_sweeps, recorded_config, retention_named, with_policy
from trainer.simulate.replay import Simulation, simulate
from trainer.simulate.report import Copies, simulate_own_policy, simulate_policy, to_text
from trainer.simulate.retained import replay_retention, summarize_retention
from trainer.simulate.stage_ends import StageEnd
from trainer.training.run import start


def journal(tmp_path: Path, curve: str, method: str = "msft") -> list[Record]:
    """Return the records of a run that follows a recorded curve."""
    path = tmp_path / "journal.jsonl"
    write_run(path, load_curve(curve), method=method)
    return read(path)


def under(records: list[Record], *, method: str = "msft", **policy: Any) -> Simulation:
    return simulate(records, with_policy(recorded_config(records), policy, method=method))


def stage_ends(simulation: Simulation) -> list[tuple[Any, ...]]:
    found = [stage.simulated for stage in simulation.stages]
    return [(t.epoch, t.decision, t.checkpoint, t.exclude) if t else () for t in found]


def test_the_same_roll_backs_decided_earlier_are_known_to_the_end(tmp_path: Path) -> None:
    simulation = under(journal(tmp_path, "ties"), peak_window=1)
    assert simulation.ending == "result"
    assert stage_ends(simulation) == [
        (0.75, "roll_back", "s1e2", ("a",)),
        (0.75, "roll_back", "s2e2", ("b",)),
        (0.5, "stop", "s2e2", ("c",)),
    ]
    assert simulation.why.startswith("It is known to its end, with the run's own decisions: ")
    assert (simulation.recorded.steps, simulation.simulated.steps) == (120, 80)
    assert (simulation.recorded.evaluations, simulation.simulated.evaluations) == (13, 9)
    assert simulation.recorded.training == Work(tokens=12_000, flops=600 * 12_000 + 120 * 120_000)
    assert simulation.simulated.training == Work(tokens=8_000, flops=600 * 8_000 + 120 * 80_000)
    assert simulation.simulated.evaluation == Work(
        tokens=9 * 70, flops=9 * (200 * 70 + 40 * 500 + 40 * 400)
    )
    assert simulation.best is not None
    assert simulation.best["checkpoint"] == "s2e2"
    assert simulation.best["metrics"]["overall"] == 0.57


def test_another_best_overall_on_the_same_path_is_reported(tmp_path: Path) -> None:
    simulation = under(journal(tmp_path, "peak_at_epoch_0"), peak_window=2)
    assert "with the run's own exclusions, but another result" in simulation.why
    assert stage_ends(simulation)[-1] == (1.0, "stop", "s3e2", ("b",))


def test_a_simulation_ends_at_a_decision_that_the_recording_does_not_follow(tmp_path: Path) -> None:
    simulation = under(journal(tmp_path, "nobody_peaks"), peak_window=1)
    assert simulation.ending == "left"
    assert stage_ends(simulation) == [
        (0.5, "roll_back", "s1e2", ()),
        (0.25, "roll_back", "s1e2", ("b",)),
    ]
    assert simulation.why == (
        "In stage 2 at epoch 0.25 it excludes b and goes on from stage 1, epoch 0.5; at epoch 0.5 "
        "the run excludes nothing and goes on from stage 2, epoch 0.5. From there on the run's "
        "curves say nothing."
    )
    assert (simulation.recorded.steps, simulation.simulated.steps) == (40, 30)


def test_a_curve_that_ends_before_the_decision_leaves_it_open(tmp_path: Path) -> None:
    simulation = under(journal(tmp_path, "peak_window"), peak_window=None)
    assert simulation.ending == "curve"
    assert stage_ends(simulation) == [()]
    assert simulation.why == (
        "In stage 1 it trains on when at epoch 0.75 the run excludes a and goes on from stage 1, "
        "epoch 0.25. Beyond that nothing is known."
    )
    assert simulation.simulated == simulation.recorded


def test_an_unfinished_run_is_summarized_up_to_its_last_record(tmp_path: Path) -> None:
    records = journal(tmp_path, "ties")
    second = next(r["seq"] for r in records if r["event"] == "stage_started" and r["stage"] == 2)
    cut = records[: second + 9]
    simulation = under(cut, peak_window=None)
    assert simulation.ending == "curve"
    assert simulation.why == "The run is not over: stage 2 is known up to epoch 0.25."
    early = under(cut, peak_window=1)
    assert [len(stage.active) for stage in early.stages] == [3, 2]
    just_ended = under(records[:second], peak_window=1)
    assert just_ended.ending == "left"
    assert len(just_ended.stages) == 1


def test_a_smaller_budget_ends_each_stage_at_its_evaluation(tmp_path: Path) -> None:
    records = journal(tmp_path, "ties")
    simulation = under(records, compute_budget=0.75)
    assert stage_ends(simulation) == [
        (0.75, "roll_back", "s1e2", ("a",)),
        (0.75, "roll_back", "s2e2", ("b",)),
        (0.75, "stop", "s2e2", ("c",)),
    ]
    assert simulation.simulated.steps == 90
    between = under(records, compute_budget=0.6)
    assert between.ending == "curve"
    assert "no evaluation at epoch 0.6" in between.why
    assert between.simulated.steps == 20


def test_fewer_stages_end_with_the_best_so_far(tmp_path: Path) -> None:
    simulation = under(journal(tmp_path, "ties"), max_stages=1)
    assert stage_ends(simulation) == [(1.0, "stop", "s1e3", ("a",))]
    assert "though not as the run" in simulation.why


def test_a_run_of_sft_has_the_first_stage_of_msft_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    of_sft = journal(tmp_path / "sft", "ties", method="sft")
    first = under(of_sft, peak_window=1)
    assert first.ending == "left"
    assert stage_ends(first) == [(0.75, "roll_back", "s1e2", ("a",))]
    assert "the run excludes nothing and stops with stage 1, epoch 0.75" in first.why
    plain = under(journal(tmp_path, "ties"), method="sft")
    assert plain.ending == "result"
    assert (
        stage_ends(plain) == stage_ends(under(of_sft, method="sft")) == [(1.0, "stop", "s1e3", ())]
    )


def test_curves_of_a_method_that_chooses_examples_are_refused(tmp_path: Path) -> None:
    start_record, *others = journal(tmp_path, "ties")
    with pytest.raises(RunError, match="chooses its examples"):
        simulate([{**start_record, "method": "ies"}, *others], recorded_config([start_record]))
    with pytest.raises(RunError, match="no evaluation"):
        simulate([start_record], recorded_config([start_record]))
    with pytest.raises(RunError, match="no run_started"):
        recorded_config(others)
    with pytest.raises(RunError, match=r"another version \(unknown key 'old'"):
        recorded_config([{**start_record, "config": {"old": 1}}])


def test_a_recording_with_another_first_stage_gives_no_result(tmp_path: Path) -> None:
    records = journal(tmp_path, "ties")
    for record in records:
        if record["event"] == "stage_started" and record["stage"] == 1:
            record["active"] = ["a"]
    simulation = under(records)
    assert (simulation.ending, simulation.stages, simulation.best) == ("left", (), None)
    assert "trains on a, this policy's on a, b, c" in simulation.why
    assert "0 stages" in to_text(simulate_own_policy(records), [simulate_policy(records, {})])


def test_rollback_points_as_the_policy_keeps_them(tmp_path: Path) -> None:
    records = journal(tmp_path, "ties")
    own = simulate_own_policy(records)
    assert own.retained is not None
    assert (own.retained.peak, own.retained.peak_bytes, own.retained.gone) == (4, 400, ())
    assert own.measured == (420, pytest.approx(3600 / 13))
    assert own.copies == Copies(peak=2, mean=pytest.approx(19 / 13))
    assert own.released == Copies(peak=3, mean=pytest.approx(27 / 13))
    assert "3 (2.08) full copies, 3.0 kB (2.1 kB), by its code" in to_text(own, [own])
    last = simulate_policy(records, {}, retention="last:1")
    assert last.retained is not None
    assert (last.retained.peak, last.retained.gone) == (3, ("s1e2", "s2e2"))
    everything = simulate_policy(records, {}, retention="all")
    assert everything.retained is not None
    assert (everything.retained.peak, everything.retained.gone) == (13, ())
    best = simulate_policy(records, {}, retention="best:2")
    assert best.retained is not None
    assert best.retained.peak <= 4
    assert "no longer had" in to_text(own, [last])


def test_sizes_that_are_not_recorded_are_unknown(tmp_path: Path) -> None:
    simulation = under(journal(tmp_path, "ties"))
    sizes = {"s1e0": 5}
    usages, gone = replay_retention(simulation, retention_named("last:2"), sizes)
    first = summarize_retention(usages[:1], [], sizes)
    assert first is not None
    assert (first.peak_bytes, first.mean_bytes) == (5, 5)
    summary = summarize_retention(usages, gone, sizes)
    assert summary is not None
    assert (summary.peak, summary.peak_bytes) == (4, None)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"peak_window": 0}, "msft.peak_window must be at least 1"),
        ({"peak_window": "x"}, "peak_window must be an integer"),
        ({"compute_budget": 1.5}, "more than the run's 1"),
    ],
)
def test_policies_that_cannot_work_are_refused(
    tmp_path: Path, policy: dict[str, Any], message: str
) -> None:
    config = recorded_config(journal(tmp_path, "ties"))
    with pytest.raises(ConfigError, match=message):
        with_policy(config, policy)


def test_a_budget_that_the_learning_rate_follows_is_not_changed(tmp_path: Path) -> None:
    records = journal(tmp_path, "ties")
    records[0]["config"]["train"]["schedule"] = "cosine"
    config = recorded_config(records)
    with pytest.raises(ConfigError, match="learning rate follows its compute budget"):
        with_policy(config, {"compute_budget": 0.5})
    assert with_policy(config, {"peak_window": 1}).msft.peak_window == 1


def test_sweeps_are_combined() -> None:
    found = expand_sweeps({"max_stages": "3"}, ["peak-window=1,off", "compute-budget=0.5,1e0"])
    assert found == [
        {"max_stages": 3, "peak_window": window, "compute_budget": budget}
        for window in (1, None)
        for budget in (0.5, 1.0)
    ]
    for sweeps, message in (
        (["peak-window"], "KEY=VALUE"),
        (["lr=1,2"], "KEY: .*peak-window"),
        (["peak-window=1", "peak-window=2"], "given twice"),
        (["max-stages=1"], "given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            expand_sweeps({"max_stages": "3"}, sweeps)
    for name in ("last", "last:0", "needs:1", "best:x", "none"):
        with pytest.raises(ConfigError, match="there is no retention"):
            retention_named(name)


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "window": {"msft__peak_window": 1},
    "robust": {
        "msft__peaks": "robust",
        "msft__smoothing": 1,
        "msft__margin": 0.1,
        "msft__patience": 1,
        "msft__drop_passed": 2,
        "msft__exclusion": "soft",
    },
    "single_rollout": {"method": "single_rollout"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Return the records of real runs that differ only in their policies."""
    found = {}
    for name, changes in VARIANTS.items():
        directory = tmp_path_factory.mktemp(name)
        config = make_config(directory, train__lr=0.02, **changes)
        start(config)
        found[name] = read(Path(config.output_dir) / "journal.jsonl")
    return found


def test_a_simulation_agrees_with_a_real_run(runs: dict[str, list[Record]]) -> None:
    simulation = under(runs["paper"], peak_window=1)
    real = simulate_own_policy(runs["window"]).simulation
    known = len(simulation.stages)
    assert known >= 1
    for mine, its in zip(simulation.stages, real.stages, strict=False):
        assert mine.active == its.active
        assert mine.simulated is not None
        assert its.recorded is not None
        assert comparable(mine.simulated) == comparable(its.recorded)
    curves = [
        [r["metrics"] for r in records if r["event"] == "evaluated" and r["stage"] <= known]
        for records in (simulation.records, effective(runs["window"]))
    ]
    assert curves[0] == curves[1]


def comparable(end: StageEnd) -> tuple[Any, ...]:
    """Return the fields of a stage end that do not depend on checkpoint ids."""
    return end.epoch, end.exclude, end.to_stage, end.to_epoch


def test_a_robust_rule_first_finds_what_a_real_run_under_it_finds(
    runs: dict[str, list[Record]],
) -> None:
    robust = recorded_config(runs["robust"]).msft
    keys = ("peaks", "smoothing", "margin", "patience", "drop_passed")
    simulation = under(runs["paper"], **{key: getattr(robust, key) for key in keys})
    mine, its = (
        simulation.stages[0].simulated,
        simulate_own_policy(runs["robust"]).simulation.stages[0],
    )
    assert mine is not None
    assert its.recorded is not None
    assert comparable(mine) == comparable(its.recorded)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_runs_own_policy_reaches_the_result_and_keeps_the_same_checkpoints(
    runs: dict[str, list[Record]], name: str
) -> None:
    simulation = simulate_own_policy(runs[name]).simulation
    assert simulation.ending == "result"
    assert "with the run's own decisions" in simulation.why
    assert simulation.simulated == simulation.recorded
    usages, _ = replay_retention(simulation, retention_named("needs"), {})
    kept = [set(r["kept"]) for r in effective(runs[name]) if r["event"] == "committed"]
    assert [set(usage.kept) for usage in usages] == kept


def test_hard_exclusion_is_not_known_from_soft_one(runs: dict[str, list[Record]]) -> None:
    records = [dict(record) for record in runs["robust"]]
    config = recorded_config(records)
    hard = replace(config, msft=replace(config.msft, exclusion="hard"))
    simulation = simulate(records, hard)
    assert simulation.ending == "left"
    assert len(simulation.stages) == 1
    assert "trains on other shares of the data" in simulation.why


def test_a_margin_needs_standard_errors(tmp_path: Path) -> None:
    records = journal(tmp_path, "ties")
    with pytest.raises(RunError, match="no standard errors"):
        under(records, peaks="robust")
    simulation = under(records, peaks="robust", margin=0, smoothing=1, patience=3)
    assert stage_ends(simulation)[0] == (1.0, "roll_back", "s1e4", ())
    with pytest.raises(ConfigError, match="patience only applies to peaks robust"):
        under(records, patience=3)


def test_several_at_once_leave_the_path_after_the_first_stage(tmp_path: Path) -> None:
    simulation = under(journal(tmp_path, "ties"), drop_count=2)
    assert stage_ends(simulation) == [(1.0, "roll_back", "s1e2", ("a", "b"))]
    assert simulation.ending == "left"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal(tmp_path, "ties")
    assert main(["simulate", str(tmp_path), "--peak-window", "1"]) == 0
    out = capsys.readouterr().out
    assert "80 of 120" in out
    assert "0.75: excludes a, back to 1/0.50" in out
    assert "Simulated: 4 rollback points" in out
    assert main(["simulate", str(tmp_path / "journal.jsonl"), "--sweep", "peak-window=1,off"]) == 0
    out = capsys.readouterr().out
    assert "peak window 1: It is known" in out
    assert "peak window off: It is known" in out
    assert main(["simulate", str(tmp_path), "--json", "--method", "sft"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["run"]["ending"] == "result"
    assert tree["run"]["checkpoint_bytes"] == FULL
    assert [one["method"] for one in tree["policies"]] == ["sft"]
    assert main(["simulate", str(tmp_path / "none")]) == 1
    assert "no journal at" in capsys.readouterr().err
    assert main(["simulate", str(tmp_path), "--peak-window", "0"]) == 1
    assert "must be at least 1" in capsys.readouterr().err
