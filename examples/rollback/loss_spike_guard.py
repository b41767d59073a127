"""Go back when the loss spikes, and skip the batches that did it.

PaLM (arXiv 2204.02311, section 5.1): restart from a checkpoint about 100 steps before the spike,
and skip 200 to 500 batches, which are those around it. A spike here is a loss that is not finite,
or above ``factor`` times the median of the last ones. After ``at_most`` roll-backs the guard gives
up and says so: then the batches are not to blame.

All that training depends on is in the checkpoint: weights, optimizer, generators, and the position
in the data. So what follows a roll-back is, bit for bit, a run that never met the skipped batches.

Run it: ``python examples/rollback/loss_spike_guard.py``
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any

import task
import torch

from msft_store import Checkpoint, KeepLast, Store, Timeline, flatten, unflatten


class LossSpikeError(RuntimeError):
    """The loss spiked again and again."""


def full_state(model: Any, optimizer: torch.optim.Optimizer, position: int) -> dict[str, Any]:
    """Return all that training depends on, for ``Timeline.commit``."""
    rest = {"optimizer": optimizer.state_dict(), "position": position}
    rest["generators"] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    tensors, tree = flatten(rest, "training")
    return {"tensors": {**model.state_dict(), **tensors}, "metadata": {"training": tree}}


def restore(timeline: Timeline, checkpoint: Checkpoint, model: Any, optimizer: Any) -> int:
    """Roll back to a checkpoint's full state; return its position in the data."""
    tensors = timeline.rollback(checkpoint)
    rest = unflatten(tensors, checkpoint.metadata["training"])
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    optimizer.load_state_dict(rest["optimizer"])
    torch.set_rng_state(rest["generators"]["torch"])
    random.setstate(rest["generators"]["python"])
    return int(rest["position"])


def train(
    store: Store,
    batches: Callable[[int], task.Batch],
    *,
    steps: int,
    every: int = 4,
    back: int = 4,
    skip: int = 6,
    factor: float = 2.0,
    at_most: int = 3,
    report: Callable[[str], None] = print,
) -> tuple[Any, list[int]]:
    """Train on the batches from position 0 on; return the model and the positions that counted.

    Every ``every`` steps there is a commit. A spike rolls back to one at least ``back`` steps
    before it, or the oldest that is kept, and skips the next ``skip`` batches from there, or as
    many as end behind the spike.
    :class:`LossSpikeError` at the spike after ``at_most`` roll-backs.
    """
    model = task.load_model()
    optimizer = task.make_optimizer(model)
    base = store.add_base(task.BASE)
    # Far enough back for every spike: the newest commits, and one before them.
    timeline = Timeline(store, base, retention=KeepLast(2 + -(-back // every)))
    recent: deque[float] = deque(maxlen=16)
    taken: list[int] = []
    position, rollbacks = 0, 0
    while len(taken) < steps:
        if len(taken) % every == 0:
            timeline.commit(**full_state(model, optimizer, position), step=len(taken))
        loss = task.train_step(model, optimizer, batches(position))
        usual = statistics.median(recent) if len(recent) >= 4 else math.inf
        if math.isfinite(loss) and loss <= factor * usual:
            recent.append(loss)
            taken.append(position)
            position += 1
            continue
        if rollbacks == at_most:
            raise LossSpikeError(
                f"the loss was {loss:.3g} at position {position}, after {rollbacks} roll-backs: "
                "look at the learning rate and the data"
            )
        spike, rollbacks = position, rollbacks + 1
        old = [c for c in timeline.checkpoints() if (c.step or 0) <= len(taken) - back]
        target = old[-1] if old else timeline.checkpoints()[0]
        start = restore(timeline, target, model, optimizer)
        position = max(start + skip, spike + 1)
        report(
            f"position {spike}: loss {loss:.2f}, usually {usual:.2f}; back to step {target.step}, "
            f"skipping positions {start} to {position - 1}"
        )
        del taken[target.step :]
    timeline.close()
    return model, taken


def corrupted(position: int) -> task.Batch:
    """Return the batch of a position; from 13 to 14 the completions are noise."""
    data = task.batch(position)
    if position in (13, 14):
        noise = torch.randint_like(data["labels"], 500, generator=torch.Generator().manual_seed(1))
        data["labels"] = torch.where(data["labels"] == task.IGNORED, task.IGNORED, noise)
    return data


def main() -> None:
    """Train over two corrupted batches."""
    with tempfile.TemporaryDirectory() as folder:
        model, taken = train(Store.create(folder), corrupted, steps=24)
    print(f"trained on {len(taken)} batches, the last at position {taken[-1]}")
    print(f"loss on roman: {task.evaluate(model, 'roman'):.3f}")


if __name__ == "__main__":
    main()
