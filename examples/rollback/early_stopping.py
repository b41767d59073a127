"""Stop when no metric improves any more, and keep the best checkpoint of each metric.

Patience for every metric at once: the run ends when each of them has gone without a better value
for ``patience`` evaluations. Kept are each metric's best checkpoint and the best overall, which
cost a few percent of a full one each; the model ends as the best overall, and the best of each task
is there to be exported.

Run it: ``python examples/rollback/early_stopping.py``
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import task

from msft_store import Checkpoint, KeepBest, Policy, Store, Timeline


def train(
    store: Store,
    *,
    tasks: tuple[str, ...] = task.TASKS,
    lr: float = 1e-5,
    every: int = 10,
    patience: int = 2,
    most: int = 20,
    report: Callable[[str], None] = print,
) -> tuple[task.Any, dict[str, Checkpoint]]:
    """Train for at most ``most`` evaluations; return the model and the best checkpoint by metric.

    The model has the weights of the best overall.
    """
    model = task.load_model()
    optimizer = task.make_optimizer(model, lr)
    # Over all branches, because a roll-back to the best overall must not evict the others.
    policy: Policy = KeepBest("overall", mode="min")
    for name in tasks:
        policy = policy | KeepBest(name, mode="min")
    timeline = Timeline(store, store.add_base(task.BASE), retention=policy)
    best: dict[str, Checkpoint] = {}
    since: dict[str, int] = {}
    for number in range(most):
        metrics = task.evaluate_all(model, tasks)
        checkpoint = timeline.commit(model, step=number * every, metrics=metrics)
        for metric, value in metrics.items():
            better = metric not in best or value < best[metric].metrics[metric]
            best[metric] = checkpoint if better else best[metric]
            since[metric] = 0 if better else since[metric] + 1
        if min(since.values()) >= patience:
            report(
                f"nothing got better in {patience} evaluations; stopped at step {number * every}"
            )
            break
        for step in range(number * every, (number + 1) * every):
            task.train_step(model, optimizer, task.batch(step, tasks=tasks))
    timeline.rollback(best["overall"], into=model)
    for metric, checkpoint in best.items():
        report(f"best {metric:<8} {checkpoint.metrics[metric]:.3f} at step {checkpoint.step}")
        store.pin(checkpoint, f"best/{metric}")
    timeline.close()
    return model, best


def main() -> None:
    """Train two tasks that overfit, one of them sooner, and export its best."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(f"{folder}/store")
        _, best = train(store, tasks=("entity", "status"), lr=2e-5)
        store.export(best["entity"], f"{folder}/entity")
        stats = store.stats()
    print(f"{stats.checkpoints} checkpoints in {stats.stored_bytes} bytes,", end=" ")
    print(f"{stats.stored_bytes / best['overall'].logical_bytes:.2f} of one full checkpoint")


if __name__ == "__main__":
    main()
