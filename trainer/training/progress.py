"""Show how far a stage is: lines in the log, and on a terminal a bar, too.

A line says the step of how many, the training loss and the time left in the stage. It comes before
each evaluation, and after a minute without a line as soon as a step, or a batch of an evaluation,
ends. The time left follows from the time that the steps took so far, evaluations included.

Example::

    beat = Heartbeat()
    with StageProgress(beat, stage=1, first_step=0, steps=90, has_bar=False) as progress:
        progress.advance(1, loss=lambda: 0.7)
        progress.show(loss=0.7)                         # before an evaluation
        beat.tick("evaluating")                         # a batch of the evaluation has ended
"""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from tqdm import tqdm

from trainer.algorithms.base import Evaluation, Mode
from trainer.algorithms.peaks import first_best_index
from trainer.config.schema import OVERALL
from trainer.text import duration_text, metric_text

MINUTE = 60.0
"""Seconds without a line after which one is due."""

_log = logging.getLogger(__name__)


class Heartbeat:
    """Writes lines to the log, and more of them after a minute without one."""

    def __init__(
        self, *, is_silent: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Count from now; ``is_silent`` in processes whose lines nobody reads."""
        self._is_silent = is_silent
        self.clock = clock
        self._last = self._began = clock()

    def say(self, text: str) -> None:
        """Write a line now; :meth:`tick` counts the time from here."""
        self._last = self._began = self.clock()
        self._write(text)

    def is_due(self) -> bool:
        """Return True if a minute has passed since the last line."""
        return self.clock() - self._last >= MINUTE

    def tick(self, doing: str) -> None:
        """Write for how long something is being done, if a line is due."""
        if self.is_due():
            self._last = self.clock()
            self._write(f"{doing} for {duration_text(self._last - self._began)}")

    def _write(self, text: str) -> None:
        if not self._is_silent:
            _log.info("%s", text)


class StageProgress:
    """The progress of one stage in one process."""

    def __init__(
        self, beat: Heartbeat, *, stage: int, first_step: int, steps: int, has_bar: bool
    ) -> None:
        """Begin after ``first_step`` of the ``steps`` of a stage."""
        self._stage, self._steps = stage, steps
        self._first_step = self._step = first_step
        self._beat = beat
        self._began = beat.clock()
        self._bar = tqdm(
            desc=f"stage {stage}",
            initial=first_step,
            total=steps,
            unit="step",
            leave=False,
            disable=not has_bar,
        )

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, step: int, *, loss: Callable[[], float | None]) -> None:
        """Show that ``step`` steps of the stage are done; ``loss`` is called only if it is due."""
        self._bar.update(step - self._step)
        self._step = step
        if self._beat.is_due():
            self.show(loss())

    def show(self, loss: float | None) -> None:
        """Show now where the stage is, with its training loss if there is one."""
        parts = [] if loss is None else [f"training loss {metric_text(loss)}"]
        self._bar.set_postfix_str(", ".join(parts))
        done, left = self._step - self._first_step, self._steps - self._step
        if done and left:
            seconds = (self._beat.clock() - self._began) / done * left
            parts.append(f"{duration_text(seconds)} left in this stage")
        place = f"stage {self._stage}, step {self._step} of {self._steps}"
        self._beat.say(": ".join([place, ", ".join(parts)]) if parts else place)


def describe_values(
    evaluations: Sequence[Evaluation],
    active: Collection[str],
    mode: Mode,
    modes: Mapping[str, Mode],
) -> str:
    """Return indented lines with each sub-dataset's value and its best of a stage.

    Args:
        evaluations: Those of the stage so far; the last one is described.
        active: The sub-datasets that the stage may still exclude.
        mode: The direction of metrics.
        modes: The directions that differ from it, by sub-dataset.
    """
    *_, last = evaluations
    texts = []
    for name in sorted(last.metrics, key=lambda name: (name not in active, name)):
        if name == OVERALL:
            continue
        curve = [evaluation.metrics[name] for evaluation in evaluations]
        best = first_best_index(curve, modes.get(name, mode))
        notes = [] if name in active else ["excluded"]
        if name in last.carried:
            notes.append("not measured")
        if best is None:
            notes.append("none is finite")
        elif best < len(curve) - 1:
            notes.append(f"best {metric_text(curve[best])} at epoch {evaluations[best].epoch:.2f}")
        elif best:
            notes.append("best so far")
        text = f"{name} {metric_text(curve[-1])}"
        texts.append(f"{text} ({', '.join(notes)})" if notes else text)
    # A break within an entry would tear a value from its name.
    joined = ", ".join(text.replace(" ", "\0") for text in texts)
    wrapped = textwrap.fill(
        joined,
        100,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped.replace("\0", " ")
