"""``optimizer_on_rollback: restore``: a roll-back brings everything back that training needs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from msft_store import KeepLast, Store
from msft_store.integrations.training_state import from_tensors
from tests.support.states import bits_of
from tests.support.tiny_runs import make_config
from trainer.algorithms.base import Continue, Needs, RollBack, Stage, Stop
from trainer.journal import effective, read
from trainer.model.training_state import gather_rng, load_optimizer, optimizer_tensors, set_rng
from trainer.report.flops import ModelSize
from trainer.report.plan import Counts, plan
from trainer.training import decisions, run
from trainer.training.replay import KnownEvaluation, StageStart
from trainer.training.run import start
from trainer.training.stage import make_order, plan_stage
from trainer.training.steps import StageSteps

NAMES = ("copy", "same", "sum")


def records(at, event):
    counted = effective(read(Path(at) / "journal.jsonl"))
    return [record for record in counted if record["event"] == event]


class GoesBack:
    """Trains to the end of its budget, goes back to the middle, and excludes nothing."""

    mode = "min"

    def __init__(self):
        self._middle = None
        self.stage, self.evaluations, self.modes = self.first_stage(), [], {}

    def first_stage(self):
        return Stage(number=1, active=NAMES, epochs=3.0)

    def needs(self):
        return Needs()

    def on_evaluation(self, evaluation):
        if (evaluation.stage, evaluation.index) == (1, 3):
            self._middle = evaluation
        if evaluation.last and evaluation.stage == 2:
            return Stop(checkpoint=evaluation.checkpoint, reason="the end")
        if evaluation.last:
            stage = Stage(number=2, active=NAMES, epochs=3.0 - self._middle.epoch)
            return RollBack(
                checkpoint=self._middle.checkpoint, exclude=(), stage=stage, reason="again"
            )
        return Continue(reason="on")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model with dropout, AdamW with clipping, and a rate that rises and falls."""
    directory = tmp_path_factory.mktemp("restore")
    config = make_config(
        directory,
        log_every=1,
        msft__optimizer_on_rollback="restore",
        train__optimizer="adamw",
        train__weight_decay=0.1,
        train__max_grad_norm=1.0,
        train__schedule="cosine",
        train__warmup_ratio=0.2,
    )
    path = directory / "base" / "config.json"
    model = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**model, "attention_dropout": 0.3}), encoding="utf-8")
    return config


def state_of(work):
    """Everything that the next steps depend on, in bits."""
    tensors = {**work.loaded.model.state_dict(), **optimizer_tensors(work.optimizer)}
    bits = {name: bits_of(tensor) for name, tensor in tensors.items()}
    return bits, bits_of(torch.get_rng_state()), repr((random.getstate(), np.random.get_state()))


def test_going_on_without_excluding_anything_repeats_every_step_to_the_bit(config, monkeypatch):
    train, before = StageSteps.train, {}

    def training(self, step):
        before[self.stage.number, step] = state_of(self._work)
        finding = train(self, step)
        lrs[self.stage.number, step] = self._lr
        return finding

    lrs = {}
    monkeypatch.setattr(StageSteps, "train", training)
    monkeypatch.setattr(run, "make_strategy", lambda *_, **__: GoesBack())
    monkeypatch.setattr(decisions, "make_policy", lambda *_: KeepLast(99))
    at = f"{config.output_dir}-again"
    start(replace(config, output_dir=at))
    stages = records(at, "stage_started")
    assert stages[1]["active"] == stages[0]["active"]
    middle = next(r for r in records(at, "evaluated") if (r["stage"], r["index"]) == (1, 3))
    assert stages[1]["root"] == middle["checkpoint"]
    back = stages[1]["steps"]
    assert back > 4
    for step in range(back):
        assert before[2, step] == before[1, middle["step"] + step]
        assert lrs[2, step] == lrs[1, middle["step"] + step]
    assert len(set(lrs.values())) > back
    first, second = ([r for r in records(at, "trained") if r["stage"] == n] for n in (1, 2))
    fields = ("loss", "lr", "grad_norm", "tokens", "target_tokens", "padded_tokens")
    assert [[r[k] for k in fields] for r in second] == [
        [r[k] for k in fields] for r in first[-back:]
    ]
    ends = [[r for r in records(at, "evaluated") if r["stage"] == n][-1] for n in (1, 2)]
    assert ends[0]["metrics"] == ends[1]["metrics"]


def test_without_it_the_optimizer_begins_anew(config, monkeypatch):
    train, sizes = StageSteps.train, {}

    def training(self, step):
        sizes[self.stage.number, step] = len(optimizer_tensors(self._work.optimizer))
        return train(self, step)

    monkeypatch.setattr(StageSteps, "train", training)
    monkeypatch.setattr(run, "make_strategy", lambda *_, **__: GoesBack())
    monkeypatch.setattr(decisions, "make_policy", lambda *_: KeepLast(99))
    at = f"{config.output_dir}-fresh"
    msft = replace(config.msft, optimizer_on_rollback="reset")
    start(replace(config, output_dir=at, msft=msft))
    assert sizes[1, 1] > 0
    assert sizes[2, 0] == 0


@pytest.fixture(scope="module")
def finished(config):
    """The directory of an MSFT run with roll-backs."""
    at = f"{config.output_dir}-msft"
    start(replace(config, output_dir=at, train=replace(config.train, lr=0.02)))
    assert any(r["exclude"] for r in records(at, "decided"))
    return Path(at)


def test_the_result_is_the_model_alone(finished):
    store = Store.open(finished / "store")
    assert store.check(read_data=True) == []
    (result,) = store.log()
    assert store.refs() == {"result": result.id}
    assert result.metadata["weights_of"] == records(finished, "finished")[0]["checkpoint"]
    model = AutoModelForCausalLM.from_pretrained(finished / "model", dtype="auto")
    assert set(store.tensors(result)) == set(model.state_dict())
    kept = store.load(result)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_the_report_says_that_the_optimizer_counts(finished):
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert "rollback points with optimizer on disk: peak" in text


def test_the_plan_bounds_rollback_points_with_the_optimizer(config):
    counts = Counts(
        train=10,
        train_tokens=100,
        train_attention_tokens=1000,
        validation=5,
        validation_tokens=50,
        validation_attention_tokens=500,
    )
    size = ModelSize(parameters=10, layers=1, hidden=2)
    made = plan(config, {"a": counts}, size, 1000)
    assert made.rollback_bytes == made.checkpoints * 3000
    assert replace(made, rollback_point_bytes=1000).rollback_bytes == made.checkpoints * 1000


def test_generators_and_optimizer_come_back_to_the_bit():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    held = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    states = gather_rng("rng")
    drawn = random.getrandbits(60), np.random.rand(), torch.rand(1)
    optimizer.step()
    load_optimizer(optimizer, held)
    set_rng(from_tensors(states, "rng"), Accelerator())
    assert (random.getrandbits(60), np.random.rand(), torch.rand(1)) == drawn
    again = optimizer_tensors(optimizer)
    assert {n: bits_of(t) for n, t in again.items()} == {n: bits_of(t) for n, t in held.items()}
    load_optimizer(optimizer, {})
    assert optimizer_tensors(optimizer) == {}


def test_a_stage_plan_follows_the_roots_back_to_the_first_stage(config):
    sizes = dict.fromkeys("abc", 20)

    def known(stage, step):
        return KnownEvaluation(metrics={}, losses=None, stage=stage, step=step)

    stages = [
        Stage(number=number, active=active, epochs=1.0)
        for number, active in enumerate([("a", "b", "c"), ("a", "b"), ("b",)], start=1)
    ]
    roots = (None, "x", "y")
    starts = {s.number: StageStart(stage=s, root=r) for s, r in zip(stages, roots, strict=True)}
    points = {"x": known(1, 3), "y": known(2, 2)}
    plan_of_third = plan_stage(config, sizes, 3, starts, points)
    assert plan_of_third.steps_before == 5
    left = {"a": 20, "b": 20}
    second = make_order(config, stages[0], sizes).continued(step=3, sizes=left, counts=left)
    assert plan_of_third.order == second.continued(step=2, sizes={"b": 20}, counts={"b": 20})
    fresh = replace(config, msft=replace(config.msft, optimizer_on_rollback="reset"))
    restarted = plan_stage(fresh, sizes, 3, starts, points)
    assert (restarted.order, restarted.steps_before) == (make_order(fresh, stages[2], sizes), 0)


def test_a_continued_stage_has_the_shares_of_soft_exclusion(config):
    sizes = dict.fromkeys("ab", 20)
    stages = [
        Stage(number=1, active=("a", "b"), epochs=1.0),
        Stage(number=2, active=("a",), epochs=1.0, shares={"b": 0.25}),
    ]
    starts = {s.number: StageStart(stage=s, root="x" if s.number > 1 else None) for s in stages}
    known = {"x": KnownEvaluation(metrics={}, losses=None, stage=1, step=0)}
    order = plan_stage(config, sizes, 2, starts, known).order
    steps = -(-25 // config.train.batch_size)
    taken = [name for step in range(steps) for name, _ in order.step(step)]
    assert (taken.count("a"), taken.count("b")) == (20, 5)
