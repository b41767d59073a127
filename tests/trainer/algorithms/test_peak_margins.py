"""Warnings of validation sets that are too small for a margin."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.tiny_runs import make_config
from trainer.algorithms.peaks import margin_warnings
from trainer.training.run import start


@pytest.mark.parametrize(("margin", "warned"), [(2.0, ["b"]), (1.0, []), (0.0, [])])
def test_a_margin_hides_too_much_from_a_tenth_of_the_metric_on(tmp_path, margin, warned):
    config = make_config(tmp_path)
    config = replace(config, msft=replace(config.msft, peaks="robust", margin=margin))
    metrics, errors = {"a": 2.0, "b": 2.0, "c": 0.0}, {"a": 0.1, "b": 0.11, "c": 0.0}
    found = margin_warnings(config, metrics, errors, dict.fromkeys(metrics, 9))
    assert len(found) == len(warned)
    assert all(f"examples of {n}," in line for n, line in zip(warned, found, strict=True))


@pytest.mark.parametrize(
    ("peaks", "margin", "warned"),
    [("robust", 999.0, 3), ("robust", 0.01, 0), ("first_best", 999.0, 0)],
)
def test_a_run_warns_once_of_each_sub_dataset(tmp_path, caplog, peaks, margin, warned):
    config = make_config(tmp_path, msft__max_stages=1, msft__compute_budget=0.5)
    start(replace(config, msft=replace(config.msft, peaks=peaks, margin=margin)))
    found = [line for line in caplog.messages if "give it more validation examples" in line]
    assert len(found) == warned
    assert all("msft.margin: 999 standard errors" in line for line in found)
