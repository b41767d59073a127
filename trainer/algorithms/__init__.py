"""The training methods, by name: they decide, the loop acts.

Example::

    strategy = make_strategy(config)
"""

from __future__ import annotations

from trainer.algorithms.guarded import Guarded
from trainer.algorithms.msft import Msft
from trainer.algorithms.sft import Sft
from trainer.settings import Config
from trainer.strategy import Mode, Strategy

__all__ = ["Guarded", "Msft", "Sft", "make_strategy", "metric_mode"]


def metric_mode(config: Config) -> Mode:
    """Return the direction in which the configured metric improves."""
    return "min" if config.evaluation.metric == "loss" else "max"


def make_strategy(config: Config) -> Strategy:
    """Return a fresh strategy for ``config.method`` and ``train.on_divergence``."""
    max_skips = config.train.max_skips if config.train.on_divergence == "rollback" else 0
    return Guarded(_make_method(config), max_skips=max_skips)


def _make_method(config: Config) -> Msft | Sft:
    names = tuple(config.data.sub_datasets)
    mode = metric_mode(config)
    budget = config.msft.compute_budget
    if config.method == "sft":
        return Sft(sub_datasets=names, mode=mode, compute_budget=budget)
    return Msft(
        sub_datasets=names,
        mode=mode,
        compute_budget=budget,
        peak_window=config.msft.peak_window,
        max_stages=config.msft.max_stages,
    )
