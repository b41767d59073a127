"""Divergence: find numbers that are not finite, then skip the batches or stop the run.

A deterministic run that rolls back and repeats its steps diverges again. So it rolls back to the
last evaluation and skips the batches since then (as PaLM did, arXiv 2204.02311, section 5.1). After
``max_skips`` skips the run stops with the best checkpoint so far.

Example::

    first_non_finite({"training loss": loss, "gradient norm": norm})      # None if all are finite
    strategy = DivergenceHandler(Msft(...), max_skips=3)
    strategy.on_divergence(Divergence(...))         # Skip(...), after the third one Stop(...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import SupportsFloat

from trainer.algorithms.base import (
    Adjustment,
    Decision,
    Divergence,
    Evaluation,
    Mode,
    Needs,
    Observation,
    RollBack,
    Skip,
    Stage,
    Stop,
)
from trainer.algorithms.method import Method


class DivergenceHandler:
    """A strategy that adds divergence handling to a method.

    Args:
        method: A method that has seen no evaluation.
        max_skips: Times that the whole run may skip batches; 0 to stop at once.
    """

    def __init__(self, method: Method, *, max_skips: int) -> None:
        """Start a run; see the class."""
        self.mode: Mode = method.mode
        self._method = method
        self._max_skips = max_skips
        self._skips = 0
        self._last: Evaluation | None = None
        self._is_leaving = self._is_over = False

    def first_stage(self) -> Stage:
        """Return the method's first stage."""
        return self._method.first_stage()

    def needs(self) -> Needs:
        """Return the method's needs, and the newest checkpoint while a roll-back may need it."""
        needs = self._method.needs()
        # After a roll-back its target is the root, which is kept; nothing newer can be needed.
        may_skip = self._skips < self._max_skips and not (self._is_leaving or self._is_over)
        return replace(needs, newest=True) if may_skip else needs

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Return the method's decision."""
        self._last = evaluation
        decision = self._method.on_evaluation(evaluation)
        self._is_leaving = isinstance(decision, RollBack)
        self._is_over = isinstance(decision, Stop)
        return decision

    def on_observation(self, observation: Observation) -> Adjustment:
        """Return the method's adjustment."""
        return self._method.on_observation(observation)

    def on_divergence(self, divergence: Divergence) -> Skip | Stop:
        """Skip the batches since the last evaluation, or stop if no skips are left."""
        last = self._last
        if last is None:
            raise ValueError("nothing was evaluated, so there is nothing to go back to")
        why = f"training diverged: the {divergence.what} is {divergence.value}"
        if self._skips >= self._max_skips:
            self._is_over = True
            if self._max_skips:
                why += f", after going back {self._skips} times already"
            return self._method.end(why=why)
        self._skips += 1
        return Skip(
            checkpoint=last.checkpoint,
            reason=f"{why}; back to epoch {last.epoch:.4g} without the "
            f"{divergence.step - last.step} batches since then, "
            f"number {self._skips} of at most {self._max_skips}",
        )


@dataclass(frozen=True, kw_only=True)
class NonFiniteNumber:
    """A number that is not finite."""

    what: str
    """The quantity."""
    value: str
    """``nan``, ``inf`` or ``-inf``."""


def first_non_finite(numbers: Mapping[str, SupportsFloat | None]) -> NonFiniteNumber | None:
    """Return the first number that is not finite; ``None`` counts as finite."""
    for what, number in numbers.items():
        value = 0.0 if number is None else float(number)
        if not math.isfinite(value):
            return NonFiniteNumber(what=what, value=str(value))
    return None


def all_non_finite(losses: Mapping[str, float]) -> NonFiniteNumber | None:
    """Return a number that is not finite if the losses of all sub-datasets are so.

    Single losses that are not finite may be due to the examples; if all are, the weights are
    unusable.
    """
    if any(math.isfinite(loss) for loss in losses.values()):
        return None
    return first_non_finite({"validation loss of every sub-dataset": next(iter(losses.values()))})


def non_finite_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics that are not finite, sorted."""
    return sorted(name for name, value in metrics.items() if not math.isfinite(value))
