"""Show the generations of an evaluation that were not right.

Example::

    shown = select_predictions("runs/demo", at="2-0.5", sub_dataset="roman")
    print(to_text(shown, limit=5))
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from trainer.journal import effective, mode_of, read, run_started
from trainer.report.flops import find_result_evaluation
from trainer.text import did_you_mean, printable
from trainer.training.directory import JOURNAL, PREDICTIONS
from trainer.training.predictions import (
    Row,
    epoch_text,
    find_predictions,
    read_predictions,
    worst_first,
)

_FIELDS = ("prompt", "generation", "answer", "expected", "reference", "score")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Generations of one evaluation."""

    stage: int
    epoch: float
    written: dict[str, int]
    """Sub-dataset → examples in the file of the evaluation."""
    examples: Sequence[Row]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def select_predictions(
    run: str | os.PathLike[str],
    *,
    at: str | None = None,
    sub_dataset: str | None = None,
    every: bool = False,
) -> Predictions:
    """Return the generations of an evaluation that are not right.

    Args:
        run: The directory of a run.
        at: The evaluation, as ``STAGE-EPOCH``; ``None``: that of the result, or the newest one if
            the run has no result yet.
        sub_dataset: Only those of one sub-dataset.
        every: Return the right ones, too.

    Raises:
        RunError: The directory has no run, or the run has no such generations.
    """
    run = Path(run)
    counted = effective(read(run / JOURNAL))
    start = run_started(counted)
    found = find_predictions(run)
    if not found:
        raise RunError(
            f"{run / PREDICTIONS} has no generations: the metrics of the run need none, "
            "evaluation.predictions is 0, or nothing was evaluated yet"
        )
    by_name = {f"{stage}-{epoch}": (stage, epoch) for stage, epoch in found}
    result = find_result_evaluation(counted)
    if at is None and result is not None:
        at = f"{result['stage']}-{epoch_text(result['epoch'])}"
    at = at or list(by_name)[-1]
    if at not in by_name:
        raise RunError(
            f"there are no generations of evaluation {at!r} in {run / PREDICTIONS}, only of "
            f"{', '.join(by_name)}"
        )
    rows = read_predictions(found[by_name[at]])
    written: dict[str, int] = {}
    for row in rows:
        written[row["sub_dataset"]] = written.get(row["sub_dataset"], 0) + 1
    if sub_dataset is not None:
        if sub_dataset not in written:
            raise RunError(
                f"evaluation {at} has no generations of {sub_dataset!r}, only of "
                f"{', '.join(sorted(written))}{did_you_mean(sub_dataset, written)}"
            )
        written = {sub_dataset: written[sub_dataset]}
        rows = [row for row in rows if row["sub_dataset"] == sub_dataset]
    modes = {name: mode_of(start, name) for name in written}
    stage, epoch = by_name[at]
    return Predictions(
        stage=stage,
        epoch=float(epoch),
        written=written,
        examples=rows if every else worst_first(rows, modes),
    )


def to_text(found: Predictions, *, limit: int) -> str:
    """Return the generations for the terminal, at most ``limit`` of each sub-dataset."""
    parts = [f"stage {found.stage}, epoch {epoch_text(found.epoch)}"]
    for name, written in found.written.items():
        rows = [row for row in found.examples if row["sub_dataset"] == name]
        shown = rows[: max(limit, 0)]
        more = "" if len(shown) == len(rows) else f", the first {len(shown)} of them are below"
        parts.append(f"{name}: {_count_text(rows, written)}{more}")
        parts += ["\n".join(_lines(row)) for row in shown]
    return printable("\n\n".join(parts))


def _count_text(rows: Sequence[Row], written: int) -> str:
    wrong = sum(row["right"] is False for row in rows)
    if all(row["right"] is None for row in rows) and rows:
        return f"{written} written generations" + (
            "" if rows[0]["score"] is None else ", the worst scores first"
        )
    return f"{wrong} of {written} written generations are wrong"


def _lines(row: Row) -> Iterator[str]:
    for field in _FIELDS:
        if row[field] is not None:
            end = " … (cut off: it is wrong already)" * (field == "generation")
            value = row[field] if field == "score" else repr(row[field])
            yield f"  {field:<11}{value}{'' if row['complete'] else end}"
