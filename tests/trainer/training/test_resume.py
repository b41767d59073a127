"""A run that was killed anywhere and resumed ends like an undisturbed run."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from msft_store import Store, Timeline
from tests.support.runs import kill, outcome
from tests.support.tiny_runs import make_config
from trainer.errors import RunError
from trainer.journal import Journal, read
from trainer.signals import Interrupted
from trainer.training import run
from trainer.training.run import resume, start


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """Reports are written after the end, and drawing them would take half of the time here."""
    monkeypatch.setattr(run, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three stages, with roll-backs, in about a second."""
    directory = tmp_path_factory.mktemp("resume")
    return make_config(directory, msft__max_stages=3, train__lr=0.02, log_every=1)


@pytest.fixture(scope="module")
def reference(config):
    """The outcome of a run that nothing happened to."""
    config = replace(config, output_dir=f"{config.output_dir}-reference")
    start(config)
    return outcome(Path(config.output_dir))


def test_the_reference_goes_back_and_excludes(reference):
    decisions = [record for record in reference[0] if record["event"] == "decided"]
    assert any(record["exclude"] for record in decisions)
    assert {record["decision"] for record in decisions} == {"continue", "roll_back", "stop"}


PLACES = {
    "before the first stage": ("run_started", 1, {}),
    "in the middle of the first stage": ("trained", 3, {}),
    "between commit and evaluation": ("committed", 3, {}),
    "between evaluation and decision": ("evaluated", 3, {}),
    "before a roll-back": ("decided", 1, {"decision": "roll_back"}),
    "at the start of the second stage": ("stage_started", 2, {}),
    "in the middle of the second stage": ("trained", 3, {"stage": 2}),
    "after a commit of the third stage": ("committed", 2, {"stage": 3}),
    "before the tests": ("decided", 1, {"decision": "stop"}),
    "between the tests": ("tested", 1, {}),
}


@pytest.mark.parametrize(
    ("place", "resume_every"),
    [(place, None) for place in PLACES] + [(p, 2) for p in PLACES if p.startswith("in the middle")],
)
def test_a_kill_between_journal_records_changes_nothing(config, reference, place, resume_every):
    directory = Path(f"{config.output_dir}-killed")
    shutil.rmtree(directory, ignore_errors=True)
    config = replace(config, output_dir=str(directory), resume_every=resume_every)
    event, number, fields = PLACES[place]
    like = {"event": event, **fields}
    kill(lambda: start(config), Journal, "append", call=number, like=like)
    resume(directory)
    assert outcome(directory) == reference
    origins = [r["from"] for r in read(directory / "journal.jsonl") if r["event"] == "resumed"]
    assert len(origins) == 1
    if place.startswith("in the middle"):
        assert origins == ["stage_root" if resume_every is None else "resume_point"]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Store, "create", 1),
        (Timeline, "commit_async", 1),
        (Timeline, "commit_async", 4),
        (Store, "save", 3),
        (Store, "evict", 5),
        (Store, "pin", 7),
        (Store, "reencode", 1),
        (Timeline, "rollback", 1),
        (Store, "export", 1),
        (run, "_finish", 1),
    ],
)
def test_a_kill_inside_an_action_changes_nothing(config, reference, owner, name, call):
    directory = Path(f"{config.output_dir}-killed")
    shutil.rmtree(directory, ignore_errors=True)
    config = replace(config, output_dir=str(directory), resume_every=3)
    kill(lambda: start(config), owner, name, call=call)
    resume(directory)
    assert outcome(directory) == reference
    assert Store.open(directory / "store").check(read_data=True) == []


def test_a_kill_while_a_resume_point_is_written_leaves_nothing(config, reference):
    directory = Path(f"{config.output_dir}-killed")
    shutil.rmtree(directory, ignore_errors=True)
    config = replace(config, output_dir=str(directory), resume_every=2)
    child = os.fork()
    if child == 0:
        # The resume point is the only file that is as large. Its write ends the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        start(config)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert list(directory.glob(".*"))
    resume(directory)
    assert outcome(directory) == reference
    assert not list(directory.glob(".*"))


def test_kills_one_after_the_other_change_nothing(config, reference):
    directory = Path(f"{config.output_dir}-killed")
    shutil.rmtree(directory, ignore_errors=True)
    config = replace(config, output_dir=str(directory), resume_every=1)
    kill(lambda: start(config), Timeline, "commit_async", call=3)
    kill(lambda: resume(directory), Journal, "append", call=2)
    kill(lambda: resume(directory), Timeline, "commit_async", call=3)
    kill(lambda: resume(directory), Journal, "append", call=30)
    resume(directory)
    assert outcome(directory) == reference


def test_a_signal_ends_after_the_step_and_leaves_a_resume_point(config, reference, monkeypatch):
    directory = Path(f"{config.output_dir}-signalled")
    config = replace(config, output_dir=str(directory))
    append, signalled = Journal.append, []

    def signalling(self, event, **values):
        if event == "trained" and values["step"] == 5 and not signalled:
            signalled.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return append(self, event, **values)

    monkeypatch.setattr(Journal, "append", signalling)
    with pytest.raises(Interrupted) as caught:
        start(config)
    assert caught.value.number == signal.SIGTERM
    *_, point, last = read(directory / "journal.jsonl")
    assert (point["event"], last["event"], last["signal"]) == ("resume_point", "interrupted", 15)
    assert (directory / "resume.safetensors").stat().st_size == point["bytes"]
    resume(directory)
    assert outcome(directory) == reference
    assert not (directory / "resume.safetensors").exists()


def test_a_damaged_resume_point_is_not_used(config, reference):
    directory = Path(f"{config.output_dir}-killed")
    shutil.rmtree(directory, ignore_errors=True)
    config = replace(config, output_dir=str(directory), resume_every=1)
    kill(lambda: start(config), Journal, "append", call=20)
    point = directory / "resume.safetensors"
    point.write_bytes(point.read_bytes()[:100])
    resume(directory)
    assert outcome(directory) == reference


def test_a_finished_run_stays_as_it_is(config, reference, caplog):
    directory = Path(f"{config.output_dir}-reference")
    before = (directory / "journal.jsonl").read_bytes()
    with caplog.at_level("INFO", logger="trainer"):
        resume(directory)
    assert "is finished" in caplog.messages[0]
    assert (directory / "journal.jsonl").read_bytes() == before


def test_an_existing_run_is_not_started_again(config, reference):
    with pytest.raises(RunError, match=r"there is a run in .* already: continue it with"):
        start(replace(config, output_dir=f"{config.output_dir}-reference"))


def test_an_edited_journal_is_noticed(config, reference, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(f"{config.output_dir}-reference", directory)
    journal = directory / "journal.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if '"decision": "stop"' in line)
    text = "".join(lines[: last + 1]).replace('"decision": "roll_back"', '"decision": "stop"')
    journal.write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match="now lead to another decision"):
        resume(directory)
