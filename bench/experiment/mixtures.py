"""The three mixtures of the experiment.

- ``mixture10``: ten tasks, each three times the size that a first experiment had.
- ``heterogeneous``: six sub-datasets whose peaks in plain SFT lie far apart.
- ``heterogeneous2``: six others of the same kinds. No setting is ever chosen on it.

The kinds of sub-datasets, and what moves their peak:

- *rules*: every example asks for another fact, and what is learned carries over. Late peaks.
- *facts shared* by the splits, which ask for them in other prompts. Late peaks if each is rare.
- *few facts* in many wordings; held out are other facts. An epoch repeats each fact so often that
  soon nothing is learned any more but those. Early peaks.
- *random labels*: nothing carries over but the set of labels, and memorizing hurts. Early peaks.
- *small* sets: few steps an epoch, so that memorizing takes several epochs.

Every prompt ends in `` =``, and every completion is a space and the answer. A model that forgets a
sub-dataset therefore forgets its answers and not its format. No prompt is in two splits, and all
examples depend on this code alone.

Example::

    splits = split("heterogeneous", "roman")    # {"train": [...], "validation": [...], "test": ...}
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.tasks import MIXTURE as TASKS
from examples.stdlib_tasks.tasks import Example, Task, below, choose, stream

HELD_OUT = 500
"""Validation examples, and test examples, of each sub-dataset."""
END = " ="
"""The end of every prompt."""

_OPENINGS = ("", "q ", "a ", "in ", "k ", "m ", "x ", "z ")
"""One token each, so that many wordings take little compute."""
_LETTERS = "bcdfghjklmnpqrstvwxz"


@dataclass(frozen=True, kw_only=True)
class SubDataset:
    """A task with the size that it has in a mixture.

    Attributes:
        task: Draws the examples.
        train: Training examples.
        facts: Most different facts among the training examples; ``None``: no limit.
        shares_facts: True if the splits ask for the same facts, in other prompts.
    """

    task: Task
    train: int
    facts: int | None = None
    shares_facts: bool = False


def _labelled(name: str, ask: str, labels: Sequence[str], digits: int) -> Task:
    """Return a task with random labels of random keys, two letters and some digits."""

    def fact(rng: random.Random) -> tuple[str, ...]:
        letters = choose(rng, _LETTERS) + choose(rng, _LETTERS)
        return f"{letters}{below(rng, 10**digits):0{digits}}", choose(rng, labels)

    return Task(name=name, train=0, fact=fact, wordings=(ask,), related_wordings=())


def _based(name: str, code: str, stop: int) -> Task:
    """Return a task that writes numbers below ``stop`` with the format code of a base."""

    def fact(rng: random.Random) -> tuple[str, ...]:
        number = below(rng, stop)
        return str(number), f"{number:{code}}"

    return Task(name=name, train=0, fact=fact, wordings=(), related_wordings=())


def _weekday_task(task: Task) -> Task:
    # Full names, which the base model knows; the abbreviations would all have to be learned first.
    return replace(task, fact=task.related_fact or task.fact)


_BY_NAME = {task.name: task for task in TASKS}
_BY_NAME |= {
    "weekday": _weekday_task(_BY_NAME["weekday"]),
    "octal": _based("octal", "o", 4096),
    "groups": _labelled("groups", "", ("red", "green", "blue", "black"), 2),
    "sides": _labelled("sides", "", ("north", "south", "east", "west"), 3),
}

_ASKS = {
    "arithmetic": (
        "{0} {1} {2}",
        "value {0} {1} {2}",
        "value of {0} {1} {2}",
        "number {0} {1} {2}",
    ),
    "entity": ("kind of {0}",),
    "groups": ("set {0}",),
    "hexadecimal": ("hex {0}",),
    "mime": ("type {0}.{1}", "type of {0}.{1}", "kind {0}.{1}"),
    "month": ("days {0}", "days in {0}", "in {0}", "day in {0}"),
    "octal": ("oct {0}",),
    "reversal": ("reverse {0}",),
    "roman": ("roman {0}",),
    "sides": ("side {0}",),
    "sorting": ("sort {0}",),
    "status": ("http {0}", "code {0}", "status {0}", "text {0}", "type {0}"),
    "weekday": ("day {0}", "day of {0}", "day in {0}", "{0} is"),
}


def _sub(
    name: str, train: int, *, facts: int | None = None, shares_facts: bool = False
) -> SubDataset:
    """Return a task as a sub-dataset: in many wordings where facts repeat, else in one of each."""
    openings = _OPENINGS if facts is not None or shares_facts else _OPENINGS[:1]
    asks = _ASKS[name] if facts is not None or shares_facts else _ASKS[name][:1]
    wordings = tuple(f"{a}{b}{END}" for a, b in itertools.product(openings, asks))
    task = replace(_BY_NAME[name], wordings=wordings)
    return SubDataset(task=task, train=train, facts=facts, shares_facts=shares_facts)


MIXTURES: Mapping[str, Mapping[str, SubDataset]] = {
    "mixture10": {
        "arithmetic": _sub("arithmetic", 720, facts=48),
        "entity": _sub("entity", 300),
        "hexadecimal": _sub("hexadecimal", 720),
        "mime": _sub("mime", 480, shares_facts=True),
        "month": _sub("month", 288, facts=36),
        "reversal": _sub("reversal", 720),
        "roman": _sub("roman", 720),
        "sorting": _sub("sorting", 360),
        "status": _sub("status", 288, shares_facts=True),
        "weekday": _sub("weekday", 576, facts=36),
    },
    "heterogeneous": {
        "groups": _sub("groups", 200, facts=30),
        "hexadecimal": _sub("hexadecimal", 64),
        "mime": _sub("mime", 96, shares_facts=True),
        "reversal": _sub("reversal", 1500),
        "roman": _sub("roman", 1400),
        "weekday": _sub("weekday", 360, facts=12),
    },
    "heterogeneous2": {
        "arithmetic": _sub("arithmetic", 320, facts=16),
        "month": _sub("month", 48),
        "octal": _sub("octal", 1200),
        "sides": _sub("sides", 300),
        "sorting": _sub("sorting", 1600),
        "status": _sub("status", 112, shares_facts=True),
    },
}
"""Mixture → sub-dataset → task and size."""

EVAL_EVERY = {"mixture10": 1.25, "heterogeneous": 1.0, "heterogeneous2": 1.0}
"""Epochs between evaluations: they take about a quarter of the FLOPs of ten epochs of SFT."""


def split(mixture: str, name: str) -> dict[str, list[Example]]:
    """Return the examples of each split of a sub-dataset, all with different prompts.

    Raises :class:`ValueError` if the task has too few prompts.
    """
    sub = MIXTURES[mixture][name]
    rng = stream(f"experiment/{mixture}/{name}")
    task = sub.task if sub.facts is None else _narrowed(sub.task, rng, sub.facts)
    train = _different(task, rng, sub.train)
    facts = set() if sub.shares_facts else {example.fact for example in train}
    prompts = {example.prompt for example in train}
    held_out = _different(sub.task, rng, 2 * HELD_OUT, prompts=prompts, facts=facts)
    return {"train": train, "validation": held_out[:HELD_OUT], "test": held_out[HELD_OUT:]}


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


def _narrowed(task: Task, rng: random.Random, count: int) -> Task:
    """Return the task with ``count`` facts only."""
    pool: dict[tuple[str, ...], None] = {}
    while len(pool) < count:
        pool.setdefault(task.fact(rng))
    chosen = tuple(pool)
    return replace(task, fact=lambda rng: choose(rng, chosen))
