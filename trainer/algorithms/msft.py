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
from collections.abc import Iterable

from trainer.algorithms.base import (
    Continue,
    Decision,
    Evaluation,
    Mode,
    Needs,
    RollBack,
    Stage,
    Stop,
)
from trainer.algorithms.common import BestOverall, Unobserved, check_order
from trainer.algorithms.peaks import Champion, PeakRule, champions


class Msft(Unobserved):
    """Roll back to the earliest peak and exclude its sub-dataset (arXiv 2603.21606, section 3).

    Args:
        sub_datasets: The sub-datasets of the mixture.
        mode: The direction in which the metric improves.
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
        compute_budget: float,
        peak_window: int | None = None,
        max_stages: int | None = None,
        rule: PeakRule | None = None,
        drop_count: int = 1,
        floor: float | None = None,
    ) -> None:
        """Start a run; see the class."""
        names = tuple(sorted(sub_datasets))
        if not names:
            raise ValueError("no sub-dataset to train on")
        if peak_window is not None and peak_window < 1:
            raise ValueError(f"peak_window is {peak_window}, it must be at least 1")
        self.mode: Mode = mode
        self.max_stages = 2 * len(names) if max_stages is None else max_stages
        self._peak_window = peak_window
        self._rule = rule or PeakRule()
        self._drop_count = drop_count
        self._floor = floor
        self._names = names
        self._first = self._stage = Stage(number=1, active=names, epochs=compute_budget)
        self._seen: list[Evaluation] = []
        self._champions: list[Champion] = []
        self._best = BestOverall(mode)
        self._over = False

    def first_stage(self) -> Stage:
        """Return the first roll-out, on the whole mixture."""
        return self._first

    def needs(self) -> Needs:
        """Return the active sub-datasets' champions and the best overall."""
        if self._over:
            return Needs()
        if self._rule == PeakRule():
            return Needs(
                champions=self._stage.active,
                peak_window=self._peak_window,
                newest=not self._best.found,
            )
        # The store only knows the paper's rule. Under another one the newest may become a champion.
        held = dict.fromkeys(self._seen[champion.index].checkpoint for champion in self._champions)
        return Needs(checkpoints=tuple(held), newest=True)

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Continue until the budget is used up or the peak window has passed, then roll back."""
        check_order(evaluation, stage=self._stage, index=len(self._seen), over=self._over)
        self._seen.append(evaluation)
        self._best.add(evaluation)
        self._champions = self._find_champions()
        if not evaluation.last and not self._window_passed():
            return Continue(reason=self._describe())
        return self._end_stage()

    def end(self, *, why: str) -> Stop:
        """Stop after any evaluation of a stage, with the best overall so far."""
        if not self._seen:
            raise ValueError("nothing of this stage was evaluated, so it cannot end")
        return self._stop(target=self._seen[-1], exclude=(), why=why)

    def _find_champions(self) -> list[Champion]:
        curves, errors = {}, {}
        for name in self._stage.active:
            curves[name] = [evaluation.metrics[name] for evaluation in self._seen]
            errors[name] = [evaluation.errors.get(name, math.nan) for evaluation in self._seen]
        return champions(curves, errors, self.mode, self._rule)

    def _window_passed(self) -> bool:
        if self._peak_window is None or not self._champions:
            return False
        return len(self._seen) - 1 - self._champions[0].index >= self._peak_window

    def _end_stage(self) -> Decision:
        stage, end = self._stage, self._seen[-1]
        if not self._champions:
            return self._stop(
                target=end,
                exclude=(),
                why="no active sub-dataset has a finite metric in this stage, so nobody peaked",
            )
        peaked = [one for one in self._champions if self._rule.has_passed(one.index, end.index)]
        if not peaked:
            return self._next(
                target=end, exclude=(), why=f"nobody peaked before epoch {end.epoch:.4g}"
            )
        first, *others = peaked[: self._drop_count]
        target = self._seen[first.index]
        age = end.index - first.index
        why = f"{first.name} peaked first, at epoch {target.epoch:.4g} of stage {stage.number}"
        if not end.last:
            why += f", and was not beaten in {age} evaluations (peak window {self._peak_window})"
        for other in others:
            why += f"; then {other.name}, at epoch {self._seen[other.index].epoch:.4g}"
        exclude = tuple(sorted([first.name, *(other.name for other in others)]))
        return self._next(target=target, exclude=exclude, why=why)

    def _next(self, *, target: Evaluation, exclude: tuple[str, ...], why: str) -> Decision:
        stage = self._stage
        active = tuple(name for name in stage.active if name not in exclude)
        if not active:
            return self._stop(
                target=target, exclude=exclude, why=f"{why}; every sub-dataset is excluded"
            )
        if stage.number >= self.max_stages:
            why = f"{why}; stage {stage.number} of at most {self.max_stages} is over"
            return self._stop(target=target, exclude=exclude, why=why)
        excluded = [name for name in self._names if name not in active]
        self._stage = Stage(
            number=stage.number + 1,
            active=active,
            epochs=stage.epochs,
            shares={} if self._floor is None else dict.fromkeys(excluded, self._floor),
        )
        self._seen, self._champions = [], []
        return RollBack(
            checkpoint=target.checkpoint, exclude=exclude, stage=self._stage, reason=why
        )

    def _stop(self, *, target: Evaluation, exclude: tuple[str, ...], why: str) -> Stop:
        self._over = True
        result, words = self._best.result(otherwise=target)
        return Stop(checkpoint=result, exclude=exclude, reason=f"{why}; {words}")

    def _describe(self) -> str:
        if not self._champions:
            return "no active sub-dataset has a finite metric yet"
        first = self._champions[0]
        at = self._seen[first.index].epoch
        return f"within the budget; the earliest champion is {first.name}, at epoch {at:.4g}"
