"""The time of importing ``msft_store`` and of ``torch`` alone, in fresh interpreters.

The ways take turns. The result is the least time of each, because longer times include other work
on the machine.

Example::

    python -m bench.imports                 # a minute or two; writes results/imports.md and .json
    python -m bench.imports --rounds 3      # prints only
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from bench.codec import RESULTS, machine
from trainer.text import Table

ROUNDS = 25
TORCH = "import torch"
WAYS = (
    TORCH,
    "import torch, msft_store",
    "import torch; from msft_store import Store, Timeline",
    "import torch; from msft_store import *",
)


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, the interpreter's own start included."""
    seconds: dict[str, list[float]] = {code: [] for code in WAYS}
    for number in range(rounds):
        start = number % len(WAYS)
        for code in WAYS[start:] + WAYS[:start]:
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[code].append(time.perf_counter() - began)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Return a Markdown table."""
    least = min(seconds[TORCH])
    rows = [
        (f"`{code}`", f"{min(took):.3f}", f"{1000 * (min(took) - least):+.0f}")
        for code, took in seconds.items()
    ]
    return Table(header=("", "seconds", "ms more than torch"), rows=tuple(rows)).to_markdown()


def main() -> None:
    """Measure; write ``bench/results/imports.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help=f"print only (default: {ROUNDS}, and write)")
    options = parser.parse_args()
    seconds = measure(options.rounds or ROUNDS)
    shown = table(seconds)
    print(shown)
    if options.rounds:
        return
    about = machine()
    head = (
        f"{about['date']}, shared cores of {about['cpu']}, commit {about['commit']}, {ROUNDS} "
        f"rounds in turns.\n\n{__doc__.split('Example::')[0].strip()}"
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "imports.md").write_text(f"{head}\n\n{shown}\n", encoding="utf-8")
    text = json.dumps({**about, "seconds": seconds}, indent=2) + "\n"
    (RESULTS / "imports.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
