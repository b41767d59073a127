"""The command: results on stdout, one sentence on stderr for a mistake, exit codes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from msft_store import Store
from tests.support.tiny_runs import make_config
from trainer import __main__
from trainer.cli.logs import show_log
from trainer.cli.main import main
from trainer.journal import read


@pytest.fixture
def directory(tmp_path):
    """A directory with ``config.yaml``, model and data; its run would be in ``run``."""
    make_config(tmp_path, msft__compute_budget=1.0, msft__max_stages=2)
    return tmp_path


def call(capsys, *arguments):
    """Return exit code, stdout and stderr."""
    capsys.readouterr()  # of fixtures
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


def test_run_prints_the_result_and_its_progress(capsys, directory):
    code, out, err = call(capsys, "run", directory / "config.yaml", "seed=3")
    assert code == 0
    assert "overall" in out
    assert "stage 1, epoch 0.50" in err
    assert yaml.safe_load((directory / "run/config.yaml").read_text(encoding="utf-8"))["seed"] == 3
    code, out, err = call(capsys, "report", directory / "run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["method"] == "msft"
    code, out, err = call(capsys, "resume", directory / "run")
    assert code == 0
    assert "is finished" in err


def test_a_run_without_a_right_answer_says_so_and_does_not_end_with_the_base(capsys, directory):
    settings = ("evaluation.metric=exact_match", "train.lr=0.0001", "msft.max_stages=1")
    code, _, err = call(capsys, "run", directory / "config.yaml", *settings)
    assert code == 4
    assert err.count("no answer was right in 2 evaluations") == 1
    assert "the reference is" in err
    assert "answer_pattern is not set" in err
    assert "No answer was right in any evaluation" in err
    report = (directory / "run" / "report.md").read_text(encoding="utf-8")
    assert report.splitlines()[2].startswith("No answer was right")
    evaluated = [r for r in read(directory / "run/journal.jsonl") if r["event"] == "evaluated"]
    losses = {r["checkpoint"]: sum(r["losses"].values()) for r in evaluated}
    result = json.loads((directory / "run/result.json").read_text(encoding="utf-8"))["result"]
    assert result["checkpoint"] == min(losses, key=losses.__getitem__)
    assert result["checkpoint"] != evaluated[0]["checkpoint"]
    assert [c.id for c in Store.open(directory / "run/store").log()] == [result["checkpoint"]]


def test_compare_sets_methods_side_by_side_and_repeats_nothing(capsys, directory):
    arguments = ["compare", directory / "config.yaml", f"output_dir={directory / 'both'}"]
    code, out, _ = call(capsys, *arguments, "--quiet")
    assert code == 0
    assert "SFT" in out
    assert "MSFT" in out
    assert (directory / "both/compare.md").read_text(encoding="utf-8").startswith("# Comparison")
    journals = [directory / "both" / method / "journal.jsonl" for method in ("sft", "msft")]
    before = [journal.read_bytes() for journal in journals]
    code, out, err = call(capsys, *arguments, "--quiet", "--json")
    assert (code, err) == (0, "")
    assert list(json.loads(out)) == ["SFT", "MSFT"]
    assert [journal.read_bytes() for journal in journals] == before
    code, _, err = call(capsys, *arguments, "train.lr=0.5")
    assert code == 1
    assert "has another train.lr" in err


def test_the_bounds_of_a_plan_hold_for_the_run(capsys, directory):
    code, out, err = call(capsys, "plan", directory / "config.yaml", "--json")
    assert (code, err) == (0, "")
    bound = json.loads(out)["at_most"]
    call(capsys, "run", directory / "config.yaml", "--quiet")
    records = read(directory / "run/journal.jsonl")
    assert sum(r["tokens"] for r in records if r["event"] == "trained") <= bound["trained_tokens"]
    assert max(r["step"] for r in records if "step" in r) <= bound["steps"]


MISTAKES = {
    "unknown key": (["train.lrr=1"], "train.lr"),
    "no model": (["model.path=nowhere/at/all"], "nowhere/at/all"),
    "no safetensors": (["model.path=data"], "no .safetensors file"),
    "too long for the model": (["data.max_length=4096"], "the model has 128 positions"),
    "pattern without a match": (
        ["evaluation.metric=exact_match", "evaluation.answer_pattern='@(x)'"],
        "matches none of the references",
    ),
    "all too long": (["data.max_length=3"], "no usable example: all"),
    "no such directory": (["data.directory=gone"], "gone"),
    "a comment for a value": (
        ["evaluation.answer_pattern=#### (.*)"],
        "YAML reads what follows '#' as a comment",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(capsys, directory, mistake):
    overrides, message = MISTAKES[mistake]
    code, out, err = call(capsys, "run", directory / "config.yaml", *overrides)
    assert code == 1
    assert out == ""
    assert message in err
    assert err.startswith("msft-train: ")
    assert err.count("\n") == 1


def test_a_bad_line_is_named_with_its_file(capsys, directory):
    path = directory / "data/sum.train.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write("{oops\n")
    number = len(path.read_text(encoding="utf-8").splitlines())
    code, _, err = call(capsys, "run", directory / "config.yaml")
    assert code == 1
    assert f"{path}, line {number}: not valid JSON" in err


def test_a_missing_configuration_and_a_missing_run_are_named(capsys, tmp_path):
    for command in (["run", tmp_path / "no.yaml"], ["resume", tmp_path], ["report", tmp_path]):
        code, _, err = call(capsys, *command)
        assert code == 1
        assert str(tmp_path) in err
        assert err.count("\n") == 1


def test_a_mistake_leaves_no_run_behind_that_would_be_in_the_way(capsys, directory):
    path = directory / "data/sum.train.jsonl"
    sound = path.read_text(encoding="utf-8")
    path.write_text(f"{sound}{{oops\n", encoding="utf-8")
    assert call(capsys, "run", directory / "config.yaml", "--quiet")[0] == 1
    assert not (directory / "run").exists()
    path.write_text(sound, encoding="utf-8")
    assert call(capsys, "run", directory / "config.yaml", "--quiet")[0] == 0


@pytest.mark.parametrize("name", ["store", "model"])
def test_a_directory_that_belongs_to_no_run_is_not_replaced(capsys, directory, name):
    mine = directory / "run" / name / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious", encoding="utf-8")
    code, _, err = call(capsys, "run", directory / "config.yaml", "--quiet")
    assert code == 1
    assert "belongs to no run" in err
    assert mine.read_text(encoding="utf-8") == "precious"


def test_a_run_whose_journal_is_gone_keeps_its_store(capsys, directory):
    assert call(capsys, "run", directory / "config.yaml", "--quiet")[0] == 0
    (directory / "run/journal.jsonl").unlink()
    before = Store.open(directory / "run/store").log()
    code, _, err = call(capsys, "resume", directory / "run", "--quiet")
    assert code == 1
    assert "journal.jsonl is gone or empty" in err
    assert Store.open(directory / "run/store").log() == before != []


def test_overrides_may_follow_options(capsys, directory):
    config = directory / "config.yaml"
    code, out, _ = call(capsys, "plan", config, "seed=1", "--json", "method=sft")
    assert code == 0
    assert json.loads(out)["method"] == "sft"
    assert call(capsys, "plan", config, "--jsn", "method=sft")[0] == 2
    assert call(capsys, "report", directory / "run", "method=sft")[0] == 2


def test_plan_refuses_a_configuration_that_a_run_would_refuse(capsys, directory):
    code, _, err = call(capsys, "plan", directory / "config.yaml", "data.max_length=4096")
    assert code == 1
    assert "the model has 128 positions" in err


def test_examples_that_are_too_long_are_reported(capsys, directory):
    long = {"prompt": "a" * 40, "completion": "b"}
    with (directory / "data/sum.train.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(long)}\n")
    warning = "sub-dataset 'sum': 1 example has more than data.max_length=24 tokens, dropped"
    assert warning in call(capsys, "plan", directory / "config.yaml")[1]
    assert warning in call(capsys, "run", directory / "config.yaml")[2]


def test_a_run_is_not_begun_twice(capsys, directory):
    assert call(capsys, "run", directory / "config.yaml", "--quiet")[0] == 0
    code, _, err = call(capsys, "run", directory / "config.yaml", "--quiet")
    assert code == 1
    assert f"msft-train resume {directory / 'run'}" in err


def test_a_changed_base_is_noticed_on_resume(capsys, directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "trainer.training.run._finish", lambda *_: (_ for _ in ()).throw(OSError("no space"))
        )
        assert call(capsys, "run", directory / "config.yaml", "--quiet")[0] == 1
    weights = directory / "base/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = call(capsys, "resume", directory / "run", "--quiet")
    assert code == 1
    assert err.count("\n") == 1
    assert "base" in err


def test_usage(capsys):
    assert call(capsys)[0] == 2
    assert call(capsys, "fly")[0] == 2
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "exit codes:" in out
    code, out, _ = call(capsys, "run", "--help")
    assert "msft-train run config.yaml train.lr=2e-5" in out


def test_the_version_is_printed_without_the_dependencies_of_the_trainer(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["msft-train", "--version"])
    monkeypatch.setitem(sys.modules, "trainer.cli.main", None)
    assert __main__.main() == 0
    assert capsys.readouterr().out == f"{version('msft-store')}\n"


def test_sigterm_ends_a_process_cleanly_and_resumably(capsys, directory):
    config = directory / "config.yaml"
    command = [sys.executable, "-m", "trainer", "run", str(config), "msft.compute_budget=500"]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "epoch 1.00" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait() == 143
    assert "Traceback" not in rest
    assert f"msft-train resume {directory / 'run'}" in rest
    assert [r["event"] for r in read(directory / "run/journal.jsonl")][-1] == "interrupted"
    assert os.path.exists(directory / "run/resume.safetensors")


def test_quiet_and_verbose_set_the_log_level(capsys):
    trainer, store = (logging.getLogger(name) for name in ("trainer.x", "msft_store.x"))
    shown = {}
    for quiet, verbosity in ((True, 0), (False, 0), (False, 1), (False, 2)):
        show_log(quiet=quiet, verbosity=verbosity)
        for logger in (trainer, store):
            logger.debug("detail")
            logger.info("step")
            logger.warning("problem")
        shown[quiet, verbosity] = capsys.readouterr().err.split("\n")[:-1]
    logging.getLogger("trainer.x").warning("a name \x1b]0;title\x07\nand a second line")
    assert "a name \\x1b]0;title\\x07\nand a second line\n" in capsys.readouterr().err
    assert shown[True, 0] == ["problem", "problem"]
    assert shown[False, 0] == ["step", "problem", "problem"]
    assert shown[False, 1][0] == "INFO trainer.x: step"
    assert len(shown[False, 1]) == 4
    assert len(shown[False, 2]) == 6
    show_log(quiet=False, verbosity=0)
