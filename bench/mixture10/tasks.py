"""The ten tasks of the experiment: those of the example and two more, in sizes of their own.

Sub-datasets differ in size by a factor of 2.5, and in what there is to learn from them:

- *rules* (hexadecimal, reversal, roman, sorting): every example asks for another fact, and what is
  learned carries over. The base model has seen all of these kinds but hexadecimal numbers.
- *known facts* (mime, status): the same facts are trained on and held out, in other prompts.
- *narrow* (arithmetic, entity, month, weekday): few facts in many wordings, as augmented data has
  it; held out are other facts. An epoch shows each fact 8 to 16 times, so that soon nothing is
  learned any more but those.

Example::

    splits = split(MIXTURE["roman"])                # {"test": [...], "validation": [...], ...}
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from bench.tasks import MIXTURE as TASKS
from examples.stdlib_tasks.tasks import Example, Task, choose, stream

HELD_OUT = 128
"""Validation examples, and test examples, of each sub-dataset."""

_OPENINGS = ("", "q ", "so ", "ok ", "now ")
_ENDINGS = ("", " ?", " =", " ...")


@dataclass(frozen=True, kw_only=True)
class SubDataset:
    """A task with the sizes that it has in this mixture."""

    task: Task
    train: int
    """Training examples in the short form."""
    facts: int | None = None
    """Different facts among the training examples; ``None``: as many as there are examples."""
    shares_facts: bool = False
    """True if the splits ask for the same facts, in other prompts."""


def _worded(task: Task, openings: Sequence[str] = _OPENINGS) -> Task:
    """Return the task in more wordings."""
    product = itertools.product(openings, task.wordings, _ENDINGS)
    return replace(task, wordings=tuple(f"{a}{b}{c}" for a, b, c in product))


def _sub_datasets() -> dict[str, SubDataset]:
    tasks = {task.name: task for task in TASKS}

    narrow = {name: _worded(tasks[name]) for name in ("arithmetic", "entity", "month", "weekday")}
    shared = {name: _worded(tasks[name], _OPENINGS[:2]) for name in ("mime", "status")}
    # Full names, which the base model knows; the abbreviations would all have to be learned first.
    days = replace(narrow["weekday"], fact=tasks["weekday"].related_fact or tasks["weekday"].fact)
    return {
        "arithmetic": SubDataset(task=narrow["arithmetic"], train=240, facts=16),
        "entity": SubDataset(task=narrow["entity"], train=192, facts=12),
        "hexadecimal": SubDataset(task=tasks["hexadecimal"], train=240),
        "mime": SubDataset(task=shared["mime"], train=160, shares_facts=True),
        "month": SubDataset(task=narrow["month"], train=96, facts=12),
        "reversal": SubDataset(task=tasks["reversal"], train=240),
        "roman": SubDataset(task=tasks["roman"], train=240),
        "sorting": SubDataset(task=tasks["sorting"], train=120),
        "status": SubDataset(task=shared["status"], train=96, shares_facts=True),
        "weekday": SubDataset(task=days, train=192, facts=12),
    }


MIXTURE = _sub_datasets()
"""Name → sub-dataset."""


def split(sub: SubDataset, *, train: int | None = None) -> dict[str, list[Example]]:
    """Return the examples of each split, all with different prompts.

    ``train`` is the number of training examples, ``None`` for that of the short form; what is held
    out does not depend on it. Narrow sub-datasets keep their examples per fact. Raises
    :class:`ValueError` for more examples than a task has prompts.
    """
    count = train or sub.train
    rng = stream(f"mixture10/{sub.task.name}")
    held_out = _different(sub.task, rng, 2 * HELD_OUT)
    taken = {example.prompt for example in held_out}
    facts = set() if sub.shares_facts else {example.fact for example in held_out}
    task = sub.task
    if sub.facts is not None:
        task = _narrowed(task, rng, -(-sub.facts * count // sub.train), facts)
    return {
        "test": held_out[:HELD_OUT],
        "validation": held_out[HELD_OUT:],
        "train": _different(task, rng, count, prompts=taken, facts=facts),
    }


def _different(
    task: Task,
    rng: random.Random,
    count: int,
    *,
    prompts: Collection[str] = (),
    facts: Collection[str] = (),
) -> list[Example]:
    """Return examples with prompts that differ from each other and from those of others."""
    drawn: dict[str, Example] = {}
    draws = 0
    while len(drawn) < count:
        draws += 1
        if draws > 1000 * count:
            raise ValueError(f"{task.name}: there are no {count} different prompts to be had")
        example = task.draw(rng)
        if example.prompt not in prompts and example.fact not in facts:
            drawn.setdefault(example.prompt, example)
    return list(drawn.values())


def _narrowed(task: Task, rng: random.Random, count: int, facts: Collection[str]) -> Task:
    """Return the task with ``count`` facts only, and none of ``facts``."""
    pool: dict[str, tuple[str, ...]] = {}
    while len(pool) < count:
        fields = task.fact(rng)
        name = replace(task, fact=lambda _, fields=fields: fields).draw(rng).fact
        if name not in facts:
            pool.setdefault(name, fields)
    chosen = tuple(pool.values())
    return replace(task, fact=lambda rng: choose(rng, chosen))
