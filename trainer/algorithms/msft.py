"""MSFT: train on the mixture, go back to the peak that came first, drop what peaked, repeat.

After "MSFT" (arXiv 2603.21606) and its released code. In a stage the active sub-datasets are
trained on for the compute budget C. Then the one whose first best evaluation is the earliest is
excluded, and the next stage begins from that checkpoint. Where even the earliest one is the last
evaluation, nobody peaked: the next stage begins from the end and nothing is excluded. The run is
over when every sub-dataset is excluded or ``max_stages`` stages are used up; its result is the
first best overall checkpoint of the whole run.

With a *peak window* W (not in the paper) a stage also ends once the earliest champion is W
evaluations old.

All state follows from the evaluations, so a fresh instance that is told the recorded ones again
stands where the first one stood, and has decided the same.

Example::

    strategy = Msft(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
    stage = strategy.first_stage()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainer.algorithms.best import BestOverall, check_order
from trainer.peaks import Champion, earliest_champion
from trainer.strategy import Continue, Decision, Evaluation, Mode, Needs, RollBack, Stage, Stop


class Msft:
    """The MSFT strategy."""

    def __init__(
        self,
        *,
        sub_datasets: Iterable[str],
        mode: Mode,
        compute_budget: float,
        peak_window: int | None = None,
        max_stages: int | None = None,
    ) -> None:
        """Begin a run over ``sub_datasets``.

        ``compute_budget`` is C, in epochs of the active mixture; ``peak_window`` is W, in
        evaluations; ``max_stages`` is twice the number of sub-datasets by default.
        """
        names = tuple(sorted(sub_datasets))
        if not names:
            raise ValueError("no sub-dataset to train on")
        if peak_window is not None and peak_window < 1:
            raise ValueError(f"peak_window is {peak_window}, it must be at least 1")
        self.mode: Mode = mode
        self.max_stages = 2 * len(names) if max_stages is None else max_stages
        self._peak_window = peak_window
        self._first = self._stage = Stage(number=1, active=names, epochs=compute_budget)
        self._seen: list[Evaluation] = []
        self._best = BestOverall(mode)
        self._over = False

    def first_stage(self) -> Stage:
        """Return the first roll-out, on the whole mixture."""
        return self._first

    def needs(self) -> Needs:
        """Return the active sub-datasets' champions and the best overall."""
        if self._over:
            return Needs()
        return Needs(
            champions=self._stage.active,
            peak_window=self._peak_window,
            newest=not self._best.found,
        )

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Continue within the budget; at its end, or with the peak window passed, go back."""
        check_order(evaluation, stage=self._stage, index=len(self._seen), over=self._over)
        self._seen.append(evaluation)
        self._best.add(evaluation)
        champion = _earliest(self._seen, self._stage.active, self.mode)
        if not evaluation.last and not self._window_passed(champion):
            return Continue(reason=self._describe(champion))
        return self._end_stage(champion)

    def end(self, *, why: str) -> Stop:
        """Stop after any evaluation of a stage, with the best overall so far."""
        if not self._seen:
            raise ValueError("nothing of this stage was evaluated, so it cannot end")
        return self._stop(target=self._seen[-1], exclude=(), why=why)

    def _window_passed(self, champion: Champion | None) -> bool:
        if self._peak_window is None or champion is None:
            return False
        return len(self._seen) - 1 - champion.index >= self._peak_window

    def _end_stage(self, champion: Champion | None) -> Decision:
        stage, end = self._stage, self._seen[-1]
        if champion is None:
            return self._stop(
                target=end,
                exclude=(),
                why="no active sub-dataset has a finite metric in this stage, so nobody peaked",
            )
        if champion.index == end.index:
            return self._next(
                target=end, exclude=(), why=f"nobody peaked before epoch {end.epoch:.4g}"
            )
        target = self._seen[champion.index]
        age = end.index - champion.index
        why = f"{champion.name} peaked first, at epoch {target.epoch:.4g} of stage {stage.number}"
        if not end.last:
            why += f", and was not beaten in {age} evaluations (peak window {self._peak_window})"
        return self._next(target=target, exclude=(champion.name,), why=why)

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
        self._stage = Stage(number=stage.number + 1, active=active, epochs=stage.epochs)
        self._seen = []
        return RollBack(
            checkpoint=target.checkpoint, exclude=exclude, stage=self._stage, reason=why
        )

    def _stop(self, *, target: Evaluation, exclude: tuple[str, ...], why: str) -> Stop:
        self._over = True
        result, words = self._best.result(otherwise=target)
        return Stop(checkpoint=result, exclude=exclude, reason=f"{why}; {words}")

    def _describe(self, champion: Champion | None) -> str:
        if champion is None:
            return "no active sub-dataset has a finite metric yet"
        at = self._seen[champion.index].epoch
        return f"within the budget; the earliest champion is {champion.name}, at epoch {at:.4g}"


def _earliest(seen: Sequence[Evaluation], active: Sequence[str], mode: Mode) -> Champion | None:
    curves = {name: [evaluation.metrics[name] for evaluation in seen] for name in active}
    return earliest_champion(curves, mode)
