"""Headroom and forgetting of recorded runs, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.recorded import load_curve
from tests.support.synthetic import write_run
from trainer.cli.main import main
from trainer.errors import RunError
from trainer.journal import Record, read
from trainer.report.headroom import Diagnosis, Forgetting, Headroom, diagnose
from trainer.report.headroom_table import headroom_notes, headroom_table
from trainer.report.report import compare_table, write_report
from trainer.report.summary import summarize

FORGOTTEN = {
    "mode": "max",
    "compute_budget": 0.75,
    "stages": [
        {
            "a": [0.1, 0.5, 0.4, 0.3],
            "b": [0.2, 0.3, 0.6, 0.5],
            "overall": [0.15, 0.4, 0.5, 0.4],
        },
        {
            "a": [0.5, 0.4, 0.45, 0.1],
            "b": [0.3, 0.6, 0.8, 0.5],
            "overall": [0.4, 0.5, 0.625, 0.3],
        },
    ],
}
"""a is best at epoch 0.25 of stage 1, is excluded there, and has lost 0.05 at the result."""


def records_of(path: Path, curve: dict[str, Any], method: str = "msft") -> list[Record]:
    path.mkdir(exist_ok=True)
    write_run(path / "journal.jsonl", curve, method=method)
    return read(path / "journal.jsonl")


def rewrite(path: Path, records: list[Record]) -> Path:
    """Write changed records as the journal of a run."""
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (path / "journal.jsonl").write_text(lines, encoding="utf-8")
    return path


def with_errors(records: list[Record], **errors: float) -> list[Record]:
    return [r | {"errors": errors} if r["event"] == "evaluated" else r for r in records]


def close(value: float) -> Any:
    return pytest.approx(value)


def test_headroom_and_forgetting_of_a_run_of_msft(tmp_path: Path) -> None:
    found = diagnose(records_of(tmp_path, FORGOTTEN))
    # SFT's best overall is at epoch 0.5, where a has 0.4 and b has 0.6.
    assert (found.epoch, found.last_epoch, found.count) == (0.5, 0.75, 2)
    assert found.headroom["a"] == Headroom(
        at_best_overall=0.4,
        own_best=0.5,
        epoch=0.25,
        has_passed=True,
        change=close(0.1),
        relative=close(1.0),
        error=None,
    )
    assert found.headroom["b"].change == 0
    assert found.forgetting == {
        "a": Forgetting(
            stage=1,
            at_exclusion=0.5,
            at_result=0.45,
            change=close(0.05),
            relative=close(0.5),
        )
    }
    assert (found.mean_headroom, found.mean_forgetting) == (close(0.05), close(0.025))
    assert found.spread == 0.25
    assert found.may_pay
    assert "is one for MSFT: the mean headroom, 0.050, exceeds" in found.verdict()


def test_the_headroom_of_sft_and_of_msft_is_the_same(tmp_path: Path) -> None:
    sft = diagnose(records_of(tmp_path / "sft", FORGOTTEN, "sft"))
    msft = diagnose(records_of(tmp_path / "msft", FORGOTTEN))
    assert sft.headroom == msft.headroom
    assert sft.forgetting == {}
    assert sft.may_pay
    assert "if the forgetting of the excluded adds up to less than 0.100" in sft.verdict()


def test_with_losses_lower_is_better(tmp_path: Path) -> None:
    negated = [
        {name: [1 - value for value in values] for name, values in stage.items()}
        for stage in FORGOTTEN["stages"]
    ]
    found = diagnose(records_of(tmp_path, FORGOTTEN | {"mode": "min", "stages": negated}))
    assert found.headroom["a"].change == close(0.1)
    assert found.headroom["a"].relative == close(0.1 / 0.9)
    assert found.forgetting["a"].change == close(0.05)


def test_more_forgetting_than_headroom_is_a_gain_of_longer_training(tmp_path: Path) -> None:
    later = FORGOTTEN["stages"][1] | {"a": [0.5, 0.4, 0.2, 0.1]}
    stages = [FORGOTTEN["stages"][0], later]
    found = diagnose(records_of(tmp_path, FORGOTTEN | {"stages": stages}))
    assert (found.mean_headroom, found.mean_forgetting) == (close(0.05), close(0.15))
    assert not found.may_pay
    assert "0.050, does not exceed the forgetting, 0.150" in found.verdict()


def test_equal_headroom_and_forgetting_win_nothing(tmp_path: Path) -> None:
    found = diagnose(records_of(tmp_path, load_curve("peak_window")))
    assert found.mean_headroom == close(found.mean_forgetting)
    assert not found.may_pay


def test_a_result_of_the_first_stage_is_that_of_sft(tmp_path: Path) -> None:
    found = diagnose(records_of(tmp_path, load_curve("peak_at_epoch_0")))
    assert (found.is_sfts, found.forgetting, found.may_pay) == (True, {}, False)
    assert "no later stage was better" in found.verdict()
    assert found.unpassed == ["b"]
    assert headroom_notes(found)[-1].endswith("may be larger: b.")


def test_headroom_within_a_standard_error_is_noise(tmp_path: Path) -> None:
    records = records_of(tmp_path, FORGOTTEN, "sft")
    found = diagnose(with_errors(records, a=0.11, b=0.05))
    assert (found.noise, found.clear, found.may_pay) == (["a"], [], False)
    assert "by more than one standard error, so there is nothing to win" in found.verdict()
    assert "noise: a." in "\n".join(headroom_notes(found))
    assert headroom_table(found).rows[0][-1] == "0.110"
    assert diagnose(with_errors(records, a=0.09, b=0.05)).may_pay


def test_where_units_mix_the_means_are_relative_to_the_base(tmp_path: Path) -> None:
    records = records_of(tmp_path, FORGOTTEN)
    records[0]["metrics"] = {"a": "exact_match", "b": "overlap"}
    found = diagnose(records)
    # 0.1 and 0.05 of the base's 0.1, for one of two sub-datasets.
    assert (found.mean_headroom, found.mean_forgetting) == (close(0.5), close(0.25))
    assert "the mean headroom, 50.0%, exceeds the forgetting, 25.0%" in found.verdict()
    table = headroom_table(found)
    assert list(table.header).count("relative") == 2
    assert [row[5] for row in table.rows] == ["100.0%", "0.0%", "50.0%"]


def test_a_metric_that_is_not_finite_has_no_headroom(tmp_path: Path) -> None:
    records = records_of(tmp_path, FORGOTTEN, "sft")
    for record in records:
        if record["event"] == "evaluated":
            record["metrics"]["b"] = float("nan")
    found = diagnose(records)
    assert list(found.headroom) == ["a"]
    assert found.mean_headroom == close(0.1)


@pytest.mark.parametrize(
    ("method", "count", "message"),
    [
        ("ies", None, "a run of ies has no roll-out of plain SFT"),
        ("msft", 9, "the first roll-out of the run is not over"),
    ],
)
def test_a_run_without_a_whole_roll_out_of_sft_is_refused(
    tmp_path: Path, method: str, count: int | None, message: str
) -> None:
    records = records_of(tmp_path, FORGOTTEN)[:count]
    records[0]["method"] = method
    with pytest.raises(RunError, match=message):
        diagnose(records)
    assert summarize(records).diagnosis is None
    write_report(rewrite(tmp_path, records))
    assert "Headroom is not known: " in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_forgetting_is_reported_without_a_roll_out_of_sft(tmp_path: Path) -> None:
    records = records_of(tmp_path, FORGOTTEN)
    records[0]["method"] = "online"
    summary = write_report(rewrite(tmp_path, records))
    assert summary.diagnosis is None
    assert summary.forgetting["a"].change == close(0.05)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    row = "| a           |  stage 1 |        0.500 |     0.450 |      0.050 |    50.0% |"
    assert row in report.splitlines()


def test_a_run_without_a_finite_overall_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finite overall metric"):
        diagnose(records_of(tmp_path, load_curve("overall_never_finite"), "sft"))


def test_every_report_of_a_run_has_headroom_and_forgetting(tmp_path: Path) -> None:
    records_of(tmp_path, FORGOTTEN)
    summary = write_report(tmp_path)
    assert isinstance(summary.diagnosis, Diagnosis)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert summary.diagnosis.verdict() in report
    row = "| a           |      0.400 |    0.500 |  0.25 |    0.100 |  stage 1 |      0.050 |"
    assert row in report.splitlines()
    assert compare_table({"MSFT": summary}).endswith("\n".join(headroom_notes(summary.diagnosis)))
    tree = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["diagnosis"]
    assert tree["headroom"]["a"]["change"] == close(0.1)
    assert (tree["mean_forgetting"], tree["may_pay"]) == (close(0.025), True)
    assert tree["verdict"] == summary.diagnosis.verdict()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records_of(tmp_path / "yes", FORGOTTEN, "sft")
    assert main(["diagnose", str(tmp_path / "yes")]) == 0
    assert "may be one for MSFT" in capsys.readouterr().out
    records = records_of(tmp_path / "no", FORGOTTEN, "sft")
    rewrite(tmp_path / "no", with_errors(records, a=0.2, b=0.2))
    assert main(["diagnose", str(tmp_path / "no"), "--json"]) == 5
    tree = json.loads(capsys.readouterr().out)
    assert (tree["may_pay"], tree["noise"], tree["mean_forgetting"]) == (False, ["a"], None)
    records[0]["method"] = "continual"
    assert main(["diagnose", str(rewrite(tmp_path / "no", records))]) == 1
    assert capsys.readouterr().err.startswith("msft-train: a run of continual has no roll-out")


def test_a_run_without_a_right_answer_is_not_diagnosed_as_one_without_headroom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{name: [0.0] * 4 for name in ("a", "b", "overall")}]
    records_of(tmp_path, FORGOTTEN | {"stages": stages}, "sft")
    assert main(["diagnose", str(tmp_path)]) == 4
    assert "No answer was right in any evaluation" in capsys.readouterr().err
