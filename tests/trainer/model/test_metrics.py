"""Metrics of the user's choice: for each sub-dataset, and functions of their own."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.support.runs import outcome
from tests.support.tiny_runs import make_config, write_lines
from tests.support.together import together
from trainer.algorithms.overall import mixture_metrics
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.errors import ConfigError, RunError
from trainer.journal import effective, read
from trainer.model.evaluate import Evaluator
from trainer.report.plots import draw_curves
from trainer.report.report import write_report
from trainer.training.run import resume, start

MODULE = """
import random

import numpy as np
import torch

calls = []


def similarity(generations, references, rows):
    random.random(), np.random.rand(), torch.rand(1)
    assert [row["completion"] for row in rows] == references
    calls.append(generations)
    return [float(len(set(g) & set(r))) for g, r in zip(generations, references)]


def weight(model, tokenizer, rows):
    assert not model.training and tokenizer.eos_token_id == 0
    return torch.tensor(len(rows) + float(next(model.parameters()).abs().mean()))


def alternating(generations, references, rows):
    return np.arange(len(rows)) % 2


def broken(generations, references, rows):
    return 1 / 0


def short(generations, references, rows):
    return [1.0]


def lost(generations, references, rows):
    return 1.0


def unknown(generations, references, rows):
    return float("nan")


def other(texts):
    return 1.0


similarity.mode = "max"
weight.mode = "min"
alternating.mode = broken.mode = short.mode = other.mode = unknown.mode = "max"
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Reports are not the matter here, except where a test writes one."""
    monkeypatch.setattr("trainer.training.run.write_report", lambda directory: None)


def files(name):
    return {part: f"data/{name}.{part}.jsonl" for part in ("train", "validation", "test")}


def make(directory, metrics, **changes):
    """Return a configuration with a metric for each sub-dataset; ``None`` leaves it out."""
    (directory / "mine.py").write_text(MODULE, encoding="utf-8")
    own = {
        name: {**files(name), **({"metric": metric} if metric else {})}
        for name, metric in metrics.items()
    }
    settings = {"msft__compute_budget": 1.0, "msft__max_stages": 2, **changes}
    return make_config(directory, data__directory=None, data__sub_datasets=own, **settings)


def evaluated(directory):
    return [r for r in effective(read(Path(directory) / "journal.jsonl")) if "errors" in r]


MIXED = {"copy": "mine:similarity", "same": "token_accuracy", "sum": "loss"}


def test_each_sub_dataset_has_its_metric_and_champions_compare_within_it(tmp_path):
    config = make(tmp_path, MIXED, msft__max_stages=3, train__lr=0.02)
    summary = start(config)
    record = read(Path(config.output_dir) / "journal.jsonl")[0]
    assert record["metrics"]["copy"] == f"{tmp_path / 'mine.py'}:similarity"
    assert (record["mode"], record["modes"]) == ("max", {"sum": "min"})
    assert (record["metric"], record["overall"]) == ("relative_change", "relative")
    found = evaluated(config.output_dir)
    base = found[0]["metrics"]
    assert base["overall"] == 0.0
    for one in found:
        metrics = one["metrics"]
        assert metrics["sum"] == one["losses"]["sum"] != one["losses"]["same"]
        assert 0 <= metrics["same"] <= 1
        changes = [
            (metrics["copy"] - base["copy"]) / (base["copy"] or 1),
            (metrics["same"] - base["same"]) / (base["same"] or 1),
            (base["sum"] - metrics["sum"]) / base["sum"],
        ]
        assert metrics["overall"] == pytest.approx(sum(changes) / 3)
        assert all(math.isfinite(error) for error in one["errors"].values())
    stages = [r for r in read(Path(config.output_dir) / "journal.jsonl") if "active" in r]
    decisions = [r for r in read(Path(config.output_dir) / "journal.jsonl") if "exclude" in r]
    first = next(r for r in decisions if r["exclude"])
    curve = [one["metrics"] for one in found if one["stage"] == first["stage"]]
    ways = {"copy": max, "same": max, "sum": min}
    peaks = {
        name: [m[name] for m in curve].index(way(m[name] for m in curve))
        for name, way in ways.items()
    }
    assert first["exclude"] == [min(stages[0]["active"], key=lambda name: (peaks[name], name))]
    best = max(found, key=lambda one: one["metrics"]["overall"])
    assert summary.result.checkpoint == best["checkpoint"]
    assert summary.overall.test is not None


def test_a_report_names_the_metrics_and_the_rule(tmp_path):
    config = make(tmp_path, {"copy": "loss", "same": None, "sum": "mine:weight"}, train__lr=0.02)
    start(config)
    write_report(config.output_dir)
    text = (Path(config.output_dir) / "report.md").read_text(encoding="utf-8")
    assert (
        "The metrics are loss (lower is better) for copy, loss (lower is better) for same, "
        "mine:weight (lower is better) for sum; overall is the mean relative change against the "
        "base, in each metric's direction." in text
    )
    figure = draw_curves(effective(read(Path(config.output_dir) / "journal.jsonl")))
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[:4] == ["loss ↓", "loss ↓", "mine:weight ↓", "relative change ↑"]
    found = evaluated(config.output_dir)
    assert found[0]["metrics"]["sum"] > 6
    assert math.isnan(found[0]["errors"]["sum"]), "one number has no standard error"


def test_the_overall_can_be_the_mean_of_those_in_one_unit(tmp_path):
    metrics = {"copy": "token_accuracy", "same": None, "sum": None}
    config = make(tmp_path, metrics, evaluation__overall="sub_datasets", msft__max_stages=1)
    start(config)
    for one in evaluated(config.output_dir):
        losses = one["losses"]
        assert one["metrics"]["overall"] == (losses["same"] + losses["sum"]) / 2
    every = dict.fromkeys(metrics, "token_accuracy")
    settings = {"evaluation__overall": "examples", "output_dir": str(tmp_path / "other")}
    config = make(tmp_path, {**every, "sum": "mine:weight"}, **settings)
    with pytest.raises(ConfigError, match=r"set evaluation\.metric to the metric of some of them"):
        start(config)


def test_plain_text_does_not_forbid_exact_match_for_the_others(tmp_path, caplog):
    config = make(tmp_path, {"copy": None, "same": None}, evaluation__metric="exact_match")
    lines = [{"text": f"{a}{b}{a}{b}"} for a in "abcdefgh" for b in "xyz"]
    for part in ("train", "validation"):
        write_lines(tmp_path / f"data/text.{part}.jsonl", lines)
    path = tmp_path / "config.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    text = {part: f"data/text.{part}.jsonl" for part in ("train", "validation")}
    tree["data"]["sub_datasets"]["text"] = text
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["run", str(path), "--quiet"]) == 0
    record = read(Path(config.output_dir) / "journal.jsonl")[0]
    assert record["metrics"] == {"copy": "exact_match", "same": "exact_match", "text": "loss"}
    for one in evaluated(config.output_dir):
        assert one["metrics"]["text"] == one["losses"]["text"]


def test_a_function_sees_whole_generations_and_the_columns_of_the_rows(tmp_path):
    changes = {
        "train__lr": 0.02,
        "msft__max_stages": 1,
        "msft__compute_budget": 20.0,
        "evaluation__eval_every": 5.0,
    }
    config = make(tmp_path, {"same": "mine:similarity"}, **changes)
    start(config)
    found = evaluated(config.output_dir)
    assert found[0]["metrics"]["same"] < found[-1]["metrics"]["same"] == 2, "the letters of 'ok'"


def test_numbers_of_examples_give_standard_errors_and_robust_peaks(tmp_path):
    changes = {"msft__peaks": "robust", "msft__margin": 0.1}
    config = make(tmp_path, {"copy": "mine:alternating", "sum": "loss"}, **changes)
    start(config)
    for one in evaluated(config.output_dir):
        assert one["metrics"]["copy"] == 0.5
        assert one["errors"]["copy"] == pytest.approx(0.5 / math.sqrt(5))


def states_now():
    """Return the states of the random number generators."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_function_changes_no_random_number(tmp_path):
    config = make(tmp_path, {"same": "mine:similarity"}, msft__max_stages=1)
    states = []

    def watching(self, model, *arguments):
        before = states_now()
        result = call(self, model, *arguments)
        states.append(before == states_now())
        return result

    call = Evaluator.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "__call__", watching)
        start(config)
    assert states
    assert all(states)


def test_a_run_with_functions_resumes_to_the_same_end(tmp_path, monkeypatch):
    config = make(tmp_path, MIXED, resume_every=2)
    start(config)
    whole = outcome(Path(config.output_dir))
    again = make(tmp_path, MIXED, resume_every=2, output_dir=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "trainer.training.run._finish", lambda *_: (_ for _ in ()).throw(RunError("no"))
        )
        with pytest.raises(RunError, match="no"):
            start(again)
    (tmp_path / "config.yaml").unlink()
    resume(again.output_dir)
    assert outcome(Path(again.output_dir)) == whole


def test_two_processes_measure_as_one(tmp_path):
    metrics = {"copy": "mine:similarity", "same": "mine:weight", "sum": "exact_match"}
    config = make(tmp_path, metrics, msft__max_stages=1)
    start(config)
    path = str(tmp_path / "config.yaml")
    ways = ["run", path, f"output_dir={tmp_path / '2'}", "--quiet"]
    assert together(lambda rank: main(ways), tmp_path) == {0: 0, 1: 0}
    one, two = (evaluated(d)[0]["metrics"] for d in (config.output_dir, tmp_path / "2"))
    assert two == pytest.approx(one, abs=1e-5)


MISTAKES = {
    "exact_mach": r"evaluation\.metric must be one of .*; got 'exact_mach'; did you mean",
    "gone.py:f": r"evaluation\.metric: there is no file .*gone\.py with the function 'f'",
    "no_such_module:f": "cannot be imported: ModuleNotFoundError",
    "mine:gone": "cannot be imported: AttributeError",
    "mine:other": r"must be a function with the parameters \(generations, references, rows\) or",
    "mine:lost": r'lost has no direction: write `lost\.mode = "max"`, or "min"',
    "mine:broken": r"broken raised ZeroDivisionError: division by zero \(.*mine\.py, line 27\)",
    "mine:short": r"or a list of 6 numbers, .*; it returned a list of 1 items that begins \[1\.0\]",
}


@pytest.mark.parametrize("metric", MISTAKES)
def test_a_mistake_is_a_sentence(tmp_path, metric):
    make(tmp_path, {"copy": None})
    with pytest.raises((ConfigError, RunError), match=MISTAKES[metric]):
        start(make(tmp_path, {"copy": None}, evaluation__metric=metric))


def test_a_run_whose_function_failed_continues_once_it_is_corrected(tmp_path):
    config = make(tmp_path, {"copy": "mine:broken"}, msft__max_stages=1)
    with pytest.raises(RunError, match="msft-train resume RUN"):
        start(config)
    (tmp_path / "mine.py").write_text(MODULE.replace("1 / 0", "1.0"), encoding="utf-8")
    resume(config.output_dir)
    assert evaluated(config.output_dir)[0]["metrics"]["copy"] == 1.0
    (tmp_path / "mine.py").unlink()
    with pytest.raises(
        ConfigError, match=r"there is no file .*mine\.py with the function 'broken'"
    ):
        load_config(Path(config.output_dir) / "config.yaml")


def test_a_run_by_relative_change_says_that_no_answer_is_right(tmp_path):
    changes = {"evaluation__overall": "relative", "train__lr": 1e-4, "msft__max_stages": 1}
    summary = start(make(tmp_path, {"copy": None}, evaluation__metric="exact_match", **changes))
    assert summary.never_right
    assert summary.metric == "relative_change"


def test_a_run_whose_metric_is_never_a_number_says_so(tmp_path, capsys, monkeypatch):
    config = make(tmp_path, {"copy": "mine:unknown"}, msft__max_stages=1)
    monkeypatch.setattr("trainer.training.run.write_report", write_report)
    assert start(config).never_measured
    report = Path(config.output_dir, "report.md").read_text(encoding="utf-8")
    assert report.split("\n\n")[1].startswith("No metric gave a finite number")
    assert main(["resume", str(config.output_dir)]) == 4
    assert "No metric gave a finite number" in capsys.readouterr().err


def test_a_mean_of_different_metrics_is_refused():
    with pytest.raises(ConfigError, match="would add up different metrics"):
        mixture_metrics({"a": "x", "b": "y"}, {"a": "max", "b": "max"}, overall="examples")
