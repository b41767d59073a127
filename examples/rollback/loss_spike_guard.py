"""Go back when the loss or the gradients spike, and skip the batches that did it.

PaLM (arXiv 2204.02311, section 5.1): restart from a checkpoint about 100 steps before the spike,
and skip 200 to 500 batches, which are those around it. A spike here is a loss or a gradient norm
that is not finite, or above a multiple of the median of the last ones. After ``at_most`` roll-backs
the guard gives up and says so: then the batches are not to blame.

All that training depends on is in the checkpoint: weights, optimizer, generators, and the position
in the data. So what follows a roll-back is, bit for bit, a run that never met the skipped batches.

Run it: ``python examples/rollback/loss_spike_guard.py``
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import task
import torch

from msft_store import Checkpoint, KeepLast, Store, Timeline
from msft_store.integrations.training_state import (
    from_tensors,
    generators,
    set_generators,
    to_tensors,
)

FACTORS = {"loss": 2.0, "gradient norm": 5.0}


class LossSpikeError(RuntimeError):
    """There were spikes again and again."""


def spike_in(found: Mapping[str, float], recent: Mapping[str, deque[float]]) -> str | None:
    """Return a description of the spike in a step, or ``None`` without one."""
    for what, value in found.items():
        usual = statistics.median(recent[what]) if len(recent[what]) >= 4 else math.inf
        if not (math.isfinite(value) and value <= FACTORS[what] * usual):
            return f"{what} {value:.2f}, usually {usual:.2f}"
    return None


def full_state(model: Any, optimizer: Any, position: int) -> dict[str, torch.Tensor]:
    """Return all that training depends on, for ``Timeline.commit``."""
    rest = {"optimizer": optimizer.state_dict(), "rng": generators(), "position": position}
    return {**model.state_dict(), **to_tensors(rest, "training")}


def restore(timeline: Timeline, checkpoint: Checkpoint, model: Any, optimizer: Any) -> int:
    """Roll back to a checkpoint's full state; return its position in the data."""
    tensors = timeline.rollback(checkpoint)
    rest = from_tensors(tensors, "training")
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    optimizer.load_state_dict(rest["optimizer"])
    set_generators(rest["rng"])
    return int(rest["position"])


def train(
    store: Store,
    batches: Callable[[int], task.Batch],
    *,
    steps: int,
    every: int = 4,
    back: int = 4,
    skip: int = 6,
    at_most: int = 3,
    report: Callable[[str], None] = print,
) -> tuple[Any, list[int]]:
    """Train on the batches from position 0 on; return the model and the positions that counted.

    A spike rolls back to a commit at least ``back`` steps before it, or the oldest that is kept,
    and skips the next ``skip`` batches, or as many as end behind the spike.
    """
    model = task.load_model()
    optimizer = task.make_optimizer(model)
    # Far enough back for every spike: the newest commits, and one before them.
    policy = KeepLast(2 + -(-back // every))
    timeline = Timeline(store, store.add_base(task.BASE), retention=policy)
    recent = {what: deque[float](maxlen=16) for what in FACTORS}
    taken, position, rollbacks = list[int](), 0, 0
    while len(taken) < steps:
        if len(taken) % every == 0:
            timeline.commit(full_state(model, optimizer, position), step=len(taken))
        found = task.train_step(model, optimizer, batches(position))
        spike, before = spike_in(found, recent), position
        if spike is None:
            for what, value in found.items():
                recent[what].append(value)
            taken.append(position)
            position += 1
            continue
        if rollbacks == at_most:
            raise LossSpikeError(f"{spike}, after {rollbacks} roll-backs: look at lr and data")
        rollbacks += 1
        old = [c for c in timeline.checkpoints() if (c.step or 0) <= len(taken) - back]
        target = old[-1] if old else timeline.checkpoints()[0]
        start = restore(timeline, target, model, optimizer)
        position = max(start + skip, before + 1)
        action = f"back to step {target.step}, skipping positions {start} to {position - 1}"
        report(f"position {before}: {spike}; {action}")
        del taken[target.step :]
    timeline.close()
    return model, taken


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model, taken = train(Store.create(folder), task.corrupted, steps=24)
    print(f"trained on {len(taken)} batches, the last at position {taken[-1]}")
    print(f"loss on roman: {task.evaluate(model, 'roman'):.3f}")
