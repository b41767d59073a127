"""Measure how far apart sub-datasets peak, and how an exclusion moves the peaks of the others.

An epoch of the active mixture contains each example once, so it is also an epoch of each active
sub-dataset. Epochs are therefore comparable between stages.

Example::

    records = effective(read(run / "journal.jsonl"))
    mean_peak_distance(find_stage_peaks(records, 1))      # epochs from the mixture's peak
    [shift.epochs for shift in find_peak_shifts(records) if shift.is_known]
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.algorithms.peaks import first_best_index
from trainer.config.schema import OVERALL
from trainer.journal import Record, mode_of, run_started, select


@dataclass(frozen=True, kw_only=True)
class StagePeak:
    """The first best evaluation of one curve within a stage."""

    epoch: float
    has_passed: bool
    """True if an evaluation followed; otherwise the true peak may come later."""


@dataclass(frozen=True, kw_only=True)
class PeakShift:
    """The peak of a sub-dataset before and after the exclusion of another one."""

    name: str
    stage: int
    """The stage after the exclusion."""
    expected: float
    """Epochs after the roll-back at which it peaked in the stage before."""
    actual: float
    """Epochs after the roll-back at which it peaks without the excluded one."""
    is_known: bool
    """True if both peaks had passed when their stages ended."""

    @property
    def epochs(self) -> float:
        """Epochs by which it peaks later; negative if earlier."""
        return self.actual - self.expected


def find_stage_peaks(counted: Sequence[Record], stage: int) -> dict[str, StagePeak]:
    """Return the peaks of the active sub-datasets and of the mixture within a stage.

    A curve without a finite value has no peak.
    """
    start = run_started(counted)
    curve = [r for r in select(counted, "evaluated") if r["stage"] == stage]
    active = {r["stage"]: r["active"] for r in select(counted, "stage_started")}
    peaks = {}
    for name in [*sorted(active.get(stage, [])), OVERALL]:
        index = first_best_index((r["metrics"][name] for r in curve), mode_of(start, name))
        if index is not None:
            peaks[name] = StagePeak(epoch=curve[index]["epoch"], has_passed=index + 1 < len(curve))
    return peaks


def mean_peak_distance(peaks: Mapping[str, StagePeak]) -> float | None:
    """Return the mean distance in epochs of the sub-datasets' peaks from the mixture's peak.

    A peak that had not passed counts as the epoch of the last evaluation. Returns ``None`` if the
    mixture or every sub-dataset has no peak.
    """
    others = [peak.epoch for name, peak in peaks.items() if name != OVERALL]
    if OVERALL not in peaks or not others:
        return None
    return statistics.fmean(abs(epoch - peaks[OVERALL].epoch) for epoch in others)


def find_peak_shifts(counted: Sequence[Record]) -> list[PeakShift]:
    """Return how each exclusion moved the peaks of the remaining sub-datasets.

    Stages that excluded no sub-dataset are skipped.
    """
    found = []
    for decided in counted:
        if decided.get("decision") != "roll_back" or not decided["exclude"]:
            continue
        stage = decided["stage"]
        origin = next(
            r["epoch"]
            for r in select(counted, "evaluated")
            if r["stage"] == stage and r["checkpoint"] == decided["checkpoint"]
        )
        before, after = find_stage_peaks(counted, stage), find_stage_peaks(counted, stage + 1)
        found += [
            PeakShift(
                name=name,
                stage=stage + 1,
                expected=before[name].epoch - origin,
                actual=peak.epoch,
                is_known=before[name].has_passed and peak.has_passed,
            )
            for name, peak in after.items()
            if name in before and name not in (OVERALL, *decided["exclude"])
        ]
    return found
