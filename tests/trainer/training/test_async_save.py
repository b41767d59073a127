"""Training continues during a commit, with the same results."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from msft_store import StorageError, Store, Timeline
from tests.support.tiny_runs import make_config
from trainer.algorithms.base import Continue, Names, RollBack, Stage, Stop
from trainer.errors import RunError
from trainer.journal import Journal, JournalQueue, effective, read
from trainer.training import resume_point, run
from trainer.training.run import resume, start
from trainer.training.steps import StageSteps

LONG = 60.0
"""Seconds after which a test that hangs fails."""

# The size of the store depends on the digits of the process ids and times in its files.
OWN = ("time", "seconds", "model_dir", "config", "disk_peak_bytes", "disk_bytes")


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """Reports are written after the end, and drawing them would take half of the time here."""
    monkeypatch.setattr(run, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three stages, with roll-backs, in about a second."""
    directory = tmp_path_factory.mktemp("async")
    return make_config(directory, msft__max_stages=3, train__lr=0.02, log_every=1, async_save=False)


@pytest.fixture(scope="module")
def reference(config):
    """The outcome of a run that waits for each commit."""
    start(config)
    return outcome(Path(config.output_dir))


def outcome(directory):
    """The whole journal, in its order, but for times and places, and the weights."""
    story = [
        {key: value for key, value in record.items() if key not in OWN}
        for record in read(directory / "journal.jsonl")
    ]
    return story, (directory / "model" / "model.safetensors").read_bytes()


def decisions(records):
    return [{**r, "seq": None} for r in records if r["event"] == "decided"]


def in_background(config, name):
    return replace(config, async_save=True, output_dir=f"{config.output_dir}-{name}")


def test_the_journal_and_the_weights_are_those_of_a_run_that_waits(config, reference):
    config = in_background(config, "plain")
    start(config)
    assert outcome(Path(config.output_dir)) == reference


def test_training_goes_on_while_a_commit_is_under_way(config, reference, monkeypatch):
    config = in_background(config, "overlap")
    stepped, overlaps = threading.Event(), []
    commit_async, save, train = Timeline.commit_async, Store.save, StageSteps.train

    def committing(self, *arguments, **keywords):
        stepped.clear()
        return commit_async(self, *arguments, **keywords)

    def saving(self, tensors, **keywords):
        # At the last evaluation of a stage there is no step that could come before the commit.
        if 0 < keywords["metadata"]["epoch"] < config.msft.compute_budget:
            assert stepped.wait(LONG)
            overlaps.append(keywords["step"])
        return save(self, tensors, **keywords)

    def training(self, step):
        train(self, step)
        stepped.set()

    monkeypatch.setattr(Timeline, "commit_async", committing)
    monkeypatch.setattr(Store, "save", saving)
    monkeypatch.setattr(StageSteps, "train", training)
    start(config)
    assert len(overlaps) > 3
    assert outcome(Path(config.output_dir)) == reference


def test_a_resume_point_counts_only_evaluations_that_are_in_the_journal(config, monkeypatch):
    config = replace(in_background(config, "points"), resume_every=1)
    journal = Path(config.output_dir) / "journal.jsonl"
    flushing, counted = threading.Event(), []
    commit_async, save = Timeline.commit_async, Store.save
    flush, save_point = JournalQueue.flush, resume_point.save

    def committing(self, *arguments, **keywords):
        flushing.clear()
        return commit_async(self, *arguments, **keywords)

    def saving(self, tensors, **keywords):
        if keywords["metadata"]["epoch"]:
            assert flushing.wait(LONG)
        return save(self, tensors, **keywords)

    def when_flushed(self):
        flushing.set()
        flush(self)

    def saving_point(work, point):
        stage = [r for r in read(journal) if r.get("stage") == point.position.stage]
        decided = [r for r in stage if r["event"] == "decided" and r["seq"] <= point.seq]
        counted.append((len(decided), point.position.evaluations))
        return save_point(work, point)

    monkeypatch.setattr(Timeline, "commit_async", committing)
    monkeypatch.setattr(Store, "save", saving)
    monkeypatch.setattr(JournalQueue, "flush", when_flushed)
    monkeypatch.setattr(resume_point, "save", saving_point)
    start(config)
    assert len(counted) > 10
    assert all(decided == evaluations for decided, evaluations in counted)


def test_a_commit_that_fails_ends_the_run_and_resume_repeats_it(config, reference, monkeypatch):
    config = in_background(config, "failing")
    directory = Path(config.output_dir)
    save, calls = Store.save, []

    def failing(self, tensors, **keywords):
        calls.append(keywords["step"])
        if len(calls) == 3:
            raise StorageError("the disk is gone")
        return save(self, tensors, **keywords)

    monkeypatch.setattr(Store, "save", failing)
    with pytest.raises(StorageError, match="the disk is gone"):
        start(config)
    last = read(directory / "journal.jsonl")[-1]
    assert (last["event"], last["step"]) == ("trained", calls[-1])
    resume(directory)
    assert outcome(directory)[1] == reference[1]
    repeated = [r["seq"] for r in effective(read(directory / "journal.jsonl"))]
    assert decisions(r for r in outcome(directory)[0] if r["seq"] in repeated) == decisions(
        reference[0]
    )


def test_an_error_in_training_leaves_no_evaluation_out(config, monkeypatch):
    config = in_background(config, "broken")
    train, calls, release = StageSteps.train, [], threading.Event()
    save = Store.save

    def breaking(self, step):
        calls.append(step)
        train(self, step)
        if len(calls) == 4:
            release.set()
            raise RunError("training is broken")

    def slow(self, tensors, **keywords):
        if keywords["metadata"]["epoch"]:
            assert release.wait(LONG)
        return save(self, tensors, **keywords)

    monkeypatch.setattr(StageSteps, "train", breaking)
    monkeypatch.setattr(Store, "save", slow)
    with pytest.raises(RunError, match="training is broken"):
        start(config)
    records = read(Path(config.output_dir) / "journal.jsonl")
    events = [record["event"] for record in records]
    assert events.count("committed") == events.count("decided") == 2
    assert records[-1]["event"] == "trained"
    assert records[-1]["step"] == 3


def test_records_wait_behind_a_commit_in_their_order(tmp_path):
    future = Future()
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal_queue = JournalQueue(journal)
        journal_queue.add("trained", step=1, loss=1.0)
        journal_queue.add_later(future, lambda: [("committed", {"checkpoint": future.result()})])
        journal_queue.add("trained", step=2, loss=1.0)
        journal_queue.write_ready()
        assert journal.next_seq == 1
        future.set_result("c")
        journal_queue.write_ready()
        assert journal.next_seq == 3
        journal_queue.add("trained", step=3, loss=1.0)
    found = [(r["event"], r.get("step")) for r in read(tmp_path / "journal.jsonl")]
    assert found == [("trained", 1), ("committed", None), ("trained", 2), ("trained", 3)]


def test_nothing_is_written_after_a_commit_that_failed(tmp_path):
    future = Future()
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal_queue = JournalQueue(journal)
        journal_queue.add_later(future, lambda: [("committed", {"checkpoint": future.result()})])
        journal_queue.add("trained", step=2, loss=1.0)
        future.set_exception(StorageError("full"))
        with pytest.raises(StorageError, match="full"):
            journal_queue.flush()
        journal_queue.flush()
        assert journal.next_seq == 0
    JournalQueue(None).add("trained", step=1)


def test_names_in_decisions_become_ids():
    names = Names()
    assert names.name("", stage=1, index=2) == names.name("abc", stage=1, index=2)
    name = names.name("", stage=1, index=2)
    names.add(name, "abc")
    assert names.name("abc", stage=2, index=0) == name
    assert names.name("", stage=1, index=3) != name
    stage = Stage(number=2, active=("a",), epochs=1.0)
    back = RollBack(checkpoint=name, exclude=("b",), stage=stage, reason="r")
    assert names.resolve(back) == replace(back, checkpoint="abc")
    assert names.resolve(Stop(checkpoint="def", reason="r")).checkpoint == "def"
    assert names.resolve(Continue(reason="r")) == Continue(reason="r")


@pytest.mark.parametrize("background", [False, True])
def test_a_resident_reference_changes_nothing(config, reference, background):
    name = f"resident-{background}"
    directory = f"{config.output_dir}-{name}"
    start(replace(config, async_save=background, resident_reference=True, output_dir=directory))
    assert outcome(Path(directory)) == reference
