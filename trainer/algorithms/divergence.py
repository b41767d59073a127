"""Numbers that are not finite, where training and evaluation find them.

Example::

    finding = not_finite({"training loss": loss, "gradient norm": norm})

What a method does when training diverges: stop with the best so far, or go back and skip.

A deterministic run that goes back and repeats its steps diverges again. So it goes back to the last
evaluation, which was sound, and leaves out the batches since then (as was done for PaLM, arXiv
2204.02311). Where that does not help a few times, the run stops.

Like the methods that it guards, this decides from what it is told and nothing else.

Example::

    strategy = DivergenceHandler(Msft(...), max_skips=3)
    strategy.on_divergence(Divergence(...))         # Skip(...), after the third one Stop(...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, SupportsFloat

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


class Method(Protocol):
    """A training method that knows nothing of divergence."""

    mode: Mode

    def first_stage(self) -> Stage:
        """Return what the run begins with."""

    def needs(self) -> Needs:
        """Return what must be kept now."""

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Decide what follows an evaluation."""

    def on_observation(self, observation: Observation) -> Adjustment:
        """Decide how a stage that is observed goes on."""

    def end(self, *, why: str) -> Stop:
        """Stop where an evaluation of the stage has been decided on, with the best so far."""


class DivergenceHandler:
    """A method, and what to do when training diverges."""

    def __init__(self, method: Method, *, max_skips: int) -> None:
        """Guard a fresh ``method``; it goes back at most ``max_skips`` times in the whole run."""
        self.mode: Mode = method.mode
        self._method = method
        self._max_skips = max_skips
        self._skips = 0
        self._last: Evaluation | None = None
        self._is_leaving = self._is_over = False

    def first_stage(self) -> Stage:
        """Return the method's."""
        return self._method.first_stage()

    def needs(self) -> Needs:
        """Return what the method needs, and the last evaluation while it may be gone back to."""
        needs = self._method.needs()
        # A roll-back's target is kept as the root; what came after it is of no use.
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
        """Skip, or stop where the run may not skip (any more)."""
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
    """Whose number it is."""
    value: str
    """``nan``, ``inf`` or ``-inf``."""


def not_finite(numbers: Mapping[str, SupportsFloat | None]) -> NonFiniteNumber | None:
    """Return the first number that is not finite, by what it is called; ``None`` counts as one."""
    for what, number in numbers.items():
        value = 0.0 if number is None else float(number)
        if not math.isfinite(value):
            return NonFiniteNumber(what=what, value=str(value))
    return None


def ruined(losses: Mapping[str, float]) -> NonFiniteNumber | None:
    """Say whether weights that have these losses on the sub-datasets are of no use at all.

    A loss that is not finite here or there may lie in the examples; if all are so, it is the
    weights.
    """
    if any(math.isfinite(loss) for loss in losses.values()):
        return None
    return not_finite({"validation loss of every sub-dataset": next(iter(losses.values()))})


def names_not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of metrics that can never be a best one, sorted."""
    return sorted(name for name, value in metrics.items() if not math.isfinite(value))
