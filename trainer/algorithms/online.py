"""One pass: a sub-dataset whose peak has passed leaves the mixture, and training goes on.

The idea of MSFT (arXiv 2603.21606) without its stages. Optimizer, schedule and steps are those of
plain SFT with the same compute budget. The examples of a sub-dataset that left are replaced by
those of the others, so a run takes no more steps than SFT. It ends early when all have left.

Peaks are found by the robust rule (``smoothing``, ``margin`` and ``patience`` of ``msft``). With
``exclusion: soft`` a sub-dataset that left keeps the share ``floor``; with ``return_margin`` it
comes back if it is forgotten. With ``rollback_margin`` the run goes back to the peak if the overall
metric there was better by that many standard errors; the steps since then are not trained again.

Example::

    strategy = Online(sub_datasets={"arith": 900, "dates": 80}, mode="min", compute_budget=10.0)
    stage = strategy.first_stage()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trainer.algorithms.base import Continue, Decision, Evaluation, Needs, Stage, measured
from trainer.algorithms.exclusion import Exclusions
from trainer.algorithms.method import Method
from trainer.algorithms.peaks import Champion, robust_rule
from trainer.config.schema import OVERALL, MsftConfig


@dataclass(kw_only=True, eq=False)
class Online(Method):
    """Exclude each sub-dataset once its peak has passed, without a new stage."""

    sub_datasets: Mapping[str, float]
    """Sub-dataset → its examples in an epoch, in any unit common to all."""
    settings: MsftConfig = field(default_factory=MsftConfig)
    """The section ``msft`` of the configuration; its compute budget has no effect here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule = robust_rule(self.settings)
        self._excluded = Exclusions(settings=self.settings)
        self._since = dict.fromkeys(self.stage.active, 0)
        self._epoch_examples = self._count(self.stage)

    def own_needs(self) -> Needs:
        """Return the best overall, and the champions if the run may roll back."""
        if self.is_over or self.settings.rollback_margin is None:
            return Needs(newest=self.best is None)
        places = (self._find_peak(name) for name in self.stage.active)
        names = (self.evaluations[place].checkpoint for place in places if place is not None)
        return Needs(checkpoints=tuple(dict.fromkeys(names)), newest=True)

    def decide(self, evaluation: Evaluation) -> Decision:
        """Stop at the end of the budget; else exclude whose peak has passed."""
        if evaluation.last:
            return self.stop(why="the compute budget is used up")
        peaks = {name: self._find_peak(name) for name in self.stage.active}
        passed = {
            name: place
            for name, place in peaks.items()
            if place is not None and self._has_passed(place, evaluation.index)
        }
        back = self._excluded.find_forgotten(measured(evaluation.metrics, evaluation.carried))
        if not passed and not back:
            return Continue(reason="within the compute budget; no further peak has passed")
        why = self._exclude(passed)
        for name in back:
            self._excluded.remove(name)
            self._since[name] = evaluation.index
            why.append(f"{name} is forgotten and comes back")
        reason = "; ".join(why)
        active = tuple(sorted({*self.stage.active, *back} - passed.keys()))
        if not active:
            reason += "; no sub-dataset is left"
            return self.stop(why=reason, exclude=tuple(sorted(passed)))
        stage = replace(self.stage, active=active, shares=self._excluded.shares())
        first = min(passed.values(), default=evaluation.index)
        if self._is_worse(evaluation, self.evaluations[first]):
            return self._roll_back_to(self.evaluations[first], evaluation, stage, reason)
        return self.change(stage, reason=reason)

    def _find_peak(self, name: str) -> int | None:
        """Return the index of a sub-dataset's peak since it was last included."""
        since = self._since[name]
        curve = self.evaluations[since:]
        values = [one.metrics[name] for one in curve]
        errors = [one.errors.get(name, math.nan) for one in curve]
        place = self.rule.peak(values, errors, self.modes.get(name, self.mode))
        return None if place is None else since + place

    def _has_passed(self, place: int, last: int) -> bool:
        is_restart = place == 0 and self.stage.number > 1
        return not is_restart and self.rule.has_passed(place, last)

    def _exclude(self, passed: Mapping[str, int]) -> list[str]:
        """Exclude sub-datasets at their peaks; return the reasons."""
        why = []
        for name, place in sorted(passed.items(), key=lambda one: (one[1], one[0])):
            peak = self.evaluations[place]
            champion = Champion(
                value=peak.metrics[name],
                error=peak.errors.get(name, math.nan),
                mode=self.modes.get(name, self.mode),
            )
            self._excluded.add(name, champion)
            why.append(f"{name} peaked at epoch {peak.epoch:.4g}")
        return why

    def _is_worse(self, now: Evaluation, peak: Evaluation) -> bool:
        """Return True if the overall metric is worse than at a peak by the margin."""
        margin, found = self.settings.rollback_margin, peak.metrics[OVERALL]
        if margin is None or peak.index == now.index or peak.carried or now.carried:
            return False
        errors = [error for error in peak.errors.values() if math.isfinite(error)]
        # The error of a mean over sub-datasets, of which each is measured by itself.
        error = math.hypot(*errors) / max(1, len(errors))
        champion = Champion(value=found, error=error, mode=self.mode)
        return champion.is_forgotten(now.metrics[OVERALL], margin)

    def _roll_back_to(
        self, peak: Evaluation, now: Evaluation, stage: Stage, reason: str
    ) -> Decision:
        """Begin a stage from a peak, with the steps that the budget has left."""
        examples = self._count(stage)
        epochs = (self.stage.epochs - now.epoch) * self._epoch_examples / examples
        self._epoch_examples = examples
        self._since = dict.fromkeys(self._since, 0)
        reason += f"; the overall metric was better at epoch {peak.epoch:.4g}, so back to it"
        return self.roll_back(
            peak, replace(stage, number=stage.number + 1, epochs=epochs), reason=reason
        )

    def _count(self, stage: Stage) -> float:
        """Return the examples of an epoch of a stage."""
        return math.fsum(self.sub_datasets[n] * stage.shares.get(n, 1.0) for n in stage.trained)
