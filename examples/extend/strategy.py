"""Add a training method: plain fine-tuning that stops early, with the best checkpoint.

Run ``python examples/extend/strategy.py``; for a method of ``msft-train`` see ``CONTRIBUTING.md``.
"""

from __future__ import annotations

from trainer.algorithms.base import Continue, Decision, Evaluation, Mode, Needs, Stage, Stop
from trainer.algorithms.common import Unobserved
from trainer.config.schema import OVERALL


class EarlyStopping(Unobserved):
    """Stop once the overall metric has not improved for ``patience`` evaluations."""

    mode: Mode = "max"

    def __init__(self, sub_datasets: list[str], *, compute_budget: float, patience: int) -> None:
        """Take settings; a strategy has no access to a model, a device or a file."""
        self._stage = Stage(number=1, active=tuple(sorted(sub_datasets)), epochs=compute_budget)
        self._patience = patience
        self._best: Evaluation | None = None

    def first_stage(self) -> Stage:
        """Return the stage that the run begins with."""
        return self._stage

    def needs(self) -> Needs:
        """Return the checkpoints that must be kept: the best by the overall metric."""
        return Needs(best=(OVERALL,))

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Return the decision, which depends on nothing but the evaluations so far."""
        if self._best is None or evaluation.metrics[OVERALL] > self._best.metrics[OVERALL]:
            self._best = evaluation
        waited = evaluation.index - self._best.index
        if evaluation.last or waited >= self._patience:
            return self.end(why=f"no improvement for {waited} evaluations")
        return Continue(reason=f"no improvement for {waited} of {self._patience} evaluations")

    def end(self, *, why: str) -> Stop:
        """Stop with the best checkpoint so far; also called when training diverges."""
        if self._best is None:
            raise ValueError("nothing was evaluated, so there is no result")
        return Stop(checkpoint=self._best.checkpoint, reason=why)


def main() -> None:
    """Decide on a recorded curve."""
    strategy = EarlyStopping(["arith", "dates"], compute_budget=3.0, patience=2)
    for index, overall in enumerate([0.10, 0.40, 0.35, 0.38]):
        point = {"stage": 1, "index": index, "epoch": index / 2, "step": index, "last": False}
        metrics, name = {OVERALL: overall}, f"1.{index}"
        decision = strategy.on_evaluation(Evaluation(**point, checkpoint=name, metrics=metrics))
        print(f"epoch {index / 2}: {decision}")


if __name__ == "__main__":
    main()
