"""Comparisons of real runs: no run is repeated, failures are isolated, and several run at once."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from tests.support.tiny_runs import make_config
from trainer.cli.main import main
from trainer.comparison.compare import compare
from trainer.comparison.grid import list_cases
from trainer.comparison.subprocesses import run_subprocesses
from trainer.config.schema import Config
from trainer.errors import ConfigError, RunError
from trainer.journal import read
from trainer.signals import Interrupted
from trainer.training.run import start


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Return the configuration of a comparison in ``all``, with runs of half an epoch."""
    return make_config(
        tmp_path,
        msft__compute_budget=0.5,
        msft__max_stages=2,
        output_dir=str(tmp_path / "all"),
    )


@pytest.mark.parametrize(("cadence", "eval_every"), [("active", 0.5), ("steps", 2.0)])
def test_equal_compute_gives_others_msfts_flops_and_nothing_is_repeated(
    config: Config,
    caplog: pytest.LogCaptureFixture,
    cadence: Literal["active", "steps"],
    eval_every: float,
) -> None:
    evaluation = replace(config.evaluation, cadence=cadence, eval_every=eval_every)
    config = replace(config, evaluation=evaluation)
    caplog.set_level("INFO", logger="trainer.comparison")
    directory = Path(config.output_dir)
    comparison = compare(config, ["sft", "msft"], equal_compute=True)
    assert caplog.messages[0].startswith(f"3 runs in {directory}, 0 of them finished already")
    _, equal = comparison.groups
    sft, msft = equal.row("sft"), equal.row("msft")
    assert sft is not None
    assert msft is not None
    # MSFT trains two stages of half an epoch, because no sub-dataset peaks.
    assert sft.budget() == 1.0
    assert sft.work()["total"].flops == pytest.approx(msft.work()["total"].flops, rel=0.1)
    assert not (directory / "sft/C-0.5/seed-0/model").exists()
    tree = json.loads((directory / "compare.json").read_text(encoding="utf-8"))
    assert tree["runs"]["sft/C-0.5-equal/seed-0"]["compute_budget"] == 1.0
    journals = sorted(directory.glob("*/*/*/journal.jsonl"))
    before = [journal.read_bytes() for journal in journals]
    assert len(before) == 3
    again = compare(config, ["sft", "msft"], equal_compute=True)
    assert [journal.read_bytes() for journal in journals] == before
    assert again.to_dict() == comparison.to_dict()
    assert any("3 of them finished already" in line for line in caplog.messages)
    with pytest.raises(RunError, match="has a comparison of several runs"):
        start(config)


def test_a_run_that_fails_does_not_stop_the_others(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(config.output_dir)
    (directory / "msft/C-0.5/seed-0/store").mkdir(parents=True)
    arguments = ["compare", str(directory.parent / "config.yaml"), "--methods", "msft,sft"]
    assert main([*arguments, "--seeds", "1", "--quiet", "--json"]) == 1
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert list(tree["runs"]) == ["msft/C-0.5/seed-0", "sft/C-0.5/seed-0"]
    assert "belongs to no run" in tree["runs"]["msft/C-0.5/seed-0"]["failure"]
    assert tree["groups"][0]["methods"]["SFT"]["seeds"] == [0]
    assert "MSFT, C = 0.5, seed 0 did not finish: " in err
    markdown = (directory / "compare.md").read_text(encoding="utf-8")
    assert "| runs        |       | 0 of 1 |     1 |" in markdown.splitlines()
    with pytest.raises(RunError, match=r"has another train\.lr"):
        compare(replace(config, train=replace(config.train, lr=0.5)), ["sft"], seeds=1)


def test_runs_in_subprocesses_are_complete(config: Config) -> None:
    comparison = compare(config, ["sft"], seeds=2, jobs=2, keep_models=True)
    assert comparison.failures == {}
    directory = Path(config.output_dir)
    assert (directory / "sft/C-0.5/seed-1/model/model.safetensors").is_file()
    row = comparison.groups[0].rows[0]
    assert sorted(row.runs) == [0, 1]
    for case in list_cases(config, ["sft"], seeds=2):
        events = [r["event"] for r in read(directory / case.path / "journal.jsonl")]
        assert events[-1] == "finished"


def test_if_no_run_finishes_the_first_failure_is_the_error(config: Config) -> None:
    (Path(config.output_dir) / "sft/store").mkdir(parents=True)
    with pytest.raises(RunError, match="belongs to no run"):
        compare(config, ["sft"])
    with pytest.raises(ConfigError, match="--jobs must be at least 1"):
        compare(config, ["sft"], jobs=0)


def test_a_failed_subprocess_gives_its_reason_in_one_line(tmp_path: Path) -> None:
    ends: dict[str, tuple[int, str]] = {}

    def record_exit(name: str, code: int, line: str) -> bool:
        ends[name] = (code, line)
        return False

    commands = {"bad": ["report", str(tmp_path)], "never": ["report", str(tmp_path)]}
    run_subprocesses(commands, jobs=1, on_exit=record_exit)
    assert list(ends) == ["bad"]
    code, line = ends["bad"]
    assert code == 1
    assert line.startswith("no journal at")


def test_a_signal_is_forwarded_and_no_other_run_starts(config: Config) -> None:
    path = Path(config.output_dir).parent / "config.yaml"
    ends: dict[str, int] = {}

    def record_exit(name: str, code: int, line: str) -> bool:
        ends[name] = code
        return True

    long = ["run", str(path), "msft.compute_budget=500", f"output_dir={path.parent / 'long'}"]
    with pytest.raises(Interrupted) as interrupted:
        run_subprocesses(
            {"long": long, "never": long},
            jobs=1,
            on_exit=record_exit,
            on_start=lambda name: signal.raise_signal(signal.SIGTERM),
        )
    assert interrupted.value.number == signal.SIGTERM
    assert list(ends) == ["long"]
    # The signal may have come before its handler was installed.
    assert ends["long"] in (143, -signal.SIGTERM)
