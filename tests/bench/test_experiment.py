"""The experiment: no run is repeated, budgets match FLOPs, tables say what was recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.experiment import make_data, mixtures, runs
from bench.experiment.false_exclusions import (
    Setting,
    exclusion_table,
    first_exclusion,
    fit,
    recorded_curves,
    simulate,
)
from bench.experiment.records import Case, append, condense_journal, hash_config, load
from bench.experiment.results import BEGIN, END, render, verdict, write_results
from bench.experiment.rows import build_rows
from bench.experiment.runs import Experiment
from bench.experiment.variants import CHOSEN, PHASES, find_variant, matching_budget
from tests.support.tiny_runs import make_config, write_model
from trainer import run
from trainer.algorithms.peaks import PeakRule
from trainer.cli.main import main
from trainer.journal import read
from trainer.training.directory import JOURNAL

MIXTURE = {
    "groups": mixtures._sub("groups", 24),
    "month": mixtures._sub("month", 24),
}


def make_record(variant: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    """Return a record of a run on two sub-datasets whose losses are ``loss`` ± 0.1."""
    losses = {"a": loss - 0.1, "b": loss + 0.1, "overall": loss}
    return {
        "mixture": "heterogeneous",
        "variant": variant,
        "seed": seed,
        "config": "0" * 12,
        "budget": 10.0,
        "eval_every": 1.0,
        "scores": {n: {"validation": v + 1, "test": v} for n, v in losses.items()},
        "examples": {n: {"train": 8, "validation": 50, "test": 50} for n in "ab"},
        "right": {"a": 10, "b": 30},
        "flops": {"training": 6 * 10**12, "total": 10**13, "evaluation": 2 * 10**12, "tests": 0},
        "first_stage": {
            "epochs": [0.0, 1.0, 2.0],
            "values": {"a": [2.0, 1.0, 1.5], "b": [2.0, 1.8, 1.0], "overall": [2.0, 1.4, 1.2]},
            "errors": {"a": [0.01] * 3, "b": [0.01] * 3},
        },
        "headroom": {"a": 0.5, "b": 0.0},
        "forgetting": {},
        **changes,
    }


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    """Return a maker of small experiments whose runs are trained in this process."""

    def run_here(
        commands: Mapping[str, Sequence[str]],
        *,
        jobs: int,
        on_exit: Callable[[str, int, str], bool],
        on_start: Callable[[str], None],
    ) -> None:
        for name, arguments in commands.items():
            on_start(name)
            trained.append(name)
            if not on_exit(name, main(arguments), ""):
                return

    trained: list[str] = []
    monkeypatch.setattr(mixtures, "HELD_OUT", 8)
    for module in (mixtures, make_data):
        monkeypatch.setattr(module, "MIXTURES", {"heterogeneous": MIXTURE})
    monkeypatch.setattr(runs, "run_subprocesses", run_here)
    model = write_model(tmp_path / "base")

    def make(**changes: Any) -> Experiment:
        made = Experiment(
            directory=tmp_path / "runs",
            records=tmp_path / "records.jsonl",
            overrides=[f"model.path={model}", "msft.compute_budget=2", "train.batch_size=8"],
            **changes,
        )
        made.trained = trained  # type: ignore[attr-defined]
        return made

    return make


def test_a_recorded_run_is_not_trained_again_and_its_directory_is_gone(
    experiment: Callable[..., Any],
) -> None:
    cases = [Case(mixture="heterogeneous", variant="sft", seed=0)]
    first = experiment()

    assert first.complete(cases, jobs=1)
    assert experiment().complete(cases, jobs=1)

    assert len(first.trained) == 1
    (record,) = load(first.records)
    assert sum(record["right"].values()) <= 16
    assert record["flops"]["total"] > record["flops"]["training"] > 0
    assert record["first_stage"]["epochs"] == [0, 1, 2]
    assert not list((first.directory / "heterogeneous" / "sft").iterdir())


def test_a_finished_run_without_a_record_is_condensed_and_not_trained_again(
    experiment: Callable[..., Any],
) -> None:
    cases = [Case(mixture="heterogeneous", variant="sft", seed=0)]
    first = experiment(keep=True)
    first.complete(cases, jobs=1)
    before = load(first.records)
    first.records.unlink()

    assert experiment(keep=True).complete(cases, jobs=1)

    assert len(first.trained) == 1
    assert load(first.records) == before


def test_a_variant_waits_for_those_that_it_matches_and_an_equal_run_is_shared(
    experiment: Callable[..., Any],
) -> None:
    names = ("sft@msft-window-training", "sft@sft-total", "msft-window", "sft")
    made = experiment()

    cases = [Case(mixture="heterogeneous", variant=name, seed=1) for name in names]
    assert made.complete(cases, jobs=1)

    found = {record["variant"]: record for record in load(made.records)}
    assert set(found) == set(names)
    assert found["sft@sft-total"]["budget"] == 2
    assert not any("sft@sft-total" in name for name in made.trained)
    assert found["sft@msft-window-training"]["budget"] == matching_budget(
        found["sft"], found["msft-window"], "training"
    )


def test_a_run_that_fails_stops_no_other_and_the_answer_is_false(
    experiment: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = experiment()
    made.overrides = [*made.overrides, "train.micro_batch_size=8"]
    cases = [Case(mixture="heterogeneous", variant=name, seed=0) for name in ("sft", "sft-linear")]
    monkeypatch.setattr(runs, "_command", lambda config, path: ["run", "missing.yaml"])

    assert not made.complete(cases, jobs=1)

    assert set(made.failures) == set(cases)
    assert load(made.records) == []


def test_nothing_is_trained_when_the_time_is_over(experiment: Callable[..., Any]) -> None:
    made = experiment()
    cases = [Case(mixture="heterogeneous", variant="sft", seed=0)]

    assert not made.complete(cases, jobs=1, minutes=0)
    assert made.trained == []


def test_a_torn_line_is_no_record_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(path, {"a": 1})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"a": 2')
    append(path, {"a": 3})

    assert load(path) == [{"a": 1}, {"a": 3}]


def test_the_hash_depends_on_settings_and_data_and_not_on_places(tmp_path: Path) -> None:
    one, two = make_config(tmp_path / "one"), make_config(tmp_path / "two")
    other = make_config(tmp_path / "two", train__lr=0.02)
    assert hash_config(one) == hash_config(two) != hash_config(other)

    with (tmp_path / "two" / "data" / "copy.test.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "new=", "completion": "new"}\n')
    assert hash_config(two) != hash_config(one)


def test_a_record_has_what_a_run_of_msft_decided(tmp_path: Path) -> None:
    config = make_config(tmp_path, method="msft")
    run(config)

    case = Case(mixture="heterogeneous", variant="msft-3", seed=0)
    record = condense_journal(case, config, read(tmp_path / "run" / JOURNAL))

    assert json.loads(json.dumps(record)) == record
    excluded = {name for one in record["excluded"] for name in one["names"]}
    assert excluded
    assert set(record["forgetting"]) <= excluded <= {"copy", "same", "sum"}
    kinds = ("kept", "rolled_back", "selection", "padding", "evaluation", "generation")
    assert sum(record["flops"][kind] for kind in kinds) == record["flops"]["total"]


@pytest.mark.parametrize(("kind", "budget"), [("training", 20.0), ("total", 15.0)])
def test_a_budget_matches_the_flops_of_a_kind_without_the_final_tests(
    kind: Any, budget: float
) -> None:
    own = make_record("sft", 0, 1.0, flops={"training": 10, "total": 22, "tests": 2})
    other = make_record("msft-3", 0, 1.0, flops={"training": 20, "total": 32, "tests": 2})

    assert matching_budget(own, other, kind) == budget


def test_every_phase_lists_a_variant_after_those_that_it_matches() -> None:
    for phase in PHASES.values():
        names = [variant.name for variant in phase.variants]
        for variant in phase.variants:
            if variant.match is not None:
                before = names[: names.index(variant.name)]
                assert {variant.match.own, variant.match.reference} <= set(before)
            assert find_variant(variant.name) == variant
    assert not set(PHASES["choose"].seeds) & set(PHASES["final"].seeds)
    assert "heterogeneous2" not in PHASES["choose"].mixtures


def test_rows_pair_the_differences_by_seed() -> None:
    records = [
        make_record("sft", 2, 9.0),
        *(make_record("sft", seed, 1.0 + seed) for seed in (2, 3)),
        *(make_record(CHOSEN, seed, 0.5 + seed) for seed in (2, 3)),
        make_record(CHOSEN, 0, 100.0),
    ]
    sft, chosen = build_rows(records, PHASES["final"])

    assert (sft.seeds, chosen.seeds) == ((2, 3), (2, 3))
    assert sft.score is not None
    assert sft.score.mean == 3.5
    assert chosen.to_reference is not None
    assert (chosen.to_reference.mean, chosen.to_reference.error) == (-0.5, 0.0)
    assert sft.right is not None
    assert sft.right.mean == 0.4
    assert sft.spread is not None
    assert sft.spread.mean == pytest.approx(0.1)


def test_the_verdict_asks_for_two_standard_errors_to_lead_and_one_to_lag() -> None:
    records = [make_record(CHOSEN, seed, 1.0) for seed in (2, 3)]
    for name, gains in {"sft": (0.4, 0.5), "ies": (0.1, 0.9), "sro": (-0.3, -0.1)}.items():
        records += [
            make_record(name, seed, 1.0 + gain) for seed, gain in zip((2, 3), gains, strict=True)
        ]

    found = verdict(build_rows(records, PHASES["final"]))

    assert "is better than SFT, and worse than SRO, and as good as IES." in found
    assert verdict(build_rows(records[2:], PHASES["final"])) == ""


def test_the_tables_are_written_between_the_comments(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    records = [make_record("sft", seed, 1.0) for seed in (0, 1, 2)]

    write_results(records, page, tmp_path / "experiment.json")

    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert render(records, PHASES["choose"]).strip() in text
    assert "| a           |      1 |      1 |" in text
    assert "| b           |     >2 |     >2 |" in text
    summary = json.loads((tmp_path / "experiment.json").read_text(encoding="utf-8"))
    assert summary["choose"][0]["score"]["mean"] == 2.0
    assert summary["final"][0]["score"]["mean"] == 1.0
    assert len(list(tmp_path.glob("*.svg"))) == 4


def test_a_page_without_the_comments_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("text", encoding="utf-8")

    with pytest.raises(SystemExit, match="no place for the tables"):
        write_results([], page, tmp_path / "experiment.json")


CURVES = {"early": [3.0, 1.0, 2.0, 3.0, 4.0], "late": [5.0, 4.0, 3.0, 2.0, 1.0]}
FIRST_BEST = Setting(label="first best", rule=PeakRule())


def test_the_true_curve_falls_and_then_rises_and_keeps_one_that_does() -> None:
    assert fit(CURVES["early"]) == CURVES["early"]
    assert fit(CURVES["late"]) == CURVES["late"]
    assert fit([4.0, 2.0, 3.0, 1.0, 2.0]) == [4.0, 2.5, 2.5, 1.0, 2.0]
    assert fit([3.0, 1.0, 3.0, 2.0]) == [3.0, 1.0, 2.5, 2.5]


def test_the_first_stage_excludes_the_earliest_peak_that_has_passed() -> None:
    errors = {name: [0.0] * 5 for name in CURVES}
    window = Setting(label="window", rule=PeakRule(), window=2)
    found = first_exclusion(CURVES, errors, window)

    assert found is not None
    assert (found.name, found.peak, found.end) == ("early", 1, 3)
    assert first_exclusion({"late": CURVES["late"]}, errors, FIRST_BEST) is None


def test_noise_makes_false_exclusions_that_a_margin_prevents() -> None:
    slow = [2.0 - 0.02 * i for i in range(12)]
    runs_of = [({"slow": slow}, {"slow": [0.05] * 12})]
    hasty = Setting(label="hasty", rule=PeakRule(), window=1)
    robust = Setting(label="robust", rule=PeakRule(smoothing=3, patience=4), window=4)

    noisy = simulate(runs_of, hasty, draws=100)
    assert noisy.false > 0.9
    assert simulate(runs_of, robust, draws=100).false < noisy.false
    assert simulate([({"slow": slow}, {"slow": [0.0] * 12})], hasty, draws=3).any == 0
    assert simulate(runs_of, hasty, draws=100) == noisy


def test_only_curves_of_plain_sft_are_simulated() -> None:
    records = [make_record("sft", 0, 1.0), make_record(CHOSEN, 0, 1.0)]

    assert len(recorded_curves(records)["heterogeneous"]) == 1
    assert len(exclusion_table(records, draws=4).rows) > 1
