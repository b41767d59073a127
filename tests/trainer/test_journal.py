"""The journal: round trip, removal of a torn last line, errors on damage, and void records."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest

from trainer.errors import PausedError, RunError
from trainer.journal import Journal, effective, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def write(path: Path, *events: str) -> None:
    with Journal(path) as journal:
        for event in events:
            journal.append(event)


def test_records_come_back_numbered_and_in_order(path: Path) -> None:
    with Journal(path) as journal:
        returned = journal.append("stage_started", stage=1, active=("a", "ü"), epochs=0.1)
        journal.append("trained", step=3, loss=1 / 3)
    first, second = read(path)
    assert returned["seq"] == 0
    assert (first["seq"], first["event"], first["stage"]) == (0, "stage_started", 1)
    assert (first["active"], first["epochs"]) == (["a", "ü"], 0.1)
    assert (second["seq"], second["loss"]) == (1, 1 / 3)
    assert first["time"] <= second["time"]


def test_every_line_is_on_disk_when_append_returns(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("a")
        assert len(read(path)) == 1
        journal.append("b")
        assert len(read(path)) == 2


def test_reopening_goes_on_counting(path: Path) -> None:
    write(path, "a", "b")
    write(path, "c")
    assert [(r["seq"], r["event"]) for r in read(path)] == [(0, "a"), (1, "b"), (2, "c")]


def test_numbers_that_are_not_finite_are_null_on_disk_and_nan_when_read(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("evaluated", metrics={"a": math.nan, "b": -math.inf, "c": 0.5}, losses=None)
        journal.append("trained", loss=math.nan, grad_norm=math.inf)
    lines = path.read_text(encoding="utf-8").splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert strict[0]["metrics"] == {"a": None, "b": None, "c": 0.5}
    evaluated, trained = read(path)
    assert math.isnan(evaluated["metrics"]["a"])
    assert math.isnan(evaluated["metrics"]["b"])
    assert evaluated["losses"] is None
    assert math.isnan(trained["loss"])
    assert trained["grad_norm"] is None


def test_any_torn_last_line_is_ignored_and_removed_by_the_next_writer(path: Path) -> None:
    write(path, "a", "b")
    sound = path.read_bytes()
    start = sound.index(b"\n") + 1
    for length in range(start, len(sound)):
        path.write_bytes(sound[:length])
        assert [r["event"] for r in read(path)] == ["a"]
        write(path, "c")
        assert [(r["seq"], r["event"]) for r in read(path)] == [(0, "a"), (1, "c")]
        assert path.read_bytes().startswith(sound[:start])


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"\0\0\0\n", b"{}\n", b'{"seq": 2'])
def test_rubbish_in_the_place_of_a_last_line_counts_as_torn(path: Path, tail: bytes) -> None:
    write(path, "a", "b")
    path.write_bytes(path.read_bytes() + tail)
    assert [r["event"] for r in read(path)] == ["a", "b"]


def test_a_damaged_line_before_the_last_is_named(path: Path) -> None:
    write(path, "a", "b", "c")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:-3], *lines[2:]]))
    with pytest.raises(RunError, match=r"journal\.jsonl, line 2 is not a record"):
        read(path)
    with pytest.raises(RunError, match=r"line 2"):
        Journal(path)


def test_a_missing_line_is_named(path: Path) -> None:
    write(path, "a", "b", "c")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    with pytest.raises(RunError, match=r"line 2 has seq 2, record 1 was expected"):
        read(path)


def test_a_missing_journal_is_reported(path: Path) -> None:
    with pytest.raises(RunError, match=r"no journal at .*give the output_dir of a run"):
        read(path)


def test_an_empty_journal_has_no_records(path: Path) -> None:
    Journal(path).close()
    assert read(path) == []


def test_a_record_that_cannot_be_written_leaves_the_ones_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path) as journal:
        journal.append("a")
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(PausedError, match=r"the 'b' record, [\d,]+ bytes"):
                journal.append("b")
        assert [r["event"] for r in read(path)] == ["a"]
        journal.append("c")
    assert [(r["seq"], r["event"]) for r in read(path)] == [(0, "a"), (1, "c")]


def resumed(path: Path, after: int) -> None:
    with Journal(path) as journal:
        journal.append("resumed", after=after)


def test_effective_omits_records_that_a_resume_made_void(path: Path) -> None:
    write(path, "run_started", "stage_started", "trained", "trained")
    resumed(path, after=1)
    write(path, "trained", "evaluated")
    events = [(r["seq"], r["event"]) for r in effective(read(path))]
    assert events == [
        (0, "run_started"),
        (1, "stage_started"),
        (4, "resumed"),
        (5, "trained"),
        (6, "evaluated"),
    ]


def test_effective_with_a_second_resume_that_reaches_behind_the_first(path: Path) -> None:
    write(path, "run_started", "stage_started", "trained", "trained")
    resumed(path, after=2)
    write(path, "trained")
    resumed(path, after=1)
    write(path, "trained")
    assert [r["seq"] for r in effective(read(path))] == [0, 1, 6, 7]


def test_effective_without_a_resume_is_everything(path: Path) -> None:
    write(path, "a", "b")
    assert effective(read(path)) == read(path)
