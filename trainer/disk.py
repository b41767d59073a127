"""Disk of the rollback points over a run, beside what the paper's policy would have held.

The paper's disk-managed variant keeps a full copy per distinct champion of the active sub-datasets,
and of the best overall. Its copies are counted here at the same evaluations, from the same metrics.
The base is on disk anyway and counts on neither side.

Example::

    points = disk_points(effective(read(run / "journal.jsonl")))
    max(point.peak_bytes for point in points) / checkpoint_bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.journal import Record
from trainer.peaks import first_best, is_better
from trainer.strategy import OVERALL, Mode


@dataclass(frozen=True, kw_only=True)
class DiskPoint:
    """The disk at one evaluation that was committed."""

    step: int
    peak_bytes: int
    """Under the store before eviction, the new checkpoint included."""
    bytes: int
    """Under the store after eviction."""
    paper_copies: int
    """Full copies that the paper's policy would hold now; for plain SFT the best overall alone."""


def disk_points(counted: Sequence[Record]) -> list[DiskPoint]:
    """Return a point for each evaluation that was committed; ``counted`` are effective records."""
    points: list[DiskPoint] = []
    mode: Mode = "max"
    method = "msft"
    base: str | None = None
    best: str | None = None
    best_value: float | None = None
    active: list[str] = []
    seen: list[Record] = []
    committed: Record | None = None
    for record in counted:
        match record["event"]:
            case "run_started":
                mode, method = record["mode"], record["method"]
            case "stage_started":
                active, seen = ([] if method == "sft" else record["active"]), []
                base = base or record["root"]
            case "committed":
                committed = record
            case "evaluated":
                seen.append(record)
                value = record["metrics"][OVERALL]
                if is_better(value, best_value, mode):
                    best, best_value = record["checkpoint"], value
                held = _champions(seen, active, mode)
                if committed is not None and committed["checkpoint"] == record["checkpoint"]:
                    points.append(_point(committed, len((held | {best}) - {base, None})))
                committed = None
    return points


def _champions(seen: Sequence[Record], active: Sequence[str], mode: Mode) -> set[str | None]:
    """Return the distinct checkpoints of the active sub-datasets' first best evaluations."""
    indices = {first_best((r["metrics"][name] for r in seen), mode) for name in active}
    return {seen[index]["checkpoint"] for index in indices if index is not None}


def _point(committed: Record, paper_copies: int) -> DiskPoint:
    return DiskPoint(
        step=committed["step"],
        peak_bytes=committed["disk_peak_bytes"],
        bytes=committed["disk_bytes"],
        paper_copies=paper_copies,
    )
