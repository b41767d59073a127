"""Write the mixtures: ``DIRECTORY/MIXTURE/NAME.{train,validation,test}.jsonl``.

The files depend on the code of the tasks alone: the same bytes with every Python from 3.10 on.

Example::

    python -m bench.experiment.make_data runs/experiment/data
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.experiment.mixtures import MIXTURES, split


def write(directory: Path, mixture: str) -> None:
    """Write every split of every sub-dataset of a mixture to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in MIXTURES[mixture]:
        for part, examples in split(mixture, name).items():
            lines = (
                json.dumps({"prompt": example.prompt, "completion": example.completion}) + "\n"
                for example in examples
            )
            path = directory / f"{name}.{part}.jsonl"
            path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to")
    arguments = parser.parse_args()
    for mixture in MIXTURES:
        write(arguments.directory / mixture, mixture)


if __name__ == "__main__":
    main()
