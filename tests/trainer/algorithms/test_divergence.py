"""Losses and metrics that are NaN or infinite are reported, and never chosen."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from msft_store import Store
from tests.support.runs import kill, outcome
from tests.support.tiny_runs import make_config
from trainer.algorithms.divergence import all_non_finite, first_non_finite, non_finite_metrics
from trainer.cli.main import main
from trainer.errors import RunError
from trainer.journal import Journal, effective, read
from trainer.model.evaluate import Evaluator, Generation
from trainer.training import run
from trainer.training.run import resume, start
from trainer.training.steps import StageSteps


def records(at, event=None):
    counted = effective(read(Path(at) / "journal.jsonl"))
    return [record for record in counted if event in (None, record["event"])]


def is_finite(at):
    weights = load_file(Path(at) / "model" / "model.safetensors")
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


@pytest.fixture
def ruin(monkeypatch):
    """Ruin the weights of given steps of stages, as (stage, step): before it, or after it."""

    def ruining(*, before=(), after=()):
        train = StageSteps.train

        def training(self, step):
            position = (self.stage.number, step)
            weight = next(self._work.loaded.model.parameters())
            if position in before:
                weight.data.view(-1)[0] = math.nan
            finding = train(self, step)
            if position in after:
                weight.data.fill_(math.inf)
            return finding

        monkeypatch.setattr(StageSteps, "train", training)

    return ruining


def test_by_default_the_run_ends_with_its_best_and_its_own_exit_code(tmp_path, capsys):
    config = make_config(tmp_path, train__lr=1e30)
    at = config.output_dir
    assert main(["run", str(tmp_path / "config.yaml"), "--quiet"]) == 3
    assert "Training diverged, which ended the run" in capsys.readouterr().err
    (diverged,), decided = records(at, "diverged"), records(at, "decided")
    assert "loss" in diverged["what"]
    assert diverged["step"] == records(at, "trained")[-1]["step"]
    assert decided[-1]["decision"] == "stop"
    assert decided[-1]["checkpoint"] == records(at, "finished")[0]["checkpoint"]
    assert decided[-1]["checkpoint"] == records(at, "committed")[0]["checkpoint"]
    assert is_finite(at)
    assert "Training diverged" in (Path(at) / "report.md").read_text(encoding="utf-8")
    assert "## Not finite" in (Path(at) / "report.md").read_text(encoding="utf-8")
    result = json.loads((Path(at) / "result.json").read_text(encoding="utf-8"))
    assert (result["diverged"], result["divergences"]) == (True, 1)
    assert main(["resume", at, "--quiet"]) == 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three stages, with roll-backs, that go back after a divergence."""
    directory = tmp_path_factory.mktemp("divergence")
    config = make_config(directory, train__lr=0.02, log_every=1)
    return replace(config, train=replace(config.train, on_divergence="rollback"))


# Of the first stage, in the middle and before an evaluation; of the second one, its first step.
PLACES = ((1, 4), (1, 5), (2, 0))


def test_a_run_goes_back_skips_batches_and_ends_well(config, ruin):
    ruin(before=PLACES)
    at = f"{config.output_dir}-skips"
    start(replace(config, output_dir=at))
    diverged = records(at, "diverged")
    skips = [r for r in records(at, "decided") if r["decision"] == "skip"]
    assert [r["stage"] for r in diverged] == [stage for stage, _ in PLACES]
    assert len(skips) == 3
    for found, skip in zip(diverged, skips, strict=True):
        good = [r for r in records(at, "evaluated") if r["seq"] < found["seq"]][-1]
        assert skip["checkpoint"] == good["checkpoint"]
        assert found["step"] > good["step"]
    losses = {r["step"]: r["loss"] for r in records(at, "trained")}
    assert [step for step, loss in losses.items() if math.isnan(loss)] == [
        r["step"] for r in diverged
    ]
    assert is_finite(at)
    assert records(at, "finished")
    assert Store.open(Path(at) / "store").check(read_data=True) == []
    text = (Path(at) / "report.md").read_text(encoding="utf-8")
    assert text.count("the training loss was nan") == 3


def test_the_weights_of_the_last_evaluation_are_restored(config, ruin):
    ruin(after=[(1, 3)])
    at = f"{config.output_dir}-restored"
    start(replace(config, output_dir=at))
    (found,) = records(at, "diverged")
    assert found["what"] == "validation loss of every sub-dataset"
    before, after = [r for r in records(at, "evaluated") if r["stage"] == 1][1:3]
    assert before["seq"] < found["seq"] < after["seq"]
    assert before["metrics"] == after["metrics"]
    assert before["checkpoint"] != after["checkpoint"]
    assert not any(math.isnan(v) for r in records(at, "evaluated") for v in r["metrics"].values())


def test_a_gradient_that_is_infinite_is_found_before_it_reaches_the_weights(config, monkeypatch):
    backward = StageSteps._backward

    def overflowing(self, *arguments):
        loss = backward(self, *arguments)
        if self.stage.number == 1 and not found:
            found.append(True)
            next(self._work.loaded.model.parameters()).grad[0, 0] = math.inf
        return loss

    found = []
    monkeypatch.setattr(StageSteps, "_backward", overflowing)
    at = f"{config.output_dir}-gradient"
    start(replace(config, output_dir=at, train=replace(config.train, max_grad_norm=1.0)))
    assert [(r["what"], r["value"]) for r in records(at, "diverged")] == [("gradient norm", "inf")]
    assert is_finite(at)


@pytest.fixture
def _without_plots(monkeypatch):
    """Reports are written after the end, and drawing them would take half of the time here."""
    monkeypatch.setattr(run, "write_report", lambda directory: None)


@pytest.mark.usefixtures("_without_plots")
@pytest.mark.parametrize("resume_every", [None, 1])
@pytest.mark.parametrize(
    ("event", "call"), [("diverged", 1), ("decided", 5), ("trained", 7), ("committed", 5)]
)
def test_a_kill_about_a_divergence_changes_nothing(config, ruin, resume_every, event, call):
    ruin(before=PLACES)
    whole, killed = Path(f"{config.output_dir}-whole"), Path(f"{config.output_dir}-killed")
    config = replace(config, resume_every=resume_every)
    if not whole.exists():
        start(replace(config, output_dir=str(whole)))
    config = replace(config, output_dir=str(killed))
    kill(lambda: start(config), Journal, "append", call=call, like={"event": event})
    resume(killed)
    assert outcome(killed) == outcome(whole)
    shutil.rmtree(killed)


def test_a_run_that_diverges_again_and_again_stops(config, ruin):
    ruin(before=[(1, step) for step in range(1, 8)])
    at = f"{config.output_dir}-hopeless"
    summary = start(replace(config, output_dir=at))
    decisions = [r["decision"] for r in records(at, "decided") if r["decision"] != "continue"]
    assert decisions == ["skip", "skip", "skip", "stop"]
    assert (summary.diverged, summary.divergences) == (True, 4)
    assert is_finite(at)


@pytest.mark.parametrize("always", [False, True])
def test_a_sub_dataset_that_is_not_finite_is_reported_and_decides_nothing(
    config, monkeypatch, caplog, always
):
    evaluate = Evaluator.__call__

    def evaluating(self, *arguments):
        result = evaluate(self, *arguments)
        calls.append(result)
        if always or len(calls) == 3:
            for numbers in (result.metrics, result.losses):
                numbers["copy"] = math.nan
            result.metrics["overall"] = math.nan
        return result

    calls = []
    monkeypatch.setattr(Evaluator, "__call__", evaluating)
    at = f"{config.output_dir}-one-{always}"
    train = replace(config.train, on_divergence="stop")
    with caplog.at_level("INFO", logger="trainer"):
        start(replace(config, output_dir=at, train=train))
    unsound = [r for r in records(at, "evaluated") if math.isnan(r["metrics"]["copy"])]
    assert not records(at, "diverged")
    assert any("not finite: copy, overall" in line for line in caplog.messages)
    if not always:
        best = records(at, "finished")[0]["checkpoint"]
        chosen = {best, *(r["checkpoint"] for r in records(at, "decided"))}
        assert not chosen & {r["checkpoint"] for r in unsound}
    text = (Path(at) / "report.md").read_text(encoding="utf-8")
    assert "The metric of copy was not finite in" in text
    excluded = {name for r in records(at, "decided") for name in r["exclude"]}
    assert "copy" not in excluded or not always
    assert is_finite(at)


def test_a_base_that_is_of_no_use_is_an_error(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    call = Evaluator._forward

    def forward(self, model, *arguments):
        next(model.parameters()).data.fill_(math.nan)
        return call(self, model, *arguments)

    monkeypatch.setattr(Evaluator, "_forward", forward)
    with pytest.raises(RunError, match=r"is nan before any training: is model\.path"):
        start(config)


def test_exact_match_counts_only_where_the_loss_is_finite(tmp_path, monkeypatch):
    config = make_config(tmp_path, evaluation__metric="exact_match", msft__max_stages=1)
    forward = Evaluator._forward

    def infinite(self, *arguments):
        found = forward(self, *arguments)
        right = [Generation(text="", is_right=True)] * len(found.generations)
        return replace(found, losses=[math.inf, *found.losses[1:]], generations=right)

    monkeypatch.setattr(Evaluator, "_forward", infinite)
    start(config)
    for evaluated in records(config.output_dir, "evaluated"):
        assert math.isnan(evaluated["metrics"]["copy"])
        assert evaluated["metrics"]["sum"] == 1


def test_numbers_are_judged_one_by_one():
    assert first_non_finite({"a": 1.0, "b": None}) is None
    found = first_non_finite({"a": 1.0, "b": torch.tensor(-math.inf), "c": math.nan})
    assert (found.what, found.value) == ("b", "-inf")
    assert all_non_finite({"a": math.nan, "b": 1.0}) is None
    assert all_non_finite({"a": math.nan, "b": math.inf}).value == "nan"
    assert non_finite_metrics({"b": math.nan, "c": 1.0, "a": math.inf}) == ["a", "b"]
