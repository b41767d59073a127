"""Measure a sub-dataset with lm_eval: how often is the right completion the most probable one?

After ``pip install lm_eval`` it is a metric, as in ``metric: lm_eval_metric.py:choice`` beside the
configuration, or runs alone: ``python examples/extend/lm_eval_metric.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

logging.getLogger("lm_eval").setLevel(logging.ERROR)
TASKS = Path(__file__).parents[1] / "stdlib_tasks"


def choice(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return 1 for each row whose completion is more probable than those of all other rows."""
    choices = sorted({row["completion"] for row in rows})
    docs = [
        {"prompt": row["prompt"], "choices": choices, "answer": choices.index(row["completion"])}
        for row in rows
    ]
    config = {
        "task": "choice",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
        tasks = {"choice": ConfigurableTask(config=config)}
        found = lm_eval.evaluate(lm=harness, task_dict=tasks, bootstrap_iters=0)
    samples = sorted(found["samples"]["choice"], key=lambda sample: sample["doc_id"])
    return [float(sample["acc"]) for sample in samples]


choice.mode = "max"  # type: ignore[attr-defined]

if __name__ == "__main__":
    lines = (TASKS / "data/status.validation.jsonl").read_text(encoding="utf-8").splitlines()
    weights = AutoModelForCausalLM.from_pretrained(TASKS / "base", dtype="float32").eval()
    tokens = AutoTokenizer.from_pretrained(TASKS / "base")
    print(choice(weights, tokens, [json.loads(line) for line in lines[:8]]))
