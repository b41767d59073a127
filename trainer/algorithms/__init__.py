"""Training methods by name: a strategy decides, the training loop acts.

Example::

    strategy = make_strategy(config, {"arith": 900, "dates": 80}, mode="max")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.algorithms.base import Mode
from trainer.algorithms.continual import Continual
from trainer.algorithms.dynamix import Dynamix
from trainer.algorithms.ies import Ies
from trainer.algorithms.method import Method
from trainer.algorithms.msft import Msft
from trainer.algorithms.online import Online
from trainer.algorithms.sft import Sft
from trainer.algorithms.single_rollout import SingleRollout
from trainer.config.schema import Config


def make_strategy(
    config: Config,
    sizes: Mapping[str, float],
    *,
    mode: Mode,
    modes: Mapping[str, Mode] | None = None,
) -> Method:
    """Create the strategy for ``config.method``, which has seen no evaluation.

    ``sizes`` maps sub-datasets to their numbers of training examples, in any unit common to all.
    ``mode`` is the direction in which the overall metric improves; ``modes`` are those of
    sub-datasets' metrics that differ from it.
    """
    train, settings = config.train, replace(config.msft, exclusion=config.exclusion)
    common: dict[str, Any] = {
        "sub_datasets": tuple(config.data.sub_datasets),
        "mode": mode,
        "modes": modes or {},
        "compute_budget": config.msft.compute_budget,
        "max_skips": train.max_skips if train.on_divergence == "rollback" else 0,
        "average": config.average,
    }
    match config.method:
        case "sft":
            return Sft(**common)
        case "continual":
            return Continual(**common)
        case "single_rollout":
            soft = config.exclusion == "soft"
            return SingleRollout(**common, floor=config.msft.floor if soft else 0.0)
        case "ies":
            return Ies(**common, settings=config.ies)
        case "dynamix":
            common["sub_datasets"] = sizes
            examples = config.dynamix.examples or train.micro_batch_size
            return Dynamix(**common, settings=config.dynamix, examples=examples)
        case "online":
            common["sub_datasets"] = sizes
            return Online(**common, settings=settings)
    return Msft(**common, settings=settings)
