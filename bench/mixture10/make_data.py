"""Write the ten sub-datasets of the experiment: ``NAME.{train,validation,test}.jsonl``.

The files depend on the code of the tasks and the size alone: the same bytes with every Python from
3.10 on. No prompt is in two splits; both forms hold out the same examples.

Example::

    python -m bench.mixture10.make_data                                     # the short form's
    python -m bench.mixture10.make_data runs/mixture10-long/data --train 1800
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.mixture10.tasks import MIXTURE, split

DATA = Path(__file__).parent / "data"


def write(directory: Path, *, train: int | None = None) -> None:
    """Write every split of every task to ``directory``.

    ``train`` is the number of training examples of each sub-dataset, ``None`` for the short form's
    sizes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, sub in MIXTURE.items():
        for part, examples in split(sub, train=train).items():
            lines = (
                json.dumps({"prompt": example.prompt, "completion": example.completion}) + "\n"
                for example in examples
            )
            path = directory / f"{name}.{part}.jsonl"
            path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=DATA, help="where to")
    parser.add_argument("--train", type=int, help="training examples of each sub-dataset")
    arguments = parser.parse_args()
    write(arguments.directory, train=arguments.train)


if __name__ == "__main__":
    main()
