"""Lists of runs, their aggregation, tables, plots and page, on synthetic and recorded runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.recorded import load_curve
from tests.support.synthetic import write_run
from tests.support.tiny_runs import make_config
from trainer.comparison.grid import Case, build_config, compute_equal_budget, list_cases
from trainer.comparison.html import Plot, Section, render_page
from trainer.comparison.peak_shifts import (
    PeakShift,
    StagePeak,
    find_peak_shifts,
    find_stage_peaks,
    mean_peak_distance,
)
from trainer.comparison.report import write_comparison
from trainer.comparison.results import Comparison, Outcome, group_outcomes
from trainer.comparison.tables import (
    build_score_table,
    build_sections,
    build_work_table,
    describe_failures,
    render_text,
)
from trainer.config.schema import OVERALL
from trainer.errors import ConfigError
from trainer.journal import effective, read
from trainer.report.summary import Scores, Summary, summarize
from trainer.text import Table

METHODS = ("sft", "msft")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Summary]:
    """Return summaries of a recorded curve under each method."""
    directory = tmp_path_factory.mktemp("recorded")
    found = {}
    for method in METHODS:
        path = directory / f"{method}.jsonl"
        write_run(path, load_curve("ties"), method=method)
        found[method] = summarize(read(path))
    return found


def with_test(summary: Summary, **values: float) -> Summary:
    """Return the summary with other test scores; ``overall`` is their mean."""
    scores = {
        name: Scores(base_validation=0.1, base_test=0.2, validation=0.3, test=value)
        for name, value in values.items()
    }
    mean = sum(values.values()) / len(values)
    return replace(summary, scores=scores, overall=replace(summary.overall, test=mean))


def make(recorded: Mapping[str, Summary]) -> Comparison:
    """Return three seeds of SFT and three of MSFT, of which the third failed."""
    cells = {
        "sft": [(0.4, 0.6), (0.5, 0.7), (0.6, 0.8)],
        "msft": [(0.5, 0.7), (0.8, 0.8), None],
    }
    outcomes = {}
    for seed in range(3):
        for method in METHODS:
            cell = cells[method][seed]
            case = Case(method=method, budget=1.0, seed=seed)
            summary = None if cell is None else with_test(recorded[method], a=cell[0], b=cell[1])
            failure = "the disk <b>is</b> gone" if cell is None else ""
            outcomes[case] = Outcome(budget=1.0, summary=summary, failure=failure)
    return group_outcomes(outcomes)


def test_means_differences_and_spread_by_hand(recorded: dict[str, Summary]) -> None:
    (group,) = make(recorded).groups
    sft, msft = group.rows
    score = sft.score(OVERALL)
    assert score is not None
    assert (score.mean, score.error, score.count) == (
        pytest.approx(0.6),
        pytest.approx(0.1 / 3**0.5),
        3,
    )
    difference = group.difference(msft)
    assert difference is not None
    # The differences are 0.6 - 0.5 and 0.8 - 0.6; the seed that MSFT lacks is ignored.
    assert (difference.mean, difference.error, difference.count) == (
        pytest.approx(0.15),
        pytest.approx(0.05),
        2,
    )
    assert group.difference(sft) is None
    spread = msft.spread()
    assert spread is not None
    assert spread.mean == pytest.approx((0.1 + 0.0) / 2)


def test_the_tables(recorded: dict[str, Summary]) -> None:
    comparison = make(recorded)
    (group,) = comparison.groups
    rows = {row[0]: list(row[1:]) for row in build_score_table(group).rows}
    assert rows["a"] == ["0.200", "0.500 ± 0.058", "0.650 ± 0.150"]
    assert rows["overall - SFT"] == ["", "-", "+0.150 ± 0.050"]
    assert rows["runs"] == ["", "3", "2 of 3"]
    work = build_work_table(group)
    assert list(work.header) == [
        "",
        "C",
        "total",
        "training, kept",
        "training, not kept",
        "padding",
        "evaluation",
        "generation",
        "time",
        "disk",
    ]
    assert work.rows[1][:5] == ["MSFT", "1", "22.71 MFLOPs", "7.20 MFLOPs", "14.40 MFLOPs"]
    assert describe_failures(comparison) == [
        "MSFT, C = 1, seed 2 did not finish: the disk <b>is</b> gone",
    ]
    text = render_text(comparison)
    assert text.startswith("Test exact match (higher is better), 3 seeds from 0; lr 1e-05")
    assert all(section.title in text for section in build_sections(comparison))


def test_a_total_excludes_repeated_work(recorded: dict[str, Summary]) -> None:
    account = recorded["msft"].account
    again = replace(account, repeated=account.kept)
    assert again.total == account.total
    assert account.total.tokens == 4000 + 8000 + 600 + 750 + 300


def test_json_has_no_nan_and_names_failed_runs(recorded: dict[str, Summary]) -> None:
    comparison = make(recorded)
    broken = with_test(recorded["sft"], a=float("nan"), b=1.0)
    case = Case(method="sft", budget=3.0, seed=0)
    with_nan = group_outcomes(
        {**comparison.outcomes, case: Outcome(budget=3.0, summary=broken)},
    )
    tree = json.loads(json.dumps(with_nan.to_dict(), allow_nan=False))
    assert tree["groups"][1]["methods"]["SFT"]["scores"]["a"]["mean"] is None
    assert tree["runs"]["msft/C-1/seed-2"]["failure"] == "the disk <b>is</b> gone"
    one = tree["groups"][0]["methods"]["MSFT"]
    assert one["difference_to_sft"]["mean"] == pytest.approx(0.15)
    assert one["work"]["total"]["flops"] == 22_710_000


def test_at_equal_compute_msft_stands_beside_the_others(recorded: dict[str, Summary]) -> None:
    msft, sft = (with_test(recorded[m], a=x, b=x) for m, x in (("msft", 0.7), ("sft", 0.6)))
    longer = with_test(recorded["sft"], a=0.65, b=0.65)
    outcomes = {
        Case(method="sft", budget=1.0, seed=0): Outcome(budget=1.0, summary=sft),
        Case(method="msft", budget=1.0, seed=0): Outcome(budget=1.0, summary=msft),
        Case(method="sft", budget=1.0, seed=0, equal_compute=True): Outcome(
            budget=4.0, summary=longer
        ),
    }
    ordinary, equal = group_outcomes(outcomes).groups
    assert [row.budget() for row in equal.rows] == [4.0, 1.0]
    for group, gain in ((ordinary, 0.1), (equal, 0.05)):
        difference = group.difference(group.rows[1])
        assert difference is not None
        assert difference.mean == pytest.approx(gain)


def test_without_test_data_the_validation_metric_is_compared(
    recorded: dict[str, Summary],
) -> None:
    bare = replace(
        recorded["sft"],
        scores={n: replace(s, test=None) for n, s in recorded["sft"].scores.items()},
        overall=replace(recorded["sft"].overall, test=None),
    )
    case = Case(method="sft", budget=1.0, seed=0)
    comparison = group_outcomes({case: Outcome(budget=1.0, summary=bare)})
    assert render_text(comparison).startswith("Validation exact match")
    score = comparison.groups[0].rows[0].score(OVERALL)
    assert score is not None
    assert score.mean == recorded["sft"].overall.validation


def test_the_runs_of_a_comparison_and_where_they_are(tmp_path: Path) -> None:
    config = make_config(tmp_path, seed=7)
    plain = list_cases(config, METHODS)
    assert [str(case.path) for case in plain] == ["sft", "msft"]
    assert build_config(config, plain[0]).msft == config.msft
    cases = list_cases(config, METHODS, seeds=2, budgets=[1.0, 2.5], equal_compute=True)
    assert [str(case.path) for case in cases if case.seed == 8] == [
        "sft/C-1/seed-8",
        "msft/C-1/seed-8",
        "sft/C-2.5/seed-8",
        "msft/C-2.5/seed-8",
        "sft/C-1-equal/seed-8",
        "sft/C-2.5-equal/seed-8",
    ]
    of_run = build_config(config, cases[-1], 4.0)
    assert (of_run.method, of_run.seed, of_run.msft.compute_budget) == ("sft", 8, 4.0)
    assert len({case.name for case in cases}) == len({case.path for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["sft", "sgd"]}, "no method 'sgd'"),
        ({"methods": ["sft", "sft"]}, "each only once"),
        ({"methods": ["sft"], "equal_compute": True}, "needs msft"),
        ({"methods": ["sft"], "seeds": 0}, "at least 1"),
        ({"methods": ["sft"], "budgets": [1.0, 1.0]}, "twice"),
        ({"methods": ["sft"], "budgets": [1.0, 0.25]}, "at least one evaluation"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    config = make_config(tmp_path)
    with pytest.raises(ConfigError, match=message):
        list_cases(config, **options)


def test_the_c_of_equal_compute_is_a_multiple_of_the_evaluations() -> None:
    case = Case(method="sft", budget=3.0, seed=0)
    assert compute_equal_budget(case, flops=100, reference_flops=340, eval_every=0.25) == 10.25
    assert compute_equal_budget(case, flops=100, reference_flops=1, eval_every=0.25) == 0.25


def test_peaks_and_how_exclusions_move_them(tmp_path: Path) -> None:
    write_run(tmp_path / "journal.jsonl", load_curve("ties"))
    counted = effective(read(tmp_path / "journal.jsonl"))
    first = find_stage_peaks(counted, 1)
    assert first["a"] == StagePeak(epoch=0.5, has_passed=True)
    apart = mean_peak_distance(first)
    assert apart == pytest.approx(
        sum(abs(first[n].epoch - first[OVERALL].epoch) for n in "abc") / 3
    )
    found = find_peak_shifts(counted)
    second = find_stage_peaks(counted, 2)
    # Stage 2 began at epoch 0.5 of stage 1, without a; stage 3 without b.
    assert [(shift.name, shift.stage) for shift in found] == [("b", 2), ("c", 2), ("c", 3)]
    assert found[0] == PeakShift(
        name="b",
        stage=2,
        expected=first["b"].epoch - 0.5,
        actual=second["b"].epoch,
        is_known=first["b"].has_passed and second["b"].has_passed,
    )


def test_the_files_of_a_comparison_are_self_contained(
    tmp_path: Path, recorded: dict[str, Summary]
) -> None:
    comparison = make(recorded)
    for case in comparison.outcomes:
        (tmp_path / case.path).mkdir(parents=True)
        curve = load_curve("ties")
        write_run(tmp_path / case.path / "journal.jsonl", curve, method=case.method)
    write_comparison(tmp_path, comparison)
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "the disk &lt;b&gt;is&lt;/b&gt; gone" in html
    assert html.count("<svg") == 4
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)", html)
    ids = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 3
    markdown = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert re.search(r"^\| runs +\| +\| +3 \| +2 of 3 \|$", markdown, re.MULTILINE)
    assert "the disk &lt;b&gt;is&lt;/b&gt; gone" in markdown
    for text in (html, markdown, render_text(comparison)):
        assert len(re.findall(r"MSFT, C = 1, seed \d: headroom and forgetting", text)) == 2
        assert text.count("this mixture is not one for MSFT") == 2
    for name in ("peaks", "shifts", "budgets", "losses"):
        assert f"(plots/{name}.svg)" in markdown
        picture = ElementTree.parse(tmp_path / "plots" / f"{name}.svg")  # noqa: S314
        assert len(list(picture.iter())) > 50
    again = {path: path.read_bytes() for path in tmp_path.glob("compare.*")}
    write_comparison(tmp_path, comparison)
    assert {path: path.read_bytes() for path in again} == again


def test_a_page_escapes_all_text() -> None:
    evil = "<script>&\"'"
    table = Table(header=(evil, evil), rows=[(evil, evil)])
    content = render_page(
        evil,
        [
            evil,
            Section(title=evil, table=table),
            Plot(name="evil", title=evil, caption=evil, svg="<svg></svg>"),
        ],
    )
    assert "<script>" not in content
    assert content.count("&lt;script&gt;&amp;&quot;&#x27;") == 10
