"""Exact match on the test sets, of the results that finished runs have left.

The experiment chooses and judges by token loss. Whether an answer is right as a whole says more to
a reader, so it is counted once more, of the same results and after all choices. What is counted is
kept beside each run.

Example::

    exact_matches(config, comparison)["msft/C-1/seed-0"]["roman"]
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer.comparison.results import Comparison
from trainer.config.schema import Config
from trainer.data.encode import encode
from trainer.data.examples import Example
from trainer.data.tokens import bos_prefix
from trainer.files import write_atomic
from trainer.model.evaluate import Evaluator
from trainer.model.load import load_model
from trainer.training.directory import MODEL

KEPT = "exact_match.json"


def exact_matches(config: Config, comparison: Comparison) -> dict[str, dict[str, float]]:
    """Return the share of right answers by run and sub-dataset; a run goes by its path."""
    directory = Path(config.output_dir)
    paths = [str(case.path) for case, run in comparison.outcomes.items() if run.summary is not None]
    for path in paths:
        if (directory / path / MODEL).is_dir() and not (directory / path / KEPT).exists():
            found = _exact_match(config, directory / path / MODEL)
            write_atomic(directory / path / KEPT, f"{json.dumps(found, indent=2)}\n".encode())
    return {
        path: json.loads((directory / path / KEPT).read_text(encoding="utf-8"))
        for path in paths
        if (directory / path / KEPT).exists()
    }


def _exact_match(config: Config, model: Path) -> dict[str, float]:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load_model(replace(config.model, path=str(model)))
    accelerator = Accelerator()
    prefix = bos_prefix(loaded.tokenizer)
    tests: dict[str, list[Example]] = {}
    for name, files in config.data.sub_datasets.items():
        lines = Path(str(files.test)).read_text(encoding="utf-8").splitlines()
        tests[name] = [encode(json.loads(line), loaded.tokenizer, prefix) for line in lines]
    evaluator = Evaluator(replace(config.evaluation, metric="exact_match"), loaded, accelerator)
    return evaluator(loaded.model.to(accelerator.device), tests).metrics
