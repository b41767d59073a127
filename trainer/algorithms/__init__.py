"""Training methods by name: a strategy decides, the training loop acts.

Example::

    strategy = make_strategy(config, {"arith": 900, "dates": 80})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from trainer.algorithms.base import (
    Adjustment,
    Continue,
    Decision,
    Mode,
    RollBack,
    Skip,
    Stage,
    Stop,
    Strategy,
)
from trainer.algorithms.continual import Continual
from trainer.algorithms.divergence import DivergenceHandler
from trainer.algorithms.dynamix import Dynamix
from trainer.algorithms.ies import Ies
from trainer.algorithms.method import Method
from trainer.algorithms.msft import Msft
from trainer.algorithms.peaks import PeakRule
from trainer.algorithms.sft import Sft
from trainer.algorithms.single_rollout import SingleRollout
from trainer.config.schema import Config, MsftConfig

__all__ = [
    "Adjustment",
    "Continual",
    "Continue",
    "Decision",
    "DivergenceHandler",
    "Dynamix",
    "Ies",
    "Msft",
    "RollBack",
    "Sft",
    "SingleRollout",
    "Skip",
    "Stage",
    "Stop",
    "Strategy",
    "make_method",
    "make_strategy",
    "metric_mode",
    "peak_rule",
]


def metric_mode(config: Config) -> Mode:
    """Return the direction in which the configured metric improves."""
    return "min" if config.evaluation.metric == "loss" else "max"


def make_strategy(
    config: Config,
    sizes: Mapping[str, float],
    *,
    mode: Mode | None = None,
    modes: Mapping[str, Mode] | None = None,
) -> Strategy:
    """Create the strategy for ``config.method`` and ``train.on_divergence``.

    Args:
        config: The run's configuration.
        sizes: Sub-dataset → number of training examples, in any unit common to all.
        mode: The direction in which the overall metric improves; ``None``: that of
            ``evaluation.metric``.
        modes: The directions of sub-datasets' metrics that differ from it.

    Returns:
        A strategy that has seen no evaluation.
    """
    max_skips = config.train.max_skips if config.train.on_divergence == "rollback" else 0
    return DivergenceHandler(
        make_method(config, sizes, mode=mode, modes=modes), max_skips=max_skips
    )


def make_method(
    config: Config,
    sizes: Mapping[str, float],
    *,
    mode: Mode | None = None,
    modes: Mapping[str, Mode] | None = None,
) -> Method:
    """Create the strategy for ``config.method``, without divergence handling."""
    names = tuple(config.data.sub_datasets)
    mode = mode or metric_mode(config)
    budget = config.msft.compute_budget
    match config.method:
        case "sft":
            return Sft(sub_datasets=names, mode=mode, compute_budget=budget)
        case "continual":
            return Continual(sub_datasets=names, mode=mode, compute_budget=budget)
        case "single_rollout":
            return SingleRollout(sub_datasets=names, mode=mode, modes=modes, compute_budget=budget)
        case "ies":
            return Ies(sub_datasets=names, mode=mode, compute_budget=budget, **asdict(config.ies))
        case "dynamix":
            examples = config.dynamix.examples or config.train.micro_batch_size
            settings = {**asdict(config.dynamix), "examples": examples}
            return Dynamix(sub_datasets=sizes, mode=mode, compute_budget=budget, **settings)
    return Msft(
        sub_datasets=names,
        mode=mode,
        modes=modes,
        compute_budget=budget,
        peak_window=config.msft.peak_window,
        max_stages=config.msft.max_stages,
        rule=peak_rule(config.msft),
        drop_count=config.msft.drop_count,
        floor=config.msft.floor if config.msft.exclusion == "soft" else None,
    )


def peak_rule(config: MsftConfig) -> PeakRule:
    """Return the rule that finds peaks."""
    if config.peaks == "first_best":
        return PeakRule()
    return PeakRule(smoothing=config.smoothing, margin=config.margin, patience=config.patience)
