"""Tests of the trackers: their records are read back with TensorBoard's reader."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from tests.support.runs import kill
from tests.support.tiny_runs import make_config
from trainer.config.checks import TRACKERS
from trainer.errors import ConfigError
from trainer.journal import effective, read
from trainer.signals import Interrupted
from trainer.training import decisions, run
from trainer.training.run import resume, start
from trainer.training.trackers import select_values

SPEED = "train/tokens_per_second"
"""Differs from run to run."""


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda directory: None)


@pytest.fixture
def config(tmp_path):
    return _config(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    config = _config(tmp_path_factory.mktemp("whole"))
    start(config)
    return config


def _config(directory):
    """Three stages, with roll-backs, in about a second."""
    return make_config(directory, log_with=["tensorboard"], msft__max_stages=3, train__lr=0.02)


def logged(config):
    """Return tag → [(step, value)] in the order in which it was written, over all processes."""
    values = defaultdict(list)
    folder = Path(config.output_dir) / "trackers" / config.log_project
    # The names contain the second and the process id, which do not order files of one second.
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
    for path in files:
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = make_ndarray(value.tensor).item()
                    values[value.tag].append((event.step, number))
    return dict(values)


def counted(config):
    return effective(read(Path(config.output_dir) / "journal.jsonl"))


def test_every_journal_record_is_logged_at_its_step(whole):
    values, records = logged(whole), counted(whole)
    trained = [record for record in records if record["event"] == "trained"]
    for key in ("loss", "lr", "epoch", "stage"):
        expected = [(record["step"], pytest.approx(record[key])) for record in trained]
        assert values[f"train/{key}"] == expected
    assert all(speed > 0 for _, speed in values[SPEED])
    evaluated = [r for r in records if r["event"] == "evaluated" and not r["reused"]]
    for name in ("copy", "same", "sum", "overall"):
        expected = [(r["step"], pytest.approx(r["metrics"][name])) for r in evaluated]
        assert values[f"validation/{name}"] == expected
    committed = [(r["step"], r["disk_bytes"]) for r in records if r["event"] == "committed"]
    assert values["disk/bytes"] == committed
    begun = [record for record in records if record["event"] == "stage_started"]
    assert values["active/sum"] == [(r["step"], "sum" in r["active"]) for r in begun]
    assert {len(r["active"]) for r in begun} > {3}
    (result,) = (r for r in records if r["event"] == "tested" and r["what"] == "result")
    assert values["test/overall"] == [
        (trained[-1]["step"], pytest.approx(result["metrics"]["overall"]))
    ]
    assert "test_of_base/overall" in values


@pytest.mark.parametrize(("call", "resume_every"), [(4, None), (11, 2), (17, None)])
def test_logged_steps_increase_after_a_kill(config, whole, call, resume_every):
    config = replace(config, resume_every=resume_every)
    kill(lambda: start(config), TensorBoardTracker, "log", call=call)
    resume(config.output_dir)
    written = read(Path(config.output_dir) / "journal.jsonl")
    assert len(written) > len(effective(written)), "the run repeated nothing"
    found, expected = logged(config), logged(whole)
    assert found.keys() == expected.keys()
    for tag, points in found.items():
        assert all(a < b for (a, _), (b, _) in itertools.pairwise(points))
        # The speed and the disk usage differ between processes.
        if tag != SPEED and not tag.startswith("disk/"):
            assert points == expected[tag]


def test_a_signal_and_a_resume_leave_no_step_twice(config, monkeypatch, caplog):
    def interrupt(record: logging.LogRecord) -> bool:
        if "stage 1, epoch 1.0" in record.getMessage():
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    config = replace(config, resume_every=3)
    monkeypatch.setattr(decisions._log, "filters", [interrupt])
    with caplog.at_level("INFO", logger="trainer"), pytest.raises(Interrupted):
        start(config)
    monkeypatch.undo()
    monkeypatch.setattr(run, "write_report", lambda directory: None)
    resume(config.output_dir)
    for points in logged(config).values():
        assert all(a < b for (a, _), (b, _) in itertools.pairwise(points))


def test_a_tracker_that_cannot_start_is_one_warning(config, caplog):
    directory = Path(config.output_dir)
    directory.mkdir()
    (directory / "trackers").write_text("no directory")
    assert start(config).result is not None
    (warning,) = (line for line in caplog.messages if line.startswith("warning: "))
    assert "'tensorboard' failed" in warning
    assert counted(config)[-1]["event"] == "finished"


def test_a_tracker_that_fails_later_is_one_warning_and_is_left_out(config, monkeypatch, caplog):
    calls = itertools.count()
    log = TensorBoardTracker.log

    def fail(self, values, step=None, **kwargs):
        if next(calls) == 4:
            raise OSError("the network is gone")
        log(self, values, step=step, **kwargs)

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    start(config)
    (warning,) = (line for line in caplog.messages if line.startswith("warning: "))
    assert "OSError: the network is gone" in warning
    assert next(calls) == 5
    assert counted(config)[-1]["event"] == "finished"


def test_without_trackers_nothing_is_written(tmp_path):
    config = make_config(tmp_path, msft__max_stages=1)
    start(config)
    assert not (Path(config.output_dir) / "trackers").exists()


def test_the_names_are_those_that_accelerate_knows():
    assert set(TRACKERS) == set(map(str, LOGGER_TYPE_TO_CLASS))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["tensorbord"], "did you mean 'tensorboard'?"),
        (["all"], "log_with must name trackers, of aim, "),
        (["swanlab"], "`pip install swanlab`"),
        (["comet_ml"], "`pip install comet-ml`"),
        ("tensorboard", "log_with must be a list, got 'tensorboard'"),
        ([3], "log_with[0] must be a string"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_refused(tmp_path, names, words):
    with pytest.raises(ConfigError) as caught:
        make_config(tmp_path, log_with=names)
    assert words in str(caught.value)


def test_missing_numbers_are_not_logged():
    record = {"event": "trained", "loss": math.nan, "lr": 0.1, "grad_norm": None, "epoch": 0.5}
    record |= {"tokens": 10, "seconds": 0.0, "stage": 2}
    values = select_values(record, active=["a"], sub_datasets=["a", "b"])
    assert math.isnan(values.pop("train/loss"))
    assert values == {
        "train/lr": 0.1,
        "train/epoch": 0.5,
        "train/stage": 2,
        "train/active_sub_datasets": 1,
    }
    assert select_values({"event": "paused", "step": 3}, active=[], sub_datasets=[]) == {}
