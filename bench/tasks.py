"""A mixture of ten sub-datasets of equal size: the example's eight tasks and two more.

The two are of the standard library, too, but the example's base model has not seen their kind of
question in pre-training. The files depend on this code and the sizes alone. No prompt is in two
splits.

Example::

    write(DATA / "mixture", train=64, validation=32)    # NAME.{train,validation}.jsonl
"""

from __future__ import annotations

import calendar
import json
import random
from collections.abc import Mapping
from pathlib import Path

from examples.stdlib_tasks.tasks import TASKS, Example, Task, below, stream


def _hexadecimal(rng: random.Random) -> tuple[str, ...]:
    number = below(rng, 4096)
    return str(number), f"{number:x}"


def _month(rng: random.Random) -> tuple[str, ...]:
    year, month = 1900 + below(rng, 200), 1 + below(rng, 12)
    return f"{year}-{month:02}", str(calendar.monthrange(year, month)[1])


MIXTURE = (
    *TASKS.values(),
    Task(
        name="hexadecimal",
        train=64,
        fact=_hexadecimal,
        wordings=("hexadecimal of {0}:",),
        related_wordings=(),
    ),
    Task(
        name="month",
        train=64,
        fact=_month,
        wordings=("days in {0}:",),
        related_wordings=(),
    ),
)


def split(task: Task, sizes: Mapping[str, int]) -> dict[str, list[Example]]:
    """Return as many examples of each split as ``sizes`` says, all with different prompts."""
    rng = stream(f"bench/{task.name}")
    drawn: dict[str, Example] = {}
    while len(drawn) < sum(sizes.values()):
        example = task.draw(rng)
        drawn.setdefault(example.prompt, example)
    examples = iter(drawn.values())
    return {name: [next(examples) for _ in range(size)] for name, size in sizes.items()}


def write(directory: Path, *, train: int, validation: int) -> None:
    """Write the splits of every sub-dataset, with so many examples each, to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for task in MIXTURE:
        for name, examples in split(task, {"validation": validation, "train": train}).items():
            lines = (
                json.dumps({"prompt": example.prompt, "completion": example.completion}) + "\n"
                for example in examples
            )
            path = directory / f"{task.name}.{name}.jsonl"
            path.write_text("".join(lines), encoding="utf-8", newline="\n")
