"""Fork a branch for each task from one anchor, merge what helps the target, and fork again.

ForkMerge (Jiang et al., arXiv 2301.12618, section 4): from the anchor θ a branch trains on the
target task alone, and one on the target and each auxiliary task. The merged weights are
θ + Σ λk (θk - θ), with the λ that are best on the target's validation data. They are the next
anchor.

The branches are timelines of one store that go back to each new anchor; the main timeline holds the
anchors. What all of them have in common is there once.

Run it: ``python examples/rollback/fork_merge.py``
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import task
import torch

from msft_store import Checkpoint, KeepLast, Store, Timeline

GRID = (0.0, 0.5, 1.0)


def merge_into(
    model: torch.nn.Module,
    store: Store,
    anchor: Checkpoint,
    forks: Sequence[Checkpoint],
    shares: Sequence[float],
) -> None:
    """Give a model θ + Σ λk (θk - θ), computed in float32, part by part."""
    state = model.state_dict()
    streams = [store.chunks(checkpoint) for checkpoint in (anchor, *forks)]
    with torch.no_grad():
        for (name, start, first), *others in zip(*streams, strict=True):
            merged = first.to(torch.float32, copy=True)
            for (_, _, part), share in zip(others, shares, strict=True):
                merged += share * (part.float() - first.float())
            state[name].view(-1)[start : start + first.numel()].copy_(merged)


def search(
    model: Any, store: Store, anchor: Checkpoint, forks: list[Checkpoint], target: str
) -> tuple[float, tuple[float, ...]]:
    """Return the best validation loss on the target, and the λ that give it.

    The shares of the forks add up to one at most; all of nothing is the anchor itself.
    """
    found = []
    for shares in itertools.product(GRID, repeat=len(forks)):
        if sum(shares) <= 1:
            merge_into(model, store, anchor, forks, shares)
            found.append((task.evaluate(model, target), shares))
    return min(found)


def train(
    store: Store,
    target: str,
    auxiliary: tuple[str, ...],
    *,
    rounds: int = 3,
    steps: int = 6,
    lr: float = 2e-5,
    report: Callable[[str], None] = print,
) -> Checkpoint:
    """Fork and merge; return the last anchor."""
    model = task.load_model()
    main = Timeline(store, store.add_base(task.BASE), retention=KeepLast(1))
    anchor = main.commit(model, 0, {target: task.evaluate(model, target)})
    mixtures = {target: (target,), **{name: (target, name) for name in auxiliary}}
    branches = {
        name: Timeline(store, anchor, retention=KeepLast(1), name=name) for name in mixtures
    }
    for number in range(rounds):
        forks = []
        for name, tasks in mixtures.items():
            branches[name].rollback(anchor, into=model)
            optimizer = task.make_optimizer(model, lr)
            for step in range(number * steps, (number + 1) * steps):
                task.train_step(model, optimizer, task.batch(step, tasks=tasks))
            forks.append(branches[name].commit(model, (number + 1) * steps))
        loss, shares = search(model, store, anchor, forks, target)
        merge_into(model, store, anchor, forks, shares)
        anchor = main.commit(model, (number + 1) * steps, {target: loss}, {"shares": list(shares)})
        pairs = zip(mixtures, shares, strict=True)
        weights = ", ".join(f"{share:.1f} {name}" for name, share in pairs)
        report(f"round {number}: {target} {loss:.3f} with {weights}")
    for branch in branches.values():
        branch.close()
    return anchor


def main() -> None:
    """Learn roman numerals, with two other tasks that may help or not."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(folder)
        train(store, "roman", ("reversal", "status"))
        stats = store.stats()
    print(f"{stats.checkpoints} checkpoints in {stats.stored_bytes} bytes, ", end="")
    print(f"{stats.stored_bytes / stats.logical_bytes:.2f} of full copies")


if __name__ == "__main__":
    main()
