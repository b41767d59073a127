"""Averages of checkpoints: the latest k (LAWA), and a greedy soup.

LAWA (Kaddour, arXiv 2209.14981): the mean of the last k checkpoints of a run is often better than
the last one. Greedy soup (Wortsman et al., arXiv 2203.05482, section 2): take checkpoints from the
best to the worst, and keep each in the mean only if the validation metric gets no worse.

Checkpoints are read in parts of at most 4 MiB, side by side: memory is that of the model and of a
few parts per checkpoint, whatever the size and the number of them. No mean is saved, because a soup
tries many; ``Store.average`` saves one.

Run it: ``python examples/rollback/averaging.py``
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

import task
import torch

from msft_store import Checkpoint, KeepLast, MismatchError, Store, Timeline


def average_into(model: torch.nn.Module, store: Store, checkpoints: Sequence[Checkpoint]) -> None:
    """Give a model the mean of checkpoints, computed in float32; integers are those of the last.

    :class:`MismatchError` if they do not have the same tensors in the same parts.
    """
    state = model.state_dict()
    streams = [store.chunks(checkpoint) for checkpoint in checkpoints]
    with torch.no_grad():
        for parts in zip(*streams, strict=True):
            name, start, last = parts[-1]
            if any((n, at, p.shape) != (name, start, last.shape) for n, at, p in parts):
                raise MismatchError(f"the checkpoints differ at {name!r}; average those of one run")
            if last.is_floating_point():
                total = torch.zeros(last.shape, dtype=torch.float32)
                for _, _, part in parts:
                    total += part.float()
                last = total / len(parts)
            target = state[name].view(-1)[start : start + last.numel()]
            target.copy_(last)


def lawa(store: Store, timeline: Timeline, model: torch.nn.Module, k: int) -> None:
    """Give a model the mean of the timeline's newest ``k`` checkpoints."""
    average_into(model, store, timeline.checkpoints()[-k:])


def greedy_soup(
    store: Store,
    checkpoints: Sequence[Checkpoint],
    model: torch.nn.Module,
    evaluate: Callable[[torch.nn.Module], float],
) -> list[Checkpoint]:
    """Give a model the greedy soup of checkpoints, lower being better; return what is in it."""
    ranked = sorted(checkpoints, key=lambda checkpoint: checkpoint.metrics["overall"])
    chosen, best = ranked[:1], ranked[0].metrics["overall"]
    for candidate in ranked[1:]:
        average_into(model, store, [*chosen, candidate])
        if (loss := evaluate(model)) <= best:
            chosen, best = [*chosen, candidate], loss
    average_into(model, store, chosen)
    return chosen


def train(store: Store, *, tasks: tuple[str, ...], lr: float, commits: int, every: int) -> Timeline:
    """Train and commit; all checkpoints stay."""
    model = task.load_model()
    optimizer = task.make_optimizer(model, lr)
    timeline = Timeline(store, store.add_base(task.BASE), retention=KeepLast(commits))
    for number in range(commits):
        for step in range(number * every, (number + 1) * every):
            task.train_step(model, optimizer, task.batch(step, tasks=tasks))
        timeline.commit(model, (number + 1) * every, task.evaluate_all(model, tasks))
    return timeline


def main() -> None:
    """Average checkpoints of a run that no longer learns much, so that single ones are noisy."""
    tasks = ("entity", "status")
    with tempfile.TemporaryDirectory() as folder:
        store, model = Store.create(folder), task.load_model()
        timeline = train(store, tasks=tasks, lr=2e-5, commits=14, every=10)
        for checkpoint in timeline.checkpoints():
            print(f"step {checkpoint.step:>2}: {checkpoint.metrics['overall']:.3f}")
        lawa(store, timeline, model, 4)
        print(f"mean of the last 4: {task.evaluate_all(model, tasks)['overall']:.3f}")
        soup = greedy_soup(
            store, timeline.checkpoints(), model, lambda m: task.evaluate_all(m, tasks)["overall"]
        )
        steps = ", ".join(str(checkpoint.step) for checkpoint in soup)
        print(f"greedy soup of steps {steps}: {task.evaluate_all(model, tasks)['overall']:.3f}")


if __name__ == "__main__":
    main()
