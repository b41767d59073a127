"""The loop trains on the active set, keeps the needed checkpoints, and rolls back exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from msft_store import Champions, KeepBest, PeakWindow, Store
from tests.support.tiny_runs import make_config
from trainer.algorithms.base import Needs, Stage
from trainer.config.schema import TrainConfig
from trainer.data.batches import DataOrder
from trainer.data.schedule import stage_schedule
from trainer.errors import RunError
from trainer.journal import effective, read
from trainer.model.optim import learning_rate
from trainer.training.directory import create_directory
from trainer.training.rollback_points import make_policy
from trainer.training.run import start
from trainer.training.steps import StageSteps
from trainer.training.workspace import open_workspace


@pytest.fixture(scope="module")
def msft(tmp_path_factory):
    """The directory of a finished run with roll-backs."""
    config = make_config(tmp_path_factory.mktemp("msft"), train__lr=0.02)
    start(config)
    return Path(config.output_dir)


def records(directory, event=None):
    counted = effective(read(directory / "journal.jsonl"))
    return [record for record in counted if event in (None, record["event"])]


def weights(directory):
    return (directory / "model" / "model.safetensors").read_bytes()


def train_steps(config, count):
    """Train some optimizer steps; return the weights and the totals."""
    create_directory(config)
    with open_workspace(config) as work:
        names = tuple(work.mixture)
        examples = sum(len(e) for e in work.split("train").values())
        schedule = stage_schedule(
            examples=examples, batch_size=config.train.batch_size, eval_every=1, epochs=2
        )
        sizes = {name: len(examples) for name, examples in work.split("train").items()}
        order = DataOrder.fresh(
            seed=config.seed, stage=1, sizes=sizes, batch_size=config.train.batch_size
        )
        stage = Stage(number=1, active=names, epochs=2)
        steps = StageSteps(work, stage, schedule, order=order)
        for step in range(count):
            steps.train(step)
        totals = steps.take_totals()
        return {n: t.clone() for n, t in work.loaded.model.state_dict().items()}, totals


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_accumulated_micro_batches_train_like_the_big_batch(tmp_path, max_grad_norm):
    config = make_config(tmp_path, train__lr=1e-3, train__max_grad_norm=max_grad_norm)
    outcomes = []
    for size in (16, 4):
        train = replace(config.train, micro_batch_size=size)
        outcomes.append(
            train_steps(replace(config, train=train, output_dir=str(tmp_path / str(size))), 5)
        )
    (big, big_totals), (small, small_totals) = outcomes
    for name, tensor in big.items():
        torch.testing.assert_close(small[name], tensor, atol=2e-5, rtol=1e-4)
    assert small_totals["loss"] == pytest.approx(big_totals["loss"], rel=1e-5)
    assert small_totals["target_tokens"] == big_totals["target_tokens"]
    assert small_totals["tokens"] == big_totals["tokens"]
    assert small_totals["padded_tokens"] < big_totals["padded_tokens"]


def test_the_loss_is_averaged_over_tokens_examples_or_micro_batches(tmp_path):
    config = make_config(tmp_path, train__lr=1e-3)
    found = {}
    for average, size in [("tokens", 16), ("examples", 16), ("examples", 4), ("micro_batches", 1)]:
        at = str(tmp_path / f"{average}{size}")
        train = replace(config.train, loss_average=average, micro_batch_size=size)
        found[average, size] = train_steps(replace(config, train=train, output_dir=at), 2)[0]
    by_examples = found.pop(("examples", 16))
    tokens = found.pop(("tokens", 16))
    for weights in found.values():
        for name, tensor in by_examples.items():
            torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=1e-4)
    norm = "model.norm.weight"
    assert not torch.allclose(tokens[norm], by_examples[norm], atol=1e-4)


def test_a_step_is_that_of_a_plain_pytorch_loop(tmp_path):
    config = make_config(tmp_path, train__lr=1e-3, train__batch_size=64, train__micro_batch_size=64)
    found, totals = train_steps(config, 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with open_workspace(config) as work:
        examples = [e for part in work.split("train").values() for e in part]
    loss = sum(
        model(
            input_ids=torch.tensor([[*e.prompt, *e.completion]]),
            labels=torch.tensor([[-100] * len(e.prompt) + [*e.completion]]),
        ).loss
        * len(e.completion)
        for e in examples
    ) / sum(len(e.completion) for e in examples)
    loss.backward()
    optimizer.step()
    assert totals["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4)


def test_msft_of_one_stage_without_a_peak_trains_exactly_as_sft(tmp_path):
    config = make_config(tmp_path, train__lr=1e-3, msft__max_stages=1, model__dtype="bfloat16")
    for method in ("sft", "msft"):
        start(replace(config, method=method, output_dir=str(tmp_path / method)))
    stops = [records(tmp_path / method, "decided")[-1] for method in ("sft", "msft")]
    assert [stop["exclude"] for stop in stops] == [[], []]
    assert weights(tmp_path / "sft") == weights(tmp_path / "msft")
    losses = [[r["loss"] for r in records(tmp_path / m, "trained")] for m in ("sft", "msft")]
    assert losses[0] == losses[1]


def test_a_roll_back_restores_exactly(msft):
    decided = [r for r in records(msft, "decided") if r["decision"] == "roll_back"]
    assert any(r["exclude"] for r in decided)
    roots = {r["root"] for r in records(msft, "stage_started")}
    assert {r["checkpoint"] for r in decided} <= roots
    assert Store.open(msft / "store").check(read_data=True) == []


def test_each_stage_begins_with_the_metrics_of_its_root(msft):
    evaluated = records(msft, "evaluated")
    for later in [r for r in evaluated if r["index"] == 0 and r["stage"] > 1]:
        first = next(r for r in evaluated if r["checkpoint"] == later["checkpoint"])
        assert later["reused"]
        assert not first["reused"]
        assert (later["metrics"], later["losses"]) == (first["metrics"], first["losses"])
    assert not evaluated[0]["reused"]


def test_steps_never_go_back_and_evaluations_are_in_order(msft):
    steps = [r["step"] for r in records(msft) if "step" in r]
    assert steps == sorted(steps)
    events = [r["event"] for r in records(msft)]
    for i, event in enumerate(events):
        if event == "evaluated":
            assert events[i + 1] == "decided"
        if event == "committed":
            assert events[i + 1] == "evaluated"
    for stage in records(msft, "stage_started"):
        indices = [r["index"] for r in records(msft, "evaluated") if r["stage"] == stage["stage"]]
        assert indices == list(range(len(indices)))


def test_only_active_sub_datasets_are_trained_on(msft):
    stages = records(msft, "stage_started")
    excluded = {name for r in records(msft, "decided") for name in r["exclude"]}
    assert excluded
    assert set(stages[0]["active"]) - set(stages[-1]["active"]) <= excluded
    assert stages[-1]["examples"] < stages[0]["examples"]


def test_the_result_is_an_ordinary_model_directory(msft):
    model = AutoModelForCausalLM.from_pretrained(msft / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(msft / "model")
    finished = records(msft, "finished")[0]
    state = Store.open(msft / "store").load(finished["checkpoint"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert tokenizer("a")["input_ids"]
    best = min(records(msft, "evaluated"), key=lambda r: r["metrics"]["overall"])
    assert finished["checkpoint"] == best["checkpoint"]


def test_the_result_has_the_files_that_transformers_writes(msft, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(msft / "model", dtype="auto")
    model.save_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(msft / "model", local_files_only=True)
    tokenizer.save_pretrained(tmp_path / "out")
    for path in (msft / "model").iterdir():
        if path.suffix == ".json":
            assert json.loads((tmp_path / "out" / path.name).read_text()) == json.loads(
                path.read_text()
            )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in (msft / "model").iterdir()
    }


def test_test_data_is_touched_once_for_base_and_result(msft):
    tested = records(msft, "tested")
    assert sorted(r["what"] for r in tested) == ["base", "result"]
    assert all(set(r["metrics"]) == {"copy", "same", "sum", "overall"} for r in tested)


def test_the_report_and_the_result_are_written(msft):
    for name in ("report.md", "result.json", "plots/curves.png", "config.yaml"):
        assert (msft / name).stat().st_size > 0


def test_a_directory_in_use_is_refused(tmp_path):
    config = make_config(tmp_path)
    create_directory(config)
    with (
        open_workspace(config),
        pytest.raises(RunError, match="another process is running"),
        open_workspace(config),
    ):
        pass


def test_gradient_checkpointing_changes_no_results(tmp_path):
    config = make_config(tmp_path)
    plain, _ = train_steps(replace(config, output_dir=str(tmp_path / "plain")), 2)
    model = replace(config.model, gradient_checkpointing=True)
    again, _ = train_steps(replace(config, model=model, output_dir=str(tmp_path / "again")), 2)
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.5, 1, 1, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]),
    ],
)
def test_learning_rates(schedule, expected):
    config = TrainConfig(lr=1.0, schedule=schedule, warmup_ratio=0.2)
    found = [learning_rate(config, step=step, steps=10) for step in range(10)]
    assert found == pytest.approx(expected, abs=5e-4)


def test_retention_follows_the_needs_of_the_strategy():
    assert make_policy(Needs(), "min") == KeepBest("overall", 1, mode="min")
    best = KeepBest("overall", 1, mode="max")
    champions = {"a": "max", "b": "max"}
    assert make_policy(Needs(champions=("a", "b")), "max") == best | Champions(champions)
    needs = Needs(champions=("a", "b"), peak_window=3)
    assert make_policy(needs, "max") == best | PeakWindow(champions, 3)
