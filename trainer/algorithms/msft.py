"""MSFT: train on the mixture, roll back to the earliest peak, exclude its sub-dataset, repeat.

After "MSFT" (arXiv 2603.21606, section 3) and its released code. A stage trains on the active
sub-datasets for the compute budget C. Then it excludes the sub-dataset whose first best evaluation
is the earliest, and the next stage begins from that checkpoint. If the earliest best evaluation is
the last one, no sub-dataset peaked: the next stage begins from the end and excludes none. The run
ends when every sub-dataset is excluded or after ``max_stages`` stages. Its result is the first best
overall checkpoint of the whole run.

Options that are not in the paper, off by default:

- With a *peak window* W a stage also ends once the earliest champion is W evaluations old.
- A :class:`PeakRule` with smoothing, margin or patience is robust to noise. A sub-dataset whose
  peak has not passed under the rule has not peaked.
- With a *drop count* k up to k sub-datasets whose peaks have passed are excluded at once, in the
  order of their peaks. The next stage begins at the first of these peaks, so that none was
  trained on beyond its own.
- With a *floor* each epoch still has that share of an excluded sub-dataset's examples.

Example::

    strategy = Msft(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
    stage = strategy.first_stage()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from trainer.algorithms.base import Continue, Decision, Evaluation, Mode, Needs, Stage
from trainer.algorithms.method import Method
from trainer.algorithms.peaks import Champion, PeakRule, champions


class Msft(Method):
    """Roll back to the earliest peak and exclude its sub-dataset (arXiv 2603.21606, section 3).

    Args:
        sub_datasets: The sub-datasets of the mixture.
        mode: The direction in which the overall metric improves.
        modes: The directions of sub-datasets' metrics that differ from it.
        compute_budget: C, epochs of the active mixture in one stage.
        peak_window: W, evaluations after which an unbeaten champion ends the stage, if any.
        max_stages: Stages at most; ``None``: twice the number of sub-datasets.
        rule: The rule that finds peaks; ``None``: the paper's, the first best value.
        drop_count: Sub-datasets that one stage excludes at most.
        floor: Share of an excluded sub-dataset's examples in an epoch; ``None``: no examples.

    Raises:
        ValueError: If there is no sub-dataset, or ``peak_window`` is below 1.
    """

    def __init__(
        self,
        *,
        sub_datasets: Iterable[str],
        mode: Mode,
        modes: Mapping[str, Mode] | None = None,
        compute_budget: float,
        peak_window: int | None = None,
        max_stages: int | None = None,
        rule: PeakRule | None = None,
        drop_count: int = 1,
        floor: float | None = None,
    ) -> None:
        """Start a run; see the class."""
        names = tuple(sorted(sub_datasets))
        super().__init__(Stage(number=1, active=names, epochs=compute_budget), mode, modes)
        if peak_window is not None and peak_window < 1:
            raise ValueError(f"peak_window is {peak_window}, it must be at least 1")
        self.max_stages = 2 * len(names) if max_stages is None else max_stages
        self._peak_window = peak_window
        self._rule = rule or PeakRule()
        self._drop_count = drop_count
        self._floor = floor

    def needs(self) -> Needs:
        """Return the active sub-datasets' champions and the best overall."""
        if self.is_over:
            return Needs()
        if self._rule == PeakRule():
            return Needs(
                champions=self.stage.active,
                modes=self.modes,
                peak_window=self._peak_window,
                newest=self.best is None,
            )
        # The store only knows the paper's rule. Under another one the newest checkpoint may become
        # a champion.
        found = (self.evaluations[champion.index].checkpoint for champion in self._champions())
        return Needs(checkpoints=tuple(dict.fromkeys(found)), newest=True)

    def decide(self, evaluation: Evaluation) -> Decision:
        """Continue until the budget is used up or the peak window has passed, then roll back."""
        found = self._champions()
        first = found[0] if found else None
        passed = (
            self._peak_window is not None
            and first is not None
            and evaluation.index - first.index >= self._peak_window
        )
        if evaluation.last or passed:
            return self._end_stage(evaluation, found)
        if first is None:
            return Continue(reason="no active sub-dataset has a finite metric yet")
        at = self.evaluations[first.index].epoch
        return Continue(
            reason=f"within the budget; the earliest champion is {first.name}, at epoch {at:.4g}"
        )

    def _champions(self) -> list[Champion]:
        curves, errors, modes = {}, {}, {}
        for name in self.stage.active:
            curves[name] = [one.metrics[name] for one in self.evaluations]
            errors[name] = [one.errors.get(name, math.nan) for one in self.evaluations]
            modes[name] = self.modes.get(name, self.mode)
        return champions(curves, errors, modes, self._rule)

    def _end_stage(self, end: Evaluation, found: list[Champion]) -> Decision:
        """Stop if no metric is finite; else roll back to the first peak, or to the end."""
        if not found:
            return self.stop(
                end, why="no active sub-dataset has a finite metric in this stage, so nobody peaked"
            )
        peaked = [one for one in found if self._rule.has_passed(one.index, end.index)]
        if not peaked:
            why = f"nobody peaked before epoch {end.epoch:.4g}"
            return self._begin_next_stage(end, exclude=(), why=why)
        first, *others = peaked[: self._drop_count]
        target = self.evaluations[first.index]
        why = f"{first.name} peaked first, at epoch {target.epoch:.4g} of stage {end.stage}"
        if not end.last:
            age = end.index - first.index
            why += f", and was not beaten in {age} evaluations (peak window {self._peak_window})"
        for other in others:
            why += f"; then {other.name}, at epoch {self.evaluations[other.index].epoch:.4g}"
        exclude = tuple(sorted(one.name for one in (first, *others)))
        return self._begin_next_stage(target, exclude=exclude, why=why)

    def _begin_next_stage(
        self, target: Evaluation, *, exclude: tuple[str, ...], why: str
    ) -> Decision:
        """Roll back to the target, or stop if no sub-dataset or no stage is left."""
        number = self.stage.number
        active = tuple(name for name in self.stage.active if name not in exclude)
        if not active:
            return self.stop(target, exclude=exclude, why=f"{why}; every sub-dataset is excluded")
        if number >= self.max_stages:
            why = f"{why}; stage {number} of at most {self.max_stages} is over"
            return self.stop(target, exclude=exclude, why=why)
        excluded = [name for name in self.first_stage().active if name not in active]
        shares = {} if self._floor is None else dict.fromkeys(excluded, self._floor)
        epochs = self.stage.epochs
        stage = Stage(number=number + 1, active=active, epochs=epochs, shares=shares)
        return self.roll_back(target, stage, reason=why)
