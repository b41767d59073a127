"""Lines about a run that nobody watches on a terminal."""

from __future__ import annotations

import logging
import re

import pytest

from tests.support.tiny_runs import make_config
from trainer.algorithms.base import Evaluation
from trainer.journal import read
from trainer.training.progress import Heartbeat, StageProgress, describe_values
from trainer.training.run import start


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(caplog):
    """Return a function that takes the lines so far."""
    caplog.set_level(logging.INFO, logger="trainer")

    def take():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return take


def test_a_line_comes_after_a_minute_and_says_loss_and_time_left(lines):
    clock = Clock()
    beat = Heartbeat(clock=clock)
    losses = iter([0.7512, 0.5])
    with StageProgress(beat, stage=2, first_step=10, steps=100, has_bar=False) as progress:
        for step in range(11, 51):
            clock.now += 2.5
            progress.advance(step, loss=lambda: next(losses))
        assert lines() == [
            "stage 2, step 34 of 100: training loss 0.751, 2 min 45 s left in this stage"
        ]
        clock.now += 400
        progress.advance(51, loss=lambda: next(losses))
        (line,) = lines()
    assert line.startswith("stage 2, step 51 of 100: training loss 0.500, 9 min 58 s left")


def test_a_long_evaluation_says_that_it_goes_on(lines):
    clock = Clock()
    beat = Heartbeat(clock=clock)
    with StageProgress(beat, stage=1, first_step=0, steps=8, has_bar=False) as progress:
        progress.show(None)
        for _ in range(13):
            clock.now += 10
            beat.tick("evaluating")
    assert lines() == [
        "stage 1, step 0 of 8",
        "evaluating for 1 min",
        "evaluating for 2 min",
    ]


def test_processes_beside_the_main_one_are_silent(lines):
    beat = Heartbeat(is_silent=True)
    with StageProgress(beat, stage=1, first_step=0, steps=8, has_bar=False) as progress:
        progress.show(0.5)
    assert lines() == []


def evaluation(index, **metrics):
    return Evaluation(
        stage=1,
        index=index,
        epoch=index / 2,
        step=index,
        checkpoint="",
        metrics=metrics,
        last=False,
    )


def test_values_stand_beside_the_best_of_the_stage_and_its_epoch():
    seen = [
        evaluation(0, a=1.0, b=1.0, c=0.1, d=float("nan"), overall=2),
        evaluation(1, a=0.5, b=0.8, c=0.3, d=float("nan"), overall=1),
        evaluation(2, a=0.6, b=0.7, c=0.2, d=float("nan"), overall=1),
    ]
    assert describe_values(seen, {"a", "b", "d"}, "min", {"c": "max"}) == (
        "  a 0.600 (best 0.500 at epoch 0.50), b 0.700 (best so far), d - (none is finite),\n"
        "  c 0.200 (excluded, best 0.300 at epoch 0.50)"
    )
    assert describe_values(seen[:1], {"a"}, "min", {}) == (
        "  a 1.000, b 1.000 (excluded), c 0.100 (excluded), d - (excluded, none is finite)"
    )


def test_a_run_shows_step_loss_and_values_at_every_evaluation(tmp_path, lines):
    config = make_config(tmp_path, msft__compute_budget=1.0, msft__max_stages=2)
    start(config)
    text = "\n".join(lines())
    records = read(tmp_path / "run" / "journal.jsonl")
    evaluated = [r for r in records if r["event"] == "evaluated"]
    first = evaluated[1]
    steps = next(r["steps"] for r in records if r["event"] == "stage_started")
    assert f"stage 1, step {first['step']} of {steps}: training loss " in text
    assert "left in this stage" in text
    assert text.count(": training loss ") == sum(not r["reused"] for r in evaluated) - 1
    names = [name for name in first["metrics"] if name != "overall"]
    for name in names:
        assert len(re.findall(rf"\b{name} [\d.]+\b", text)) == len(evaluated)
        assert f"{name} {first['metrics'][name]:.3f} (best" in text
