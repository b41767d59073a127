"""MSFT: train on the mixture, roll back to the earliest peak, exclude its sub-dataset, repeat.

After "MSFT" (arXiv 2603.21606, section 3) and its released code. A stage trains on the active
sub-datasets for the compute budget C. Then it excludes the sub-dataset whose first best evaluation
is the earliest, and the next stage begins from that checkpoint. If the earliest best evaluation is
the last one, no sub-dataset peaked: the next stage begins from the end and excludes none. The run
ends when every sub-dataset is excluded or after ``max_stages`` stages. Its result is the first best
overall checkpoint of the whole run.

``docs/ALGORITHMS.md`` describes the options that are not in the paper. A sub-dataset whose peak has
not passed under a robust rule has not peaked. If several are excluded at once, the next stage
begins at the first of their peaks, so that none was trained on beyond its own. An excluded
sub-dataset that is forgotten may come back, and a stage may begin from an average around the peak.

Example::

    strategy = Msft(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
    stage = strategy.first_stage()
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trainer.algorithms.averages import window_around
from trainer.algorithms.base import Continue, Decision, Evaluation, Needs, Stage, measured
from trainer.algorithms.exclusion import Exclusions
from trainer.algorithms.method import Method
from trainer.algorithms.peaks import (
    Champion,
    PeakRule,
    champions,
    first_best_index,
    is_better,
    peak_rule,
)
from trainer.config.schema import OVERALL, MsftConfig


@dataclass(frozen=True, kw_only=True)
class _StageEnd:
    """The end of a stage: where the next one begins, who is excluded there, and why."""

    target: Evaluation
    exclude: tuple[str, ...]
    why: str


@dataclass(kw_only=True, eq=False)
class Msft(Method):
    """Roll back to the earliest peak and exclude its sub-dataset (arXiv 2603.21606, section 3)."""

    settings: MsftConfig = field(default_factory=MsftConfig)
    """The section ``msft`` of the configuration; its compute budget has no effect here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_stages = self.settings.max_stages or 2 * len(self.sub_datasets)
        self.rule = peak_rule(self.settings)
        self._excluded = Exclusions(settings=self.settings)
        self._end: _StageEnd | None = None

    def own_needs(self) -> Needs:
        """Return the active sub-datasets' champions and the best overall."""
        if self.is_over:
            return Needs()
        around = self.settings.rollback_average
        if self.rule == PeakRule() and around == 1:
            return Needs(
                champions=self.stage.active,
                modes=self.modes,
                peak_window=self.settings.peak_window,
                newest=self.best is None,
            )
        # The store only knows the paper's rule. Under another one the newest checkpoint may become
        # a champion.
        found = [index for index, _ in self._champions()]
        places = [place for index in found for place in self._around(index)]
        if around > 1:
            places += range(max(0, len(self.evaluations) - around), len(self.evaluations))
        names = (self.evaluations[place].checkpoint for place in places)
        return Needs(checkpoints=tuple(dict.fromkeys(names)), newest=True)

    def decide(self, evaluation: Evaluation) -> Decision:
        """Continue until the budget is used up or a window has passed, then roll back."""
        found = self._champions()
        window, index = self.settings.peak_window, evaluation.index
        peaks = [one for one in found if self._may_peak(one[0])]
        passed = window is not None and peaks and index - peaks[0][0] >= window
        if evaluation.last or passed or self._is_stuck():
            return self._end_stage(evaluation, found)
        if not found:
            return Continue(reason="no active sub-dataset has a finite metric yet")
        index, name = found[0]
        at = self.evaluations[index].epoch
        return Continue(
            reason=f"within the budget; the earliest champion is {name}, at epoch {at:.4g}"
        )

    def decide_average(self, evaluation: Evaluation) -> Decision:
        """Begin the next stage from the average around a peak, unless the peak is better."""
        end = self._end
        if end is None:
            return super().decide_average(evaluation)
        self._end = None
        overall = evaluation.metrics[OVERALL]
        if is_better(end.target.metrics[OVERALL], overall, self.mode):
            why = f"{end.why}; the average around it is worse, {overall:.4g}"
            return self._begin_next_stage(end.target, exclude=end.exclude, why=why)
        why = f"{end.why}; the average around it is no worse, {overall:.4g}, and takes its place"
        return self._begin_next_stage(evaluation, exclude=end.exclude, why=why)

    def _champions(self) -> list[tuple[int, str]]:
        curves, errors, modes = {}, {}, {}
        for name in self.stage.active:
            curves[name] = [one.metrics[name] for one in self.evaluations]
            errors[name] = [one.errors.get(name, math.nan) for one in self.evaluations]
            modes[name] = self.modes.get(name, self.mode)
        return champions(curves, errors, modes, self.rule)

    def _around(self, index: int) -> range:
        return window_around(index, len(self.evaluations), self.settings.rollback_average)

    def _may_peak(self, index: int) -> bool:
        """Return False for the root of a later stage, if that is never a peak."""
        return index > 0 or self.stage.number == 1 or self.settings.root_peaks

    def _is_stuck(self) -> bool:
        """Return True if the overall has not beaten the stage's root for the overall window."""
        window = self.settings.overall_window
        overall = [one.metrics[OVERALL] for one in self.evaluations if not one.carried]
        if window is None or len(overall) <= window:
            return False
        return not first_best_index(overall, self.mode)

    def _end_stage(self, end: Evaluation, found: list[tuple[int, str]]) -> Decision:
        """Stop if no metric is finite; else roll back to the first peak, or to the end."""
        if not found:
            return self.stop(
                why="no active sub-dataset has a finite metric in this stage, so nobody peaked"
            )
        peaked = [
            (index, name)
            for index, name in found
            if self._may_peak(index) and self.rule.has_passed(index, end.index)
        ]
        if not peaked:
            why = f"nobody peaked before epoch {end.epoch:.4g}"
            if self._is_stuck():
                why += ", and the overall metric of no evaluation is better than the root's"
                return self.stop(why=why)
            return self._begin_next_stage(end, exclude=(), why=why)
        dropped = self._choose(peaked)
        index, first = dropped[0]
        target = self.evaluations[index]
        why = f"{first} peaked first, at epoch {target.epoch:.4g} of stage {end.stage}"
        if not end.last:
            age, window = end.index - index, self.settings.peak_window
            why += f", and was not beaten in {age} evaluations"
            if window is not None and age >= window:
                why += f" (peak window {window})"
        for later, name in dropped[1:]:
            why += f"; then {name}, at epoch {self.evaluations[later].epoch:.4g}"
        exclude = tuple(sorted(name for _, name in dropped))
        for place, name in dropped:
            self._excluded.add(name, self._champion(place, name))
        names = [self.evaluations[place].checkpoint for place in self._around(index)]
        if len(names) > 1:
            self._end = _StageEnd(target=target, exclude=exclude, why=why)
            why += f"; evaluate the average of {len(names)} checkpoints around it"
            return self.make_average(dict.fromkeys(names, 1.0), reason=why)
        return self._begin_next_stage(target, exclude=exclude, why=why)

    def _choose(self, peaked: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """Return the peaks whose sub-datasets are excluded, the earliest first."""
        ties = [one for one in peaked if one[0] == peaked[0][0]][: self.settings.drop_count]
        return max(ties, peaked[: self.settings.drop_passed], key=len)

    def _champion(self, index: int, name: str) -> Champion:
        peak = self.evaluations[index]
        error, mode = peak.errors.get(name, math.nan), self.modes.get(name, self.mode)
        return Champion(value=peak.metrics[name], error=error, mode=mode)

    def _begin_next_stage(
        self, target: Evaluation, *, exclude: tuple[str, ...], why: str
    ) -> Decision:
        """Roll back to the target, or stop if no sub-dataset or no stage is left."""
        number = self.stage.number
        forgotten = self._excluded.find_forgotten(measured(target.metrics, target.carried))
        back = [name for name in forgotten if name not in exclude]
        active = tuple(sorted({*self.stage.active, *back} - {*exclude}))
        if not active:
            why = f"{why}; every sub-dataset is excluded"
            return self.stop(why=why, exclude=exclude, otherwise=target)
        if number >= self.max_stages:
            why = f"{why}; stage {number} of at most {self.max_stages} is over"
            return self.stop(why=why, exclude=exclude, otherwise=target)
        for name in back:
            self._excluded.remove(name)
            why += f"; {name} is forgotten and comes back"
        stage = Stage(
            number=number + 1,
            active=active,
            epochs=self.compute_budget,
            shares=self._excluded.shares(),
        )
        return self.roll_back(target, stage, reason=why)
