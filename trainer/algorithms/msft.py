"""MSFT: train on the mixture, roll back to the earliest peak, exclude its sub-dataset, repeat.

After "MSFT" (arXiv 2603.21606, section 3) and its released code. A stage trains on the active
sub-datasets for the compute budget C. Then it excludes the sub-dataset whose first best evaluation
is the earliest, and the next stage begins from that checkpoint. If the earliest best evaluation is
the last one, no sub-dataset peaked: the next stage begins from the end and excludes none. The run
ends when every sub-dataset is excluded or after ``max_stages`` stages. Its result is the first best
overall checkpoint of the whole run.

``docs/ALGORITHMS.md`` describes the options that are not in the paper. A sub-dataset whose peak has
not passed under a robust rule has not peaked. If several are excluded at once, the next stage
begins at the first of their peaks, so that none was trained on beyond its own.

Example::

    strategy = Msft(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
    stage = strategy.first_stage()
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trainer.algorithms.base import Continue, Decision, Evaluation, Needs, Stage
from trainer.algorithms.method import Method
from trainer.algorithms.peaks import PeakRule, champions, peak_rule
from trainer.config.schema import MsftConfig


@dataclass(kw_only=True, eq=False)
class Msft(Method):
    """Roll back to the earliest peak and exclude its sub-dataset (arXiv 2603.21606, section 3)."""

    settings: MsftConfig = field(default_factory=MsftConfig)
    """The section ``msft`` of the configuration; its compute budget has no effect here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_stages = self.settings.max_stages or 2 * len(self.sub_datasets)
        self.rule = peak_rule(self.settings)

    def own_needs(self) -> Needs:
        """Return the active sub-datasets' champions and the best overall."""
        if self.is_over:
            return Needs()
        if self.rule == PeakRule():
            return Needs(
                champions=self.stage.active,
                modes=self.modes,
                peak_window=self.settings.peak_window,
                newest=self.best is None,
            )
        # The store only knows the paper's rule. Under another one the newest checkpoint may become
        # a champion.
        found = (self.evaluations[index].checkpoint for index, _ in self._champions())
        return Needs(checkpoints=tuple(dict.fromkeys(found)), newest=True)

    def decide(self, evaluation: Evaluation) -> Decision:
        """Continue until the budget is used up or the peak window has passed, then roll back."""
        found = self._champions()
        window = self.settings.peak_window
        passed = window is not None and found and evaluation.index - found[0][0] >= window
        if evaluation.last or passed:
            return self._end_stage(evaluation, found)
        if not found:
            return Continue(reason="no active sub-dataset has a finite metric yet")
        index, name = found[0]
        at = self.evaluations[index].epoch
        return Continue(
            reason=f"within the budget; the earliest champion is {name}, at epoch {at:.4g}"
        )

    def _champions(self) -> list[tuple[int, str]]:
        curves, errors, modes = {}, {}, {}
        for name in self.stage.active:
            curves[name] = [one.metrics[name] for one in self.evaluations]
            errors[name] = [one.errors.get(name, math.nan) for one in self.evaluations]
            modes[name] = self.modes.get(name, self.mode)
        return champions(curves, errors, modes, self.rule)

    def _end_stage(self, end: Evaluation, found: list[tuple[int, str]]) -> Decision:
        """Stop if no metric is finite; else roll back to the first peak, or to the end."""
        if not found:
            return self.stop(
                why="no active sub-dataset has a finite metric in this stage, so nobody peaked"
            )
        peaked = [one for one in found if self.rule.has_passed(one[0], end.index)]
        if not peaked:
            why = f"nobody peaked before epoch {end.epoch:.4g}"
            return self._begin_next_stage(end, exclude=(), why=why)
        dropped = peaked[: self.settings.drop_count]
        index, first = dropped[0]
        target = self.evaluations[index]
        why = f"{first} peaked first, at epoch {target.epoch:.4g} of stage {end.stage}"
        if not end.last:
            age, window = end.index - index, self.settings.peak_window
            why += f", and was not beaten in {age} evaluations (peak window {window})"
        for later, name in dropped[1:]:
            why += f"; then {name}, at epoch {self.evaluations[later].epoch:.4g}"
        exclude = tuple(sorted(name for _, name in dropped))
        return self._begin_next_stage(target, exclude=exclude, why=why)

    def _begin_next_stage(
        self, target: Evaluation, *, exclude: tuple[str, ...], why: str
    ) -> Decision:
        """Roll back to the target, or stop if no sub-dataset or no stage is left."""
        number = self.stage.number
        active = tuple(name for name in self.stage.active if name not in exclude)
        if not active:
            why = f"{why}; every sub-dataset is excluded"
            return self.stop(why=why, exclude=exclude, otherwise=target)
        if number >= self.max_stages:
            why = f"{why}; stage {number} of at most {self.max_stages} is over"
            return self.stop(why=why, exclude=exclude, otherwise=target)
        shares = {}
        if self.settings.exclusion == "soft":
            excluded = [name for name in self.first_stage().active if name not in active]
            shares = dict.fromkeys(excluded, self.settings.floor)
        epochs = self.compute_budget
        stage = Stage(number=number + 1, active=active, epochs=epochs, shares=shares)
        return self.roll_back(target, stage, reason=why)
