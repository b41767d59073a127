"""Add a training method: plain fine-tuning that stops early, with the best checkpoint.

Run ``python examples/extend/strategy.py``; for a method of ``msft-train`` see ``CONTRIBUTING.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.algorithms.base import Continue, Decision, Evaluation
from trainer.algorithms.method import Method
from trainer.config.schema import OVERALL


@dataclass(kw_only=True, eq=False)
class EarlyStopping(Method):
    """Stop once the overall metric has not improved for ``patience`` evaluations.

    A strategy has settings, but no access to a model, a device or a file.
    """

    patience: int

    def decide(self, evaluation: Evaluation) -> Decision:
        """Return the decision, which depends on nothing but the evaluations so far."""
        waited = evaluation.index - (self.best.index if self.best else 0)
        if evaluation.last or waited >= self.patience:
            return self.stop(why=f"no improvement for {waited} evaluations")
        return Continue(reason=f"no improvement for {waited} of {self.patience} evaluations")


def main() -> None:
    """Decide on a recorded curve."""
    names = ["arith", "dates"]
    strategy = EarlyStopping(sub_datasets=names, mode="max", compute_budget=3.0, patience=2)
    for index, overall in enumerate([0.10, 0.40, 0.35, 0.38]):
        point = {"stage": 1, "index": index, "epoch": index / 2, "step": index, "last": False}
        metrics, name = {OVERALL: overall}, f"1.{index}"
        decision = strategy.on_evaluation(Evaluation(**point, checkpoint=name, metrics=metrics))
        print(f"epoch {index / 2}: {decision}")


if __name__ == "__main__":
    main()
