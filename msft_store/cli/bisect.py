"""``msft-store bisect``: find the first checkpoint for which a command fails.

Invariants: a checkpoint is exported only while the command looks at it. As with ``git bisect run``,
exit code 0 of the command means good, 125 skip, others up to 127 bad, and all else stops the
search.

Example::

    search = Search(4)                      # the first is good, the last bad
    while (at := search.next()) is not None:
        search.tell(at, Verdict.BAD)
"""

from __future__ import annotations

import argparse
import enum
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msft_store.cli.inspect import summary
from msft_store.cli.lineage import format_metrics
from msft_store.cli.remote import Output
from msft_store.errors import InvalidInputError
from msft_store.objects.manifest import Checkpoint
from msft_store.remote.transport.url import is_url
from msft_store.store import Store, open_remote

DIRECTORY = "{}"
"""Argument of the command in whose place it gets the directory of an export."""
_SKIP, _LARGEST = 125, 127


class Verdict(enum.Enum):
    """Result of the command for one checkpoint."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


class Search:
    """A binary search over a history that begins with a good checkpoint and ends with a bad one.

    Pure. Skipped places are not asked for again; the nearest other one is.

    Args:
        count: Number of checkpoints, both ends included.
    """

    def __init__(self, count: int) -> None:
        self.good, self.bad = 0, count - 1
        self.skipped: set[int] = set()

    def next(self) -> int | None:
        """Return the place to look at next, or ``None`` if no place is left."""
        middle = (self.good + self.bad) // 2
        left = set(range(self.good + 1, self.bad)) - self.skipped
        return min(left, key=lambda place: (abs(place - middle), place), default=None)

    def tell(self, place: int, verdict: Verdict) -> None:
        """Record the verdict on a place."""
        if verdict is Verdict.GOOD:
            self.good = place
        elif verdict is Verdict.BAD:
            self.bad = place
        else:
            self.skipped.add(place)

    def suspects(self) -> range:
        """Return the places of which one is the first bad one; just one if none was skipped."""
        return range(self.good + 1, self.bad + 1)


def add_bisect_options(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``bisect``."""
    command.add_argument("place", metavar="STORE", help="path or URL of the store")
    command.add_argument("good", metavar="GOOD", help="a checkpoint or ref without the fault")
    command.add_argument("bad", metavar="BAD", help="a later one with the fault")
    command.add_argument(
        "argv",
        metavar="-- COMMAND",
        nargs="+",
        help="command that exits with 0 if the checkpoint is good, 125 to skip it, and another "
        f"code up to 127 if it is bad; {DIRECTORY} stands for the directory of its export",
    )


def bisect(options: argparse.Namespace) -> Output:
    """Search between two checkpoints for the first bad one."""
    argv: list[str] = options.argv
    if not any(DIRECTORY in part for part in argv):
        raise InvalidInputError(
            f"write {DIRECTORY} in the command for the directory of the exported checkpoint"
        )
    store = open_remote(options.place) if is_url(options.place) else Store.open(options.place)
    history, by_lineage = history_between(store, store.get(options.good), store.get(options.bad))
    search, tried = Search(len(history)), []
    while (place := search.next()) is not None:
        verdict = _try(store, history[place], argv)
        search.tell(place, verdict)
        tried.append({**summary(history[place]), "verdict": verdict.value})
        left = sum(1 for at in search.suspects() if at not in search.skipped) - 1
        print(f"{verdict.value:<5}{_line(history[place])}; {left} left", file=sys.stderr)
    suspects = [history[place] for place in search.suspects()]
    document: dict[str, Any] = {
        "first_bad": summary(suspects[0]) if len(suspects) == 1 else None,
        "suspects": [summary(checkpoint) for checkpoint in suspects],
        "last_good": summary(history[search.good]),
        "tried": tried,
        "order": "lineage" if by_lineage else "time",
    }
    lines = [f"first bad    {_line(suspects[0])}"]
    if len(suspects) > 1:
        lines = ["the first bad one is among these, because others were skipped:"]
        lines += [f"  {_line(checkpoint)}" for checkpoint in suspects]
    lines.append(f"last good    {_line(history[search.good])}")
    if not by_lineage:
        lines.append("GOOD is no ancestor of BAD that is still there: the order is that of time")
    return document, "\n".join(lines)


def history_between(
    store: Store, good: Checkpoint, bad: Checkpoint
) -> tuple[list[Checkpoint], bool]:
    """Return the checkpoints from ``good`` to ``bad``, and True if each descends from the last.

    If ``good`` is no ancestor of ``bad`` by parents that are still there, they are those that were
    saved between the two.
    """
    log = store.log()
    known = {checkpoint.id: checkpoint for checkpoint in log}
    lineage = [bad]
    while lineage[-1].id != good.id and (parent := known.get(lineage[-1].parent or "")):
        lineage.append(parent)
    if len(lineage) > 1 and lineage[-1].id == good.id:
        return lineage[::-1], True
    ids = [checkpoint.id for checkpoint in log]
    first, last = ids.index(good.id), ids.index(bad.id)
    if first >= last:
        raise InvalidInputError(
            "GOOD must be an ancestor of BAD, or saved before it: to find where a fault ended, "
            "swap the two and let the command exit with 0 where the fault is"
        )
    return log[first : last + 1], False


def _try(store: Store, checkpoint: Checkpoint, argv: Sequence[str]) -> Verdict:
    """Export a checkpoint, run the command on it and delete the export."""
    with tempfile.TemporaryDirectory(prefix="msft-store-bisect-") as folder:
        export = Path(folder) / checkpoint.id[:12]
        store.export(checkpoint, export)
        command = [part.replace(DIRECTORY, str(export)) for part in argv]
        try:
            # The output of the command is none of the result, which may be JSON.
            code = subprocess.run(command, stdout=2, check=False).returncode
        except OSError as error:
            raise InvalidInputError(f"cannot run {command[0]!r}: {error}") from error
    if not 0 <= code <= _LARGEST:
        raise InvalidInputError(
            f"the command ended with {code} for {_line(checkpoint)}, which is no verdict: 0 is "
            f"good, {_SKIP} skip, others up to {_LARGEST} bad"
        )
    return {0: Verdict.GOOD, _SKIP: Verdict.SKIP}.get(code, Verdict.BAD)


def _line(checkpoint: Checkpoint) -> str:
    step = "" if checkpoint.step is None else f"  step {checkpoint.step}"
    metrics = format_metrics(checkpoint.metrics)
    return f"{checkpoint.id[:12]}{step}{metrics and f'  {metrics}'}"
