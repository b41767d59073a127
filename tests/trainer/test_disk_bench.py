"""The disk benchmark: its mixture, its runs with rounded checkpoints, and its measurements."""

from __future__ import annotations

import calendar
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.disk import TARGETS, Row, Run, config_of, measure, runs, table, verdicts
from bench.masters import rounded, train
from bench.tasks import MIXTURE, split, write
from bench.trajectories import REGIMES
from msft_store import Store
from tests.support.tiny_runs import make_config, make_model
from trainer.journal import read
from trainer.training.directory import JOURNAL, STORE
from trainer.training.run import is_finished
from trainer.training.workspace import RESULT

BF16, MASTERS = (next(r for r in REGIMES if r.name == name) for name in TARGETS)
ROW = Row(
    regime=BF16.name,
    lr=BF16.lr,
    budget=3,
    window=None,
    stages=10,
    excluded=10,
    steps=100,
    evaluations=20,
    seconds=1.0,
    checkpoint_bytes=1000,
    peak=0.2,
    mean=0.11,
    paper_peak=4,
    paper_mean=2.5,
    alive_peak=6,
    alive_mean=3.5,
    new_mean=0.03,
    new_peak=0.04,
)


def test_the_mixture_has_ten_sub_datasets_of_equal_size(tmp_path: Path) -> None:
    write(tmp_path, train=12, validation=5)

    for ending, size in (("train", 12), ("validation", 5)):
        files = list(tmp_path.glob(f"*.{ending}.jsonl"))
        assert len(files) == 10
        assert {len(file.read_text(encoding="utf-8").splitlines()) for file in files} == {size}


@pytest.mark.parametrize("task", MIXTURE, ids=lambda task: task.name)
def test_no_prompt_of_a_sub_dataset_comes_twice(task) -> None:
    splits = split(task, {"validation": 20, "train": 40})

    assert len({e.prompt for examples in splits.values() for e in examples}) == 60


def test_the_answers_of_the_new_tasks_are_right(tmp_path: Path) -> None:
    write(tmp_path, train=30, validation=1)

    def pairs(name: str) -> list[tuple[str, str]]:
        lines = (tmp_path / f"{name}.train.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return [(r["prompt"].split()[-1].rstrip(":"), r["completion"].strip()) for r in records]

    for number, answer in pairs("hexadecimal"):
        assert int(answer, 16) == int(number)
    for month, answer in pairs("month"):
        year, number = map(int, month.split("-"))
        assert int(answer) == calendar.monthrange(year, number)[1]


def test_rounded_states_keep_ties_and_whole_numbers() -> None:
    weight = torch.tensor([1.0, 1.0 + 2**-12])
    state = {"a": weight, "tied": weight, "count": torch.tensor([3])}

    made = rounded(state, torch.bfloat16)

    assert made["a"].tolist() == [1.0, 1.0]
    assert made["a"].data_ptr() == made["tied"].data_ptr()
    assert made["count"].dtype == torch.int64
    assert weight.dtype == torch.float32


def test_a_run_with_fp32_weights_has_checkpoints_in_bf16(tmp_path: Path) -> None:
    config = make_config(tmp_path, async_save=False, msft__compute_budget=1.0)
    full = sum(parameter.numel() for parameter in make_model().parameters()) * 2

    summary = train(config, torch.bfloat16)

    directory = Path(config.output_dir)
    store = Store.open(directory / STORE)
    assert {entry.dtype.name for entry in store.tensors(RESULT).values()} == {"bfloat16"}
    assert summary.disk is not None
    assert summary.disk.checkpoint_bytes == full
    assert is_finished(directory)
    row = measure(Run(regime=MASTERS, budget=1, window=None), read(directory / JOURNAL))
    assert row.checkpoint_bytes == full
    assert row.paper_peak >= row.paper_mean > 0
    assert row.alive_peak >= row.alive_mean >= 1
    assert row.peak >= row.new_peak


def test_a_run_that_would_not_be_rounded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="async_save"):
        train(make_config(tmp_path), torch.bfloat16)


def test_runs_differ_in_regime_budget_and_window(tmp_path: Path) -> None:
    write(tmp_path / "data", train=1, validation=1)
    all_runs = runs()

    assert len({run.name for run in all_runs}) == len(all_runs)
    for regime in (BF16, MASTERS):
        mine = {(run.budget, run.window) for run in all_runs if run.regime == regime}
        assert mine >= {(c, w) for c in (1, 3, 10) for w in (None, 2)}
    config = config_of(
        Run(regime=MASTERS, budget=10, window=2), data=tmp_path / "data", output=tmp_path / "run"
    )
    assert (config.model.dtype, config.train.lr) == ("float32", 2e-5)
    assert (config.msft.compute_budget, config.msft.peak_window) == (10, 2)
    assert len(config.data.sub_datasets) == 10


def test_a_missed_target_is_reported() -> None:
    (line,) = verdicts([ROW])

    assert "peak 0.20 of 0.25 allowed: met" in line
    assert "mean 0.11 of 0.10 allowed: missed" in line


def test_with_masters_only_the_peak_with_a_window_has_a_target() -> None:
    without = replace(ROW, regime=MASTERS.name, peak=1.2)

    assert verdicts([without]) == []
    (line,) = verdicts([replace(without, window=2)])
    assert "peak 1.20 of 1.00 allowed: missed" in line
    assert "mean" not in line


def test_the_learning_rate_stands_beside_every_figure() -> None:
    header, _, row = table([ROW]).splitlines()

    assert header.split("|")[2].strip() == "lr"
    assert row.split("|")[2].strip() == "1e-05"
