"""A training run that is killed at any moment, many times, ends like an undisturbed run."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msft_store import Store, Timeline
from tests.support.children import LONG, begin, end_of, ended
from tests.support.ledger import Ledger
from tests.support.runs import outcome
from tests.support.tiny_runs import make_config
from trainer.cli.main import main
from trainer.config.load import dump
from trainer.config.schema import Config
from trainer.journal import JournalQueue, read
from trainer.report.summary import summarize
from trainer.training import run
from trainer.training.steps import StageSteps

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

VARIANTS: dict[str, dict[str, Any]] = {
    "stages again": {},
    "resume points": {"resume_every": 1},
    "optimizer restored": {
        "resume_every": 3,
        "async_save": False,
        "train__schedule": "linear",
        "msft__optimizer_on_rollback": "restore",
    },
    "clipped, in bf16": {
        "resume_every": 2,
        "train__max_grad_norm": 0.5,
        "train__schedule": "cosine",
        "model__dtype": "bfloat16",
    },
}
"""Changes to the configuration; each variant is a real run of three stages with roll-backs."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An undisturbed run."""

    config: Config
    outcome: Any
    seconds: float


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are written after the end, and drawing them would take half of the time here."""
    monkeypatch.setattr(run, "write_report", lambda d: summarize(read(Path(d) / "journal.jsonl")))


@pytest.fixture
def reference(request: pytest.FixtureRequest, tmp_path: Path, without_fsync: None) -> Reference:
    """Run a variant without a fault."""
    changes: Mapping[str, Any] = VARIANTS[request.param]
    config = make_config(tmp_path, **{"train__lr": 0.02, "log_every": 1, **changes})
    durations = []
    for name in ("first", "whole"):
        began = time.monotonic()
        assert end_of(begin(lambda d=tmp_path / name: go_on(config, d))) == 0
        durations.append(time.monotonic() - began)
    whole = outcome(tmp_path / "whole")
    assert outcome(tmp_path / "first") == whole
    return Reference(config=config, outcome=whole, seconds=min(durations))


def go_on(config: Config, directory: Path) -> int:
    """Begin the run, or continue it, as the command does; return its exit code."""
    if (directory / "config.yaml").exists():
        return main(["resume", str(directory), "--quiet"])
    path = directory.with_suffix(".yaml")
    path.write_text(dump(config), encoding="utf-8")
    return main(["run", str(path), f"output_dir={directory}", "--quiet"])


@pytest.mark.parametrize("reference", VARIANTS, indirect=True)
def test_kills_at_random_times_change_nothing(
    reference: Reference, tmp_path: Path, faults: Ledger, soak: bool, seed: int
) -> None:
    chance = np.random.default_rng([seed, len(str(reference.config))])
    directory = tmp_path / "killed"
    kills = 0
    while kills < (80 if soak else 8):
        with ExitStack() as injected:
            # Some series of kills are long, so that most of a stage is often repeated.
            for _ in range(chance.choice([1, 2, 4, 8])):
                child = begin(lambda: go_on(reference.config, directory))
                if ended(child, chance.uniform(0, reference.seconds)):
                    assert end_of(child) == 0
                    break
                number = SIGNALS[chance.integers(len(SIGNALS))]
                injected.enter_context(faults.inject(f"{number.name} to a training run"))
                os.kill(child, number)
                if chance.random() < 0.3 and not ended(child, chance.uniform(0, 0.1)):
                    os.kill(child, signal.SIGKILL)
                assert end_of(child) in (0, -number, 128 + number, -signal.SIGKILL)
                kills += 1
            assert end_of(begin(lambda: go_on(reference.config, directory))) == 0
            assert outcome(directory) == reference.outcome
            assert Store.open(directory / "store").check(read_data=True) == []
        shutil.rmtree(directory)


@pytest.mark.parametrize("reference", ["stages again", "resume points"], indirect=True)
def test_a_kill_after_a_decision_that_is_not_written_yet_changes_nothing(
    reference: Reference, tmp_path: Path, faults: Ledger, soak: bool
) -> None:
    directory = tmp_path / "killed"
    for commit in itertools.count(1) if soak else range(1, 4):
        code = end_of(begin(lambda n=commit: killed_ahead(reference.config, directory, n)))
        if code == 0 and commit > 3:
            break  # the run has no more commits
        with faults.inject("SIGKILL to a run that is ahead of its commit"):
            assert code == -signal.SIGKILL
            records = read(directory / "journal.jsonl")
            evaluated = [r for r in records if r["event"] == "evaluated"]
            committed = [r["checkpoint"] for r in records if r["event"] == "committed"]
            assert committed == [r["checkpoint"] for r in evaluated if not r["reused"]]
            assert len(evaluated) == sum(r["event"] == "decided" for r in records)
            assert end_of(begin(lambda: go_on(reference.config, directory))) == 0
            assert outcome(directory) == reference.outcome
        shutil.rmtree(directory)


def killed_ahead(config: Config, directory: Path, commit: int) -> int:
    """Train on while commit number ``commit`` is under way, and die before it is durable."""
    ahead, commits = threading.Event(), []
    commit_async, save = Timeline.commit_async, Store.save
    flush, train = JournalQueue.flush, StageSteps.train

    def committing(self: Timeline, *arguments: Any, **keywords: Any) -> Any:
        ahead.clear()
        return commit_async(self, *arguments, **keywords)

    def saving(self: Store, tensors: Any, **keywords: Any) -> Any:
        commits.append(keywords["step"])
        if len(commits) == commit + 1:
            ahead.wait(LONG)
            os.kill(os.getpid(), signal.SIGKILL)
        return save(self, tensors, **keywords)

    def flushing(self: JournalQueue) -> None:
        ahead.set()
        flush(self)

    def training(self: StageSteps, step: int) -> None:
        train(self, step)
        ahead.set()

    Timeline.commit_async, Store.save = committing, saving
    JournalQueue.flush, StageSteps.train = flushing, training
    return go_on(config, directory)
