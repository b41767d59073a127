"""How far apart sub-datasets peak, and how an exclusion moves the peaks of the others.

Epochs are those of the active mixture, in which each of its examples comes once; so they are also
epochs of each sub-dataset that is in it, and comparable between stages.

Example::

    counted = effective(read(run / "journal.jsonl"))
    distance(peaks_of_stage(counted, 1))            # epochs from the mixture's peak, on average
    [shift.epochs for shift in shifts(counted) if shift.known]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.algorithms.peaks import first_best
from trainer.config.schema import OVERALL
from trainer.journal import Record


@dataclass(frozen=True, kw_only=True)
class StagePeak:
    """The first best evaluation of one curve within a stage."""

    epoch: float
    passed: bool
    """Whether an evaluation followed; otherwise the true peak may come later."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A sub-dataset's peak before and after another one's exclusion."""

    name: str
    stage: int
    """The stage after the exclusion."""
    expected: float
    """Epochs after the roll-back at which it peaked in the stage before."""
    found: float
    """Epochs after the roll-back at which it peaks without the excluded one."""
    known: bool
    """Whether both peaks had passed when their stages ended."""

    @property
    def epochs(self) -> float:
        """How much later it peaks; negative: earlier."""
        return self.found - self.expected


def peaks_of_stage(counted: Sequence[Record], stage: int) -> dict[str, StagePeak]:
    """Return the peaks within a stage of all its active sub-datasets and of the mixture.

    ``counted`` are effective records. A curve without a finite value has no peak.
    """
    start = next(r for r in counted if r["event"] == "run_started")
    curve = [r for r in counted if r["event"] == "evaluated" and r["stage"] == stage]
    active: list[str] = next(
        (r["active"] for r in counted if r["event"] == "stage_started" and r["stage"] == stage), []
    )
    peaks = {}
    for name in [*sorted(active), OVERALL]:
        index = first_best((r["metrics"][name] for r in curve), start["mode"])
        if index is not None:
            peaks[name] = StagePeak(epoch=curve[index]["epoch"], passed=index + 1 < len(curve))
    return peaks


def distance(peaks: Mapping[str, StagePeak]) -> float | None:
    """Return the mean distance in epochs of the sub-datasets' peaks from the mixture's peak.

    Peaks that had not passed count with the epoch of the last evaluation. ``None`` where the
    mixture or every sub-dataset has no peak.
    """
    others = [peak.epoch for name, peak in peaks.items() if name != OVERALL]
    if OVERALL not in peaks or not others:
        return None
    return sum(abs(epoch - peaks[OVERALL].epoch) for epoch in others) / len(others)


def shifts(counted: Sequence[Record]) -> list[Shift]:
    """Return how each exclusion moved the peaks of the sub-datasets that remained.

    ``counted`` are effective records. A stage whose end excluded nobody tells nothing here.
    """
    found = []
    for decided in counted:
        if decided.get("decision") != "roll_back" or not decided["exclude"]:
            continue
        stage = decided["stage"]
        origin = next(
            r["epoch"]
            for r in counted
            if r["event"] == "evaluated"
            and r["stage"] == stage
            and r["checkpoint"] == decided["checkpoint"]
        )
        before, after = peaks_of_stage(counted, stage), peaks_of_stage(counted, stage + 1)
        found += [
            Shift(
                name=name,
                stage=stage + 1,
                expected=before[name].epoch - origin,
                found=peak.epoch,
                known=before[name].passed and peak.passed,
            )
            for name, peak in after.items()
            if name in before and name not in (OVERALL, *decided["exclude"])
        ]
    return found
