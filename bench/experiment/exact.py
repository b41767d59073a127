"""Count the right answers of a finished run's result on the test sets.

The experiment chooses and judges by token loss. The share of answers that are right as a whole says
more to a reader, so they are counted once more, of the same result and after all choices.

Example::

    count_right(config, run / "model")["roman"]     # of the test examples
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer.config.schema import OVERALL, Config
from trainer.data.encode import encode
from trainer.data.tokens import bos_prefix
from trainer.model.evaluate import Evaluator
from trainer.model.load import load_model


def count_right(config: Config, model: Path) -> dict[str, int]:
    """Return the number of right answers on the test examples of each sub-dataset.

    Args:
        config: The configuration of the run.
        model: The directory of the resulting model.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load_model(replace(config.model, path=str(model)))
    accelerator = Accelerator()
    prefix = bos_prefix(loaded.tokenizer)
    tests = {
        name: [
            encode(json.loads(line), loaded.tokenizer, prefix)
            for line in Path(str(files.test)).read_text(encoding="utf-8").splitlines()
        ]
        for name, files in config.data.sub_datasets.items()
    }
    evaluator = Evaluator(replace(config.evaluation, metric="exact_match"), loaded, accelerator)
    shares = evaluator(loaded.model.to(accelerator.device), tests).metrics
    return {
        name: round(share * len(tests[name])) for name, share in shares.items() if name != OVERALL
    }
