"""Write the example's sub-datasets: ``data/NAME.{train,validation,test}.jsonl``.

The files depend on nothing but this folder's code: running the script again writes the same bytes,
with every Python from 3.10 on. No prompt is in two splits.

Example::

    python examples/stdlib_tasks/make_data.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tasks import TASKS, Example, Task, stream

SPLITS = ("test", "validation", "train")


def split(task: Task) -> dict[str, list[Example]]:
    """Return the examples of each split, all with different prompts."""
    rng = stream(f"stdlib_tasks/{task.name}")
    sizes = {name: getattr(task, name) for name in SPLITS}
    drawn: dict[str, Example] = {}
    while len(drawn) < sum(sizes.values()):
        example = task.draw(rng)
        drawn.setdefault(example.prompt, example)
    examples = iter(drawn.values())
    return {name: [next(examples) for _ in range(size)] for name, size in sizes.items()}


def write(directory: Path) -> None:
    """Write every split of every task to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for task in TASKS.values():
        for name, examples in split(task).items():
            lines = (
                json.dumps({"prompt": example.prompt, "completion": example.completion}) + "\n"
                for example in examples
            )
            path = directory / f"{task.name}.{name}.jsonl"
            path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path(__file__).parent / "data", help="where to"
    )
    write(parser.parse_args().directory)


if __name__ == "__main__":
    main()
