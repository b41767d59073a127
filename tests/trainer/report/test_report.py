"""Summary, report, plots and comparison of a recorded run, against numbers computed by hand."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest

from tests.support.recorded import load_curve
from tests.support.synthetic import FULL, write_run
from trainer.algorithms.base import Mode
from trainer.errors import RunError
from trainer.journal import Journal, effective, read
from trainer.report.axes import StageSteps, epoch_ticks, is_beyond, limits_of
from trainer.report.flops import Work
from trainer.report.plots import draw_curves
from trainer.report.report import compare_table, disk_text, evaluation_text, write_report
from trainer.report.summary import Peak, Result, Scores, Summary, measure_disk_usage, summarize

PLOTS = ("curves", "loss", "disk")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "msft", "ties")


def make_run(directory: Path, curve: str, method: str = "msft") -> Path:
    directory.mkdir()
    write_run(directory / "journal.jsonl", load_curve(curve), method=method)
    return directory


def summary_of(directory: Path) -> Summary:
    return summarize(read(directory / "journal.jsonl"))


def test_the_summary_of_an_msft_run(run: Path) -> None:
    summary = summary_of(run)
    assert (summary.method, summary.rule, summary.metric) == (
        "msft",
        "the paper's rule",
        "exact_match",
    )
    assert (summary.lr, summary.dtype, summary.seed) == (1e-5, "bfloat16", 7)
    assert (summary.stages, summary.roll_backs, summary.steps) == (3, 2, 120)
    assert summary.evaluations == 13
    assert summary.result == Result(checkpoint="s2e2", stage=2, epoch=0.5)
    assert summary.peaks == {
        "a": Peak(stage=1, epoch=0.5, excluded=True),
        "b": Peak(stage=2, epoch=0.5, excluded=True),
        "c": Peak(stage=3, epoch=0.25, excluded=True),
    }
    assert summary.scores["b"] == Scores(
        base_validation=0.2, base_test=0.125, validation=0.8, test=0.5
    )
    assert summary.overall.validation == 0.57
    assert summary.seconds == 24 * 0.5 + 13 * (0.25 + 1.0) + 2 * 1.0


def test_work_is_split_into_kept_and_rolled_back(run: Path) -> None:
    account = summary_of(run).account
    assert account.kept == Work(tokens=4000, flops=600 * 4000 + 120 * 40_000)
    assert account.rolled_back == Work(tokens=8000, flops=600 * 8000 + 120 * 80_000)
    assert account.evaluation == Work(tokens=15 * 50, flops=15 * (200 * 50 + 40 * 500))
    assert account.generation == Work(tokens=15 * 20, flops=15 * (200 * 20 + 40 * 400))
    assert account.padding == Work(tokens=600, flops=600 * 600)


def test_disk_beside_the_papers_policy_at_the_same_evaluations(run: Path) -> None:
    points = measure_disk_usage(effective(read(run / "journal.jsonl")))
    assert [point.paper_copies for point in points] == [0, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2]
    # The roots of stages 2 and 3 stay beside them in the released code.
    released = [point.released_copies for point in points]
    assert released == [0, 1, 1, 2, 2, 3, 2, 2, 2, 3, 3, 3, 3]
    assert [point.bytes for point in points] == [100, 200] + [300] * 11
    disk = summary_of(run).disk
    assert disk is not None
    assert (disk.peak_bytes, disk.peak) == (420, 0.42)
    assert disk.mean == pytest.approx(3600 / 13 / FULL)
    assert disk.paper_peak_copies == 2
    assert disk.paper_mean_copies == pytest.approx(19 / 13)
    assert (disk.released_peak_copies, disk.released_mean_copies) == (3, pytest.approx(27 / 13))
    write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "code on the same run: peak 3.00, mean 2.08 (these copies, and one of the root" in text
    assert (disk.resume_bytes, disk.base_bytes) == (3 * FULL, FULL)


def test_plain_sft_would_keep_one_copy_under_the_papers_policy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft", "ties", method="sft")
    points = measure_disk_usage(effective(read(run / "journal.jsonl")))
    assert [point.paper_copies for point in points] == [0, 1, 1, 1, 1]


def test_a_sub_dataset_that_was_never_excluded_has_a_best_but_no_peak(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "nobody_peaks")
    summary = write_report(run)
    assert summary.roll_backs == 0
    assert summary.peaks["a"] == Peak(stage=4, epoch=0.5, excluded=False)
    row = next(
        line for line in compare_table({"MSFT": summary}).splitlines() if line.startswith("a ")
    )
    assert row.split()[1] == "none"


def test_a_peak_window_is_named_as_the_rule(tmp_path: Path) -> None:
    summary = summary_of(make_run(tmp_path / "run", "peak_window"))
    assert summary.rule == "peak window 2"
    assert "MSFT: peak window 2" in compare_table({"MSFT": summary})


def test_losses_are_reported_as_lower_is_better(tmp_path: Path) -> None:
    summary = summary_of(make_run(tmp_path / "run", "min"))
    assert summary.overall.validation == 0.95
    assert compare_table({"MSFT": summary}).startswith("loss (lower is better)")


def test_nan_is_a_dash_in_tables_and_null_in_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "overall_never_finite")
    summary = write_report(run)
    assert summary.overall.validation is not None
    assert math.isnan(summary.overall.validation)
    tree = json.loads((run / "result.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert tree["overall"]["validation"] is None
    row = next(
        line for line in compare_table({"MSFT": summary}).splitlines() if line.startswith("overall")
    )
    assert row.split() == ["overall", "-", "0.125", "-", "0.500"]


def test_a_sub_dataset_without_test_data_is_named_beside_the_overall_that_it_is_not_in(
    run: Path,
) -> None:
    sentence = "The overall test figures leave out b, which has no test data."
    assert sentence not in compare_table({"MSFT": write_report(run)})
    journal = run / "journal.jsonl"
    records = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    for record in records:
        if record["event"] == "tested":
            del record["metrics"]["b"]
    journal.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    assert sentence in compare_table({"MSFT": write_report(run)})
    assert sentence in (run / "report.md").read_text(encoding="utf-8")


def labels(directory: Path) -> list[str]:
    (legend,) = draw_curves(effective(read(directory / "journal.jsonl"))).legends
    return [text.get_text() for text in legend.get_texts()]


def test_a_legend_has_what_occurs_alone(run: Path, tmp_path: Path) -> None:
    found = {"trained on", "excluded", "roll-back", "peak, then excluded", "result"}
    assert set(labels(run)) == found
    assert len(labels(run)) == len(found)
    assert labels(make_run(tmp_path / "sft", "ties", method="sft")) == ["trained on", "result"]


def test_the_upper_axis_has_the_epochs_of_each_stage(run: Path) -> None:
    figure = draw_curves(effective(read(run / "journal.jsonl")))
    (upper,) = figure.axes[0].child_axes
    started = [r for r in read(run / "journal.jsonl") if r["event"] == "stage_started"]
    texts = [tick.get_text() for tick in upper.get_xticklabels()]
    assert texts[0] == "0"
    assert texts.count("1") == len(started)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_an_axis_leaves_out_a_base_that_would_hide_the_best_values(mode: Mode) -> None:
    sign = 1 if mode == "min" else -1
    values = [sign * value for value in (8.8, 1.2, 1.0, 0.9, 0.95, math.nan)]
    limits = limits_of([*values, None], values[1:], mode)
    assert limits is not None
    assert limits[0] < min(values[1:5]) < max(values[1:5]) < limits[1]
    assert [is_beyond(value, limits) for value in values] == [True] + [False] * 5
    assert limits[1] - limits[0] < 1
    assert limits_of(values[1:], values[1:], mode) is None
    assert limits_of([1.0, 0.0, 0.0], [0.0, 0.0], mode) is None
    assert limits_of([1.0], [], mode) is None


def test_epochs_are_thinned_where_there_are_many() -> None:
    long = StageSteps(steps=range(0, 410, 10), epochs=[i / 2 for i in range(41)])
    assert [label for _, label in epoch_ticks([long])] == ["0", "5", "10", "15", "20"]
    short = [StageSteps(steps=(10 * i, 10 * i + 10), epochs=(0.0, 1.0)) for i in range(30)]
    ticks = epoch_ticks(short)
    assert len(ticks) <= 9
    assert {label for _, label in ticks[1:]} == {"1"}
    half = StageSteps(steps=(0, 4, 8, 12), epochs=(0, 0.5, 1.0, 1.5))
    assert epoch_ticks([half]) == [(0, "0"), (8, "1"), (12, "1.5")]
    assert epoch_ticks([]) == []


def test_the_report_is_written_with_plots_that_are_pictures(run: Path) -> None:
    summary = write_report(run)
    report = (run / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# MSFT run\n")
    assert "a peaked first, at epoch 0.5 of stage 1" in report
    assert "Checkpoint `s2e2`, from stage 2, epoch 0.50." in report
    assert "| a           |     9 |          4 |    4 |        2 |" in report.splitlines()
    for name in PLOTS:
        assert f"(plots/{name}.png)" in report
        content = (run / "plots" / f"{name}.png").read_bytes()
        image = matplotlib.image.imread(io.BytesIO(content), format="png")
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.02
    tree = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert tree == json.loads(json.dumps(summary.to_dict()))
    assert tree["disk"]["peak"] == 0.42
    assert sorted(path.name for path in run.iterdir()) == [
        "journal.jsonl",
        "plots",
        "report.md",
        "result.json",
    ]


def test_a_peak_at_epoch_0_of_a_stage_is_reported_as_such(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "peak_at_epoch_0")
    write_report(run)
    assert EPOCH_0 in (run / "report.md").read_text(encoding="utf-8")
    other = make_run(tmp_path / "other", "ties")
    write_report(other)
    assert "epoch 0 of the last stage" not in (other / "report.md").read_text(encoding="utf-8")


def test_writing_the_report_again_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    write_report(run)
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(run / "journal.jsonl", again)
    write_report(again)
    for name in ("report.md", "result.json", *(f"plots/{plot}.png" for plot in PLOTS)):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_a_run_at_any_point_of_its_journal_can_be_reported(run: Path) -> None:
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines) + 1):
        (run / "journal.jsonl").write_bytes(b"".join(lines[:count]))
        summary = summary_of(run)
        assert compare_table({"MSFT": summary})
    assert summary.result is not None
    (run / "journal.jsonl").write_bytes(b"".join(lines[:2]))
    assert write_report(run).result is None
    assert "The run is not over." in (run / "report.md").read_text(encoding="utf-8")


def test_void_records_count_only_as_repeated_work(run: Path, tmp_path: Path) -> None:
    whole = read(run / "journal.jsonl")
    cut = 17
    path = tmp_path / "resumed.jsonl"
    with Journal(path) as journal:
        for record in [*whole[:cut], {"event": "resumed", "after": 1}, *whole[2:]]:
            journal.append(**{k: v for k, v in record.items() if k not in ("seq", "time")})
    resumed, uninterrupted = summarize(read(path)), summarize(whole)
    assert resumed.account.repeated.tokens > 0
    assert resumed.to_dict() | {"account": None} == uninterrupted.to_dict() | {"account": None}
    assert resumed.account.trained == uninterrupted.account.trained


def test_a_journal_without_a_run_is_refused() -> None:
    with pytest.raises(RunError, match="no run_started record"):
        summarize([])


def test_the_comparison_of_two_runs(run: Path, tmp_path: Path) -> None:
    sft = summary_of(make_run(tmp_path / "sft", "ties", method="sft"))
    assert compare_table({"SFT": sft, "MSFT": summary_of(run)}) == COMPARISON


def test_the_comparison_as_markdown(run: Path) -> None:
    text = compare_table({"MSFT": summary_of(run)}, markdown=True)
    assert (
        "| b           | stage 2, epoch 0.50 |    0.200 |     0.125 |    0.800 |     0.500 |"
        in (text.splitlines())
    )
    assert "\n- besides: base 1.0 kB, resume point 3.0 kB\n" in text


def test_a_quarter_of_the_flops_is_the_most_that_evaluation_takes_without_advice(run: Path) -> None:
    summary = summary_of(run)
    account, advice = summary.account, "To lower it, raise evaluation.eval_every"
    for share, words in ((0.25, "25% of the FLOPs of MSFT."), (0.26, "26% of the FLOPs of MSFT.")):
        rest = account.trained.flops + account.padding.flops
        evaluated = Work(flops=round(rest * share / (1 - share)))
        changed = replace(account, evaluation=evaluated, generation=Work(), selection=Work())
        text = evaluation_text({"MSFT": replace(summary, account=changed)})
        assert words in text
        assert (advice in text) == (share > 0.25)


def test_disk_of_a_run_without_a_commit_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="nothing was committed"):
        disk_text(summarize(read(run / "journal.jsonl")[:2]))


COMPARISON = """\
exact match (higher is better), peaks found on validation data; SFT: one stage, MSFT: the \
paper's rule

sub-dataset            MSFT peak  base val  base test  SFT val  SFT test  MSFT val  MSFT test
---------------------------------------------------------------------------------------------
a            stage 1, epoch 0.50     0.100      0.125    0.500     0.500     0.400      0.500
b            stage 2, epoch 0.50     0.200      0.125    0.600     0.500     0.800      0.500
c            stage 3, epoch 0.25     0.100      0.125    0.400     0.500     0.500      0.500
overall                              0.130      0.125    0.500     0.500     0.570      0.500

MSFT rollback points on disk: peak 0.42, mean 0.28 of one full checkpoint (420 B, 277 B of \
1.0 kB; lr 1e-05, bfloat16)
the paper's disk-managed policy on the same run: peak 2.00, mean 1.46 (a full copy per distinct \
champion and best overall)
besides: base 1.0 kB, resume point 3.0 kB

work                            tokens    model FLOPs
-----------------------------------------------------
SFT training, kept               3,000    5.40 MFLOPs
SFT training, after its result   1,000    1.80 MFLOPs
SFT padding                        200  120.00 kFLOPs
SFT evaluation                     350  210.00 kFLOPs
SFT generation                     140  140.00 kFLOPs
MSFT training, kept              4,000    7.20 MFLOPs
MSFT training, rolled back       8,000   14.40 MFLOPs
MSFT padding                       600  360.00 kFLOPs
MSFT evaluation                    750  450.00 kFLOPs
MSFT generation                    300  300.00 kFLOPs

Evaluations and final tests took 5% of the FLOPs of SFT, 3% of the FLOPs of MSFT.

sub-dataset  SFT's best  own best  epoch  headroom  excluded  forgetting
------------------------------------------------------------------------
a                 0.500     0.500   0.50     0.000   stage 1       0.100
b                 0.600     0.600   0.50     0.000         -           -
c                 0.400     0.400   0.75     0.000         -           -
mean                                         0.000                 0.033

As far as 1.00 epochs of SFT show, this mixture is not one for MSFT: no sub-dataset's own best is \
better than its value at SFT's best overall checkpoint, so there is nothing to win.
SFT's best overall checkpoint is at epoch 0.75 of 1.00; the sub-datasets' own bests are up to \
0.25 epochs apart."""

EPOCH_0 = (
    "Peaked at epoch 0 of the last stage that trained on them, so that its training made them no "
    "better than they were when it began: a (stage 1), c (stage 2)."
)
