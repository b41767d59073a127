"""Measure what MSFT can win over plain SFT and what it loses: pure functions over the journal.

The *headroom* of a sub-dataset is how much better its own best evaluation in SFT's roll-out is than
its value at SFT's best overall checkpoint. The first stage of SFT, single roll-out and MSFT is that
roll-out. The *forgetting* of a sub-dataset that was excluded is how much worse it is at the run's
result than at the checkpoint where it was excluded. Positive headroom is a possible gain, positive
forgetting a loss, whatever the direction of the metric.

Going back to each peak gains the headroom of all N sub-datasets at most, and costs the forgetting
of the excluded. So in the mean over sub-datasets MSFT can win only where the mean headroom exceeds
the sum of the forgetting divided by N.

Example::

    diagnosis = diagnose(effective(read(run / "journal.jsonl")))
    diagnosis.mean_headroom, diagnosis.mean_forgetting, diagnosis.may_pay, diagnosis.verdict()
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.algorithms.base import Mode
from trainer.algorithms.peaks import first_best_index
from trainer.config.schema import OVERALL
from trainer.errors import RunError
from trainer.journal import Record, metric_of, mode_of, replace_non_finite, run_started, select
from trainer.report.flops import find_result_evaluation

METHODS = ("sft", "single_rollout", "msft")
"""The methods whose first stage is the roll-out of plain SFT."""


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """The headroom of one sub-dataset."""

    at_best_overall: float
    """The metric at SFT's best overall checkpoint."""
    own_best: float
    """The metric at the sub-dataset's own first best evaluation of the roll-out."""
    epoch: float
    """The epoch of that evaluation."""
    has_passed: bool
    """True if an evaluation followed; otherwise the headroom is a lower bound."""
    change: float
    """The headroom in the metric's unit, at least 0."""
    relative: float
    """The headroom divided by the base's value, or itself where that is 0."""
    error: float | None
    """The standard error of the own best over the validation examples, if known."""

    @property
    def is_clear(self) -> bool:
        """True if the headroom is more than 0 and than one standard error."""
        return self.change > (self.error or 0.0)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The forgetting of one sub-dataset."""

    stage: int
    """The stage that excluded it."""
    at_exclusion: float
    """The metric at the checkpoint where it was excluded."""
    at_result: float
    """The metric at the run's result."""
    change: float
    """The forgetting in the metric's unit; negative if the sub-dataset still improved."""
    relative: float
    """The forgetting divided by the base's value, or itself where that is 0."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Headroom and forgetting of a run."""

    count: int
    """N, the number of sub-datasets."""
    epoch: float
    """The epoch of SFT's best overall checkpoint."""
    last_epoch: float
    """The last epoch of SFT's roll-out."""
    is_relative: bool
    """True if the sub-datasets' metrics differ, so that only relative values have a mean."""
    is_sfts: bool
    """True if the run has rolled back, but its result is SFT's best overall checkpoint."""
    headroom: Mapping[str, Headroom]
    """By sub-dataset, without those whose metric is not finite."""
    forgetting: Mapping[str, Forgetting]
    """By sub-dataset, of those that were excluded before the run's result."""

    @property
    def mean_headroom(self) -> float:
        """The mean over the sub-datasets."""
        return statistics.fmean(map(self.value, self.headroom.values()))

    @property
    def mean_forgetting(self) -> float:
        """The sum over the excluded sub-datasets, divided by the number of all."""
        return math.fsum(map(self.value, self.forgetting.values())) / self.count

    @property
    def spread(self) -> float:
        """The epochs between the earliest and the latest of the sub-datasets' own bests."""
        epochs = [one.epoch for one in self.headroom.values()]
        return max(epochs) - min(epochs)

    @property
    def clear(self) -> list[str]:
        """The sub-datasets whose headroom is more than noise."""
        return [name for name, one in self.headroom.items() if one.is_clear]

    @property
    def noise(self) -> list[str]:
        """The sub-datasets whose headroom is within one standard error."""
        return [name for name, one in self.headroom.items() if one.change > 0 and not one.is_clear]

    @property
    def unpassed(self) -> list[str]:
        """The sub-datasets that were best at the last evaluation of the roll-out."""
        return [name for name, one in self.headroom.items() if not one.has_passed]

    @property
    def may_pay(self) -> bool:
        """True unless the run shows that MSFT wins nothing on this mixture."""
        if not self.clear or self.is_sfts:
            return False
        gain, loss = self.mean_headroom, self.mean_forgetting
        return not self.forgetting or (gain > loss and not math.isclose(gain, loss))

    def value(self, one: Headroom | Forgetting) -> float:
        """Return what counts in the means."""
        return one.relative if self.is_relative else one.change

    def value_text(self, value: float) -> str:
        """Return a mean, or what counts in it, in percent if it is relative."""
        return f"{value:.1%}" if self.is_relative else f"{value:.3f}"

    def verdict(self) -> str:
        """Return a sentence that says whether this mixture is one for MSFT."""
        headroom = self.value_text(self.mean_headroom)
        lost = self.value_text(self.mean_forgetting)
        if not self.clear:
            by = " by more than one standard error" if self.noise else ""
            return (
                f"As far as {self.last_epoch:.2f} epochs of SFT show, this mixture is not one for "
                "MSFT: no sub-dataset's own best is better than its value at SFT's best overall "
                f"checkpoint{by}, so there is nothing to win."
            )
        if self.is_sfts:
            return (
                "This mixture is not one for MSFT: the mean headroom was "
                f"{headroom}, but no later stage was better than SFT's best overall checkpoint, "
                "which is the result."
            )
        if not self.forgetting:
            total = self.value_text(self.mean_headroom * self.count)
            return (
                f"This mixture may be one for MSFT: the mean headroom is {headroom}, so it pays if "
                f"the forgetting of the excluded adds up to less than {total}."
            )
        if self.may_pay:
            return (
                f"This mixture is one for MSFT: the mean headroom, {headroom}, exceeds the "
                f"forgetting, {lost} (its sum divided by all {self.count} sub-datasets)."
            )
        return (
            f"This mixture is not one for MSFT: the mean headroom, {headroom}, does not exceed the "
            f"forgetting, {lost} (its sum divided by all {self.count} sub-datasets); what this run "
            "gained on SFT, it gained by training longer, as SFT may do, too."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; numbers that are not finite become ``None``."""
        tree: dict[str, Any] = asdict(self) | {
            "mean_headroom": self.mean_headroom,
            "mean_forgetting": self.mean_forgetting if self.forgetting else None,
            "spread": self.spread,
            "noise": self.noise,
            "unpassed": self.unpassed,
            "may_pay": self.may_pay,
            "verdict": self.verdict(),
        }
        finite: dict[str, Any] = replace_non_finite(tree)
        return finite


def diagnose(counted: Sequence[Record]) -> Diagnosis:
    """Return headroom and forgetting of a run.

    Raises :class:`RunError` if the run has no roll-out of plain SFT that has ended, or if no
    evaluation of it has a finite overall metric.
    """
    start = run_started(counted)
    if start["method"] not in METHODS:
        raise RunError(
            f"a run of {start['method']} has no roll-out of plain SFT, of which the headroom is "
            f"measured: give a run of {', '.join(METHODS[:-1])} or {METHODS[-1]}"
        )
    curve = [record for record in select(counted, "evaluated") if record["stage"] == 1]
    ends = [r for r in select(counted, "decided") if r["decision"] in ("roll_back", "stop")]
    if not ends:
        raise RunError(
            "the first roll-out of the run is not over, so its headroom is unknown: continue with "
            "`msft-train resume RUN`"
        )
    result = find_result_evaluation(counted)
    best = first_best_index((r["metrics"][OVERALL] for r in curve), start["mode"])
    if best is None:
        raise RunError("no evaluation of the first roll-out has a finite overall metric")
    sft = result if result is not None and result in curve else curve[best]
    metrics = {metric_of(start, name) for name in start["sub_datasets"]}
    found = {
        name: _measure_headroom(name, curve, sft, mode_of(start, name))
        for name in sorted(start["sub_datasets"])
    }
    headroom = {name: one for name, one in found.items() if one is not None}
    if not headroom:
        raise RunError("no sub-dataset has a finite metric at the best overall checkpoint")
    return Diagnosis(
        count=len(start["sub_datasets"]),
        epoch=sft["epoch"],
        last_epoch=curve[-1]["epoch"],
        is_relative=len(metrics) > 1,
        is_sfts=result is sft and ends[0]["decision"] == "roll_back",
        headroom=headroom,
        forgetting=measure_forgetting(counted),
    )


def _measure_headroom(
    name: str, curve: Sequence[Record], sft: Record, mode: Mode
) -> Headroom | None:
    """Return the headroom of a sub-dataset, or ``None`` if its metric is not finite."""
    index = first_best_index((record["metrics"][name] for record in curve), mode)
    value = sft["metrics"][name]
    if index is None or not math.isfinite(value):
        return None
    best = curve[index]
    error = (best.get("errors") or {}).get(name)
    change, relative = _improvement(best["metrics"][name], value, curve[0]["metrics"][name], mode)
    return Headroom(
        at_best_overall=value,
        own_best=best["metrics"][name],
        epoch=best["epoch"],
        has_passed=index + 1 < len(curve),
        change=change,
        relative=relative,
        error=error if error is not None and math.isfinite(error) else None,
    )


def measure_forgetting(counted: Sequence[Record]) -> dict[str, Forgetting]:
    """Return the forgetting of the sub-datasets that were excluded before the result.

    Any method may exclude. A sub-dataset that came back has not been excluded.
    """
    start, result = run_started(counted), find_result_evaluation(counted)
    if result is None:
        return {}
    evaluated = select(counted, "evaluated", "averaged")
    base = evaluated[0]["metrics"]
    values = {r["checkpoint"]: r["metrics"] for r in evaluated}
    places = {
        (r["stage"], r["index"]): r["metrics"] for r in evaluated if r["event"] == "evaluated"
    }
    found: dict[str, Forgetting] = {}
    end = next(r["seq"] for r in evaluated if r["checkpoint"] == result["checkpoint"])
    for decided in select(counted, "decided"):
        if decided["seq"] > end:
            break
        for name in decided.get("include") or ():
            found.pop(name, None)
        # Without a roll-back the sub-dataset left where the run stood.
        at = values.get(decided["checkpoint"]) or places[decided["stage"], decided["index"]]
        for name in decided["exclude"]:
            peak, now = at[name], result["metrics"][name]
            if math.isfinite(peak) and math.isfinite(now):
                change, relative = _improvement(peak, now, base[name], mode_of(start, name))
                found[name] = Forgetting(
                    stage=decided["stage"],
                    at_exclusion=peak,
                    at_result=now,
                    change=change,
                    relative=relative,
                )
    return dict(sorted(found.items()))


def _improvement(better: float, worse: float, base: float, mode: Mode) -> tuple[float, float]:
    """Return how much better the first value is than the second, also divided by the base's."""
    change = better - worse if mode == "max" else worse - better
    scale = abs(base) if math.isfinite(base) else 0.0
    return change, change / (scale or 1.0)
