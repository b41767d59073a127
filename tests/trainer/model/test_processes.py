"""Several processes of a run: one decides and all act; if one fails, all end."""

from __future__ import annotations

from pathlib import Path

import pytest

from msft_store import StorageError, Store
from tests.support.runs import die_after, outcome
from tests.support.tiny_runs import make_config, write_lines
from tests.support.together import together
from trainer.cli.main import main
from trainer.journal import effective, read
from trainer.model.evaluate import Evaluator
from trainer.report.summary import summarize
from trainer.training import run
from trainer.training.steps import StageSteps


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """Reports are written after the end, and drawing them would take half of the time here."""
    monkeypatch.setattr(run, "write_report", lambda d: summarize(read(Path(d) / "journal.jsonl")))


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, train__lr=0.02, msft__max_stages=2, log_every=1)


def command(config, name):
    path = Path(config.output_dir).parent / "config.yaml"
    return main(["run", str(path), f"output_dir={config.output_dir}-{name}", "--quiet"])


def decisions(directory):
    found = effective(read(Path(directory) / "journal.jsonl"))
    return [(r["decision"], r["exclude"]) for r in found if r["event"] == "decided"]


@pytest.mark.parametrize("mode", ["reset", "restore"])
def test_two_processes_decide_as_one(config, tmp_path, mode):
    override = f"msft.optimizer_on_rollback={mode}"
    path = str(tmp_path / "config.yaml")
    ways = [["run", path, f"output_dir={tmp_path / n}", override, "--quiet"] for n in ("1", "2")]
    assert main(ways[0]) == 0
    assert together(lambda rank: main(ways[1]), tmp_path) == {0: 0, 1: 0}
    assert decisions(tmp_path / "2") == decisions(tmp_path / "1")


def peaks(directory):
    """Sub-dataset → epochs of the checkpoint that was rolled back to when it was excluded."""
    found = effective(read(Path(directory) / "journal.jsonl"))
    places = {r["checkpoint"]: r["epoch"] for r in found if r["event"] == "evaluated"}
    decided = [r for r in found if r["event"] == "decided" and r["exclude"]]
    return {name: places[r["checkpoint"]] for r in decided[:2] for name in r["exclude"]}


def test_two_processes_find_the_peaks_that_one_finds(tmp_path):
    config = make_config(tmp_path, train__lr=0.02, msft__compute_budget=4.0, msft__max_stages=2)
    # The validation data of one sub-dataset contradict its training data, so it peaks early.
    rows = [{"prompt": f"say {a}{b}:", "completion": "no"} for a in "klm" for b in "rs"]
    write_lines(tmp_path / "data" / "same.validation.jsonl", rows)
    assert command(config, "1") == 0
    alone = peaks(f"{config.output_dir}-1")
    assert len(set(alone.values())) == len(alone) == 2, "the peaks are separated"
    assert together(lambda rank: command(config, "2"), tmp_path) == {0: 0, 1: 0}
    assert peaks(f"{config.output_dir}-2") == alone


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the outcome of an undisturbed run of two processes, and the steps of stage 1."""
    directory = tmp_path_factory.mktemp("undisturbed")
    config = make_config(directory, train__lr=0.02, msft__max_stages=2, log_every=1)
    assert together(lambda rank: command(config, "2"), directory) == {0: 0, 1: 0}
    directory = Path(f"{config.output_dir}-2")
    steps = [r for r in read(directory / "journal.jsonl") if r["event"] == "trained"]
    return config, outcome(directory), sum(record["stage"] == 1 for record in steps)


@pytest.mark.parametrize("resume_every", [None, 2])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_run_of_two_processes_ends_like_an_undisturbed_run(
    undisturbed, tmp_path, resume_every, killed, capfd
):
    config, expected, steps = undisturbed
    directory = tmp_path / "run"
    path = str(Path(config.output_dir).parent / "config.yaml")
    every = "null" if resume_every is None else str(resume_every)
    overrides = [f"output_dir={directory}", f"resume_every={every}"]

    def dying(rank):
        if rank == killed:
            die_after(StageSteps, "train", call=steps + 3)
        return main(["run", path, *overrides, "--quiet"])

    codes = together(dying, tmp_path)
    assert codes[killed] == 9
    assert codes[1 - killed] != 0
    if resume_every is not None:
        assert main(["resume", str(directory), "--quiet"]) == 1
        assert "saved by 2 processes, but this run has 1" in capfd.readouterr().err
    assert together(lambda rank: main(["resume", str(directory), "--quiet"]), tmp_path) == {
        0: 0,
        1: 0,
    }
    assert outcome(directory) == expected
    origins = [r["from"] for r in read(directory / "journal.jsonl") if r["event"] == "resumed"]
    assert origins[-1] == ("stage_root" if resume_every is None else "resume_point")


def test_an_error_in_the_main_process_ends_all_with_its_message(config, tmp_path):
    def failing(rank):
        save, calls = Store.save, []

        def saving(self, *arguments, **keywords):
            calls.append(rank)
            if len(calls) == 3:
                raise StorageError("the disk is gone")
            return save(self, *arguments, **keywords)

        Store.save = saving
        return command(config, "failing")

    assert together(failing, tmp_path) == {0: 1, 1: 1}
    assert "msft-train: the disk is gone" in (tmp_path / "0.txt").read_text()
    assert (
        "another process of this run has failed: the disk is gone"
        in (tmp_path / "1.txt").read_text()
    )


def test_an_error_in_another_process_ends_all_with_its_message(config, tmp_path):
    def failing(rank):
        forward = Evaluator._forward

        def forwarding(self, *arguments):
            if rank == 1:
                raise MemoryError("no memory is left")
            return forward(self, *arguments)

        Evaluator._forward = forwarding
        return command(config, "other")

    codes = together(failing, tmp_path)
    assert codes[0] == 1
    assert codes[1] != 0
    assert "has failed: no memory is left" in (tmp_path / "0.txt").read_text()


def test_a_directory_with_a_run_in_it_ends_all_with_a_message(config, tmp_path):
    Path(f"{config.output_dir}-there").mkdir()
    (Path(f"{config.output_dir}-there") / "config.yaml").touch()
    assert together(lambda rank: command(config, "there"), tmp_path) == {0: 1, 1: 1}
    for rank in (0, 1):
        assert "there is a run in" in (tmp_path / f"{rank}.txt").read_text()
