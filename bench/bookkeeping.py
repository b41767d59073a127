"""The share of bookkeeping in MSFT's training time: commits, evictions, roll-backs, journal.

The run commits in the foreground (``async_save: false``), so that no commit overlaps with the
training. Each call of the trainer is timed in seconds of the processor, because the machine may do
other work, and by the clock, which includes the waiting for the disk. The training time is that of
the optimizer steps, without evaluations.

Example::

    python -m bench.bookkeeping             # minutes; writes results/bookkeeping.md and .json
    python -m bench.bookkeeping --quick     # one stage of the example, nothing written
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from bench.codec import RESULTS, machine
from bench.lengths import write
from bench.trajectories import DATA, EXAMPLE
from msft_store import Timeline
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.journal import Journal
from trainer.text import Table
from trainer.training.run import start
from trainer.training.steps import StageSteps
from trainer.training.workspace import quiet_libraries

OUTPUT = DATA / "bookkeeping"
TRAINING = "training"
PARTS: Mapping[str, tuple[type, tuple[str, ...]]] = {
    TRAINING: (StageSteps, ("train",)),
    "commits and evictions": (Timeline, ("commit",)),
    "roll-backs": (Timeline, ("rollback",)),
    "journal": (Journal, ("append",)),
}
"""The timed parts: description → class and methods."""
COMMON = ("method=msft", "async_save=false", "threads=1", "msft.compute_budget=1")


@dataclass
class Times:
    """Of one part."""

    calls: int = 0
    processor: float = 0.0
    """Seconds."""
    clock: float = 0.0
    """Seconds."""


@dataclass
class Stopwatch:
    """Adds up the time of each part, without the other parts that it calls."""

    parts: dict[str, Times] = field(default_factory=lambda: defaultdict(Times))
    _running: str | None = None

    def around(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if self._running is not None:
                return method(*arguments, **named)
            self._running = part
            processor, clock = time.process_time(), time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                times = self.parts[part]
                times.calls += 1
                times.processor += time.process_time() - processor
                times.clock += time.perf_counter() - clock
                self._running = None

        return timed


@contextmanager
def watched() -> Iterator[Stopwatch]:
    """Time all parts."""
    watch = Stopwatch()
    with ExitStack() as stack:
        for part, (owner, names) in PARTS.items():
            for name in names:
                method = watch.around(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, method))
        yield watch


def measure(config: Config) -> dict[str, Times]:
    """Train from beginning to end and return the time of each part."""
    shutil.rmtree(config.output_dir, ignore_errors=True)
    with watched() as watch:
        start(config)
    return {part: watch.parts[part] for part in PARTS}


def table(parts: Mapping[str, Times]) -> str:
    """Return a Markdown table."""
    training = parts[TRAINING]
    rows = [_row(part, times, training) for part, times in parts.items()]
    others = [times for part, times in parts.items() if part != TRAINING]
    total = Times(
        calls=sum(times.calls for times in others),
        processor=sum(times.processor for times in others),
        clock=sum(times.clock for times in others),
    )
    rows.append(_row("bookkeeping together", total, training))
    header = ("", "calls", "processor, s", "of training", "clock, s", "of training")
    return Table(header=header, rows=rows).to_markdown()


def _row(words: str, times: Times, training: Times) -> tuple[str, ...]:
    return (
        words,
        f"{times.calls:,}",
        f"{times.processor:.2f}",
        f"{times.processor / training.processor:.2%}",
        f"{times.clock:.2f}",
        f"{times.clock / training.clock:.2%}",
    )


def configurations(quick: bool) -> dict[str, Config]:
    """Return the measured runs: description → configuration."""
    demo = EXAMPLE / "demo.yaml"
    larger = write(OUTPUT / "lengths", train=16).parent / "base"
    stages = "msft.max_stages=1" if quick else "msft.max_stages=4"
    out = f"output_dir={OUTPUT / 'run'}"
    chosen: dict[str, Sequence[str]] = {
        "the example, 2.5 M parameters": (),
        "a model of 5.3 M parameters on the example's data": (f"model.path={larger}",),
    }
    return {
        words: load_config(demo, [*COMMON, stages, out, *more])
        for words, more in list(chosen.items())[: 1 if quick else None]
    }


def main() -> None:
    """Measure; write ``bench/results/bookkeeping.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one stage, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    quiet_libraries()
    about = machine()
    document: dict[str, Any] = {**about}
    sections = []
    # The first save of a process compiles or loads the codec's loops.
    measure(next(iter(configurations(True).values())))
    for words, config in configurations(quick).items():
        parts = measure(config)
        evaluations = config.evaluation.eval_every
        title = f"{words}: bf16, lr {config.train.lr:g}, a commit every {evaluations:g} epochs"
        sections.append(f"## {title}\n\n{table(parts)}")
        print(sections[-1], flush=True)
        document[title] = {part: vars(times) for part, times in parts.items()}
    if quick:
        return
    head = (
        f"{about['date']}, one of the shared cores of {about['cpu']}, commit {about['commit']}.\n\n"
        f"{__doc__.split('Example::')[0].strip()}"
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "bookkeeping.md").write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
    text = json.dumps(document, indent=2) + "\n"
    (RESULTS / "bookkeeping.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
