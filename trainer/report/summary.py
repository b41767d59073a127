"""The results of a run, from its journal alone: peaks, metrics, disk, work.

Works on a run that is not over yet, too: what is not known then is ``None``.

Example::

    summary = summarize(read(run / "journal.jsonl"))
    summary.disk.peak, summary.overall.test

Disk of the rollback points over a run, beside what the paper's policy would have held.

The paper's disk-managed variant keeps a full copy per distinct champion of the active sub-datasets,
and of the best overall. Its copies are counted here at the same evaluations, from the same metrics.
The base is on disk anyway and counts on neither side.

Example::

    points = measure_disk_usage(effective(read(run / "journal.jsonl")))
    max(point.peak_bytes for point in points) / checkpoint_bytes
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.algorithms.base import Mode
from trainer.algorithms.peaks import first_best_index, is_better
from trainer.config.schema import OVERALL
from trainer.errors import RunError
from trainer.journal import Record, effective
from trainer.report.flops import Account
from trainer.report.plan import rule_text


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """The disk at one evaluation that was committed."""

    step: int
    peak_bytes: int
    """Under the store before eviction, the new checkpoint included."""
    bytes: int
    """Under the store after eviction."""
    paper_copies: int
    """Full copies that the paper's policy would hold now; for plain SFT the best overall alone."""


def measure_disk_usage(counted: Sequence[Record]) -> list[DiskUsage]:
    """Return a point for each evaluation that was committed; ``counted`` are effective records."""
    points: list[DiskUsage] = []
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
    indices = {first_best_index((r["metrics"][name] for r in seen), mode) for name in active}
    return {seen[index]["checkpoint"] for index in indices if index is not None}


def _point(committed: Record, paper_copies: int) -> DiskUsage:
    return DiskUsage(
        step=committed["step"],
        peak_bytes=committed["disk_peak_bytes"],
        bytes=committed["disk_bytes"],
        paper_copies=paper_copies,
    )


_TIMED = ("trained", "evaluated", "committed", "tested")
"""Events whose ``seconds`` do not overlap."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The peak of a sub-dataset in the last stage that trained on it."""

    stage: int
    epoch: float
    """In that stage."""
    excluded: bool
    """True if the sub-dataset was excluded for this peak."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metric of one sub-dataset, or of the mixture, for the base and for the result."""

    base_validation: float | None
    base_test: float | None
    validation: float | None
    test: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The checkpoint that a run returned."""

    checkpoint: str
    stage: int
    epoch: float


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes of all rollback points together, over the evaluations of a run."""

    checkpoint_bytes: int
    """One full checkpoint in the dtype of the run; the unit of the shares."""
    peak_bytes: int
    """The most at any time, before eviction."""
    mean_bytes: float
    """Mean over the evaluations, after eviction."""
    paper_peak_copies: int
    """Full copies under the paper's disk-managed policy, at most."""
    paper_mean_copies: float
    with_optimizer: bool
    """True if rollback points hold the optimizer's state too; the unit is the weights alone."""
    max_disk: str | None
    """The limit that was set."""
    resume_bytes: int
    """The one resume point; 0 without."""
    base_bytes: int

    @property
    def peak(self) -> float:
        """``peak_bytes`` in full checkpoints: the disk overhead."""
        return self.peak_bytes / self.checkpoint_bytes

    @property
    def mean(self) -> float:
        """``mean_bytes`` in full checkpoints."""
        return self.mean_bytes / self.checkpoint_bytes


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in numbers."""

    method: str
    rule: str
    """When a roll-out ends: the paper's rule, or a peak window."""
    metric: str
    mode: Mode
    lr: float
    dtype: str
    seed: int
    stages: int
    roll_backs: int
    """Returns to an earlier checkpoint; a stage without a peak goes on from its end instead."""
    steps: int
    evaluations: int
    """Computed ones, without those known already."""
    seconds: float
    """Spent in training, evaluation and commits."""
    result: Result | None
    divergences: int
    """How many times a training loss, or a gradient norm, or all validation losses were not
    finite."""
    diverged: bool
    """True if the last of them ended the run."""
    peaks: Mapping[str, Peak]
    scores: Mapping[str, Scores]
    """By sub-dataset."""
    overall: Scores
    disk: Disk | None
    """``None`` before the first commit."""
    account: Account

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; a number that is not finite becomes ``None``."""
        tree: dict[str, Any] = _finite(asdict(self))
        if self.disk is not None:
            tree["disk"] |= {"peak": self.disk.peak, "mean": self.disk.mean}
        return tree


def summarize(records: Sequence[Record]) -> Summary:
    """Return the summary of a run from all records of its journal."""
    counted = effective(records)
    start = next((r for r in counted if r["event"] == "run_started"), None)
    if start is None:
        raise RunError("the journal has no run_started record: the run ended before it began")
    config = start["config"]
    evaluated = [r for r in counted if r["event"] == "evaluated"]
    result = _result(counted, evaluated)
    scores = {
        name: _scores(name, counted, evaluated, result)
        for name in [*sorted(start["sub_datasets"]), OVERALL]
    }
    return Summary(
        method=start["method"],
        rule=rule_text(start["method"], config["msft"]["peak_window"]),
        metric=start["metric"],
        mode=start["mode"],
        lr=config["train"]["lr"],
        dtype=start["model"]["dtype"],
        seed=config["seed"],
        stages=sum(r["event"] == "stage_started" for r in counted),
        roll_backs=sum(
            r["event"] == "decided" and restores_earlier_checkpoint(r, evaluated) for r in counted
        ),
        steps=max((r["step"] for r in counted if r["event"] == "trained"), default=0),
        evaluations=sum(not r["reused"] for r in evaluated),
        seconds=math.fsum(r.get("seconds") or 0 for r in counted if r["event"] in _TIMED),
        result=result,
        divergences=sum(r["event"] == "diverged" for r in counted),
        diverged=_has_diverged(counted),
        peaks=sub_dataset_peaks(counted),
        scores={name: value for name, value in scores.items() if name != OVERALL},
        overall=scores[OVERALL],
        disk=_disk(counted, start),
        account=Account.from_journal(records),
    )


def restores_earlier_checkpoint(decided: Record, evaluated: Sequence[Record]) -> bool:
    """Say whether a decision returns to a checkpoint before the evaluation that it follows."""
    if decided["decision"] != "roll_back":
        return False
    here = next(r for r in evaluated if _place(r) == _place(decided))
    return bool(here["checkpoint"] != decided["checkpoint"])


def stop_decision(counted: Sequence[Record]) -> Record | None:
    """Return the decision that ended the run, or ``None`` while it goes on."""
    return next((r for r in counted if r.get("decision") == "stop"), None)


def _has_diverged(counted: Sequence[Record]) -> bool:
    stop = stop_decision(counted)
    events = {r["seq"]: r["event"] for r in counted}
    return stop is not None and events.get(stop["seq"] - 1) == "diverged"


def _place(record: Record) -> tuple[int, int]:
    return record["stage"], record["index"]


def _result(counted: Sequence[Record], evaluated: Sequence[Record]) -> Result | None:
    stop = stop_decision(counted)
    if stop is None:
        return None
    found = next(r for r in evaluated if r["checkpoint"] == stop["checkpoint"])
    return Result(checkpoint=found["checkpoint"], stage=found["stage"], epoch=found["epoch"])


def _scores(
    name: str, counted: Sequence[Record], evaluated: Sequence[Record], result: Result | None
) -> Scores:
    tests = {r["what"]: r["metrics"].get(name) for r in counted if r["event"] == "tested"}
    validation = None
    if result is not None:
        chosen = next(r for r in evaluated if r["checkpoint"] == result.checkpoint)
        validation = chosen["metrics"][name]
    return Scores(
        base_validation=evaluated[0]["metrics"][name] if evaluated else None,
        base_test=tests.get("base"),
        validation=validation,
        test=tests.get("result"),
    )


def sub_dataset_peaks(counted: Sequence[Record]) -> dict[str, Peak]:
    """Return each sub-dataset's first best evaluation in the last stage that trained on it."""
    mode: Mode = next(r["mode"] for r in counted if r["event"] == "run_started")
    evaluated = [r for r in counted if r["event"] == "evaluated"]
    last_stage = {
        name: r["stage"] for r in counted if r["event"] == "stage_started" for name in r["active"]
    }
    excluded = {name for r in counted if r["event"] == "decided" for name in r["exclude"]}
    peaks = {}
    for name, stage in sorted(last_stage.items()):
        curve = [r for r in evaluated if r["stage"] == stage]
        index = first_best_index((r["metrics"][name] for r in curve), mode)
        if index is not None:
            peaks[name] = Peak(stage=stage, epoch=curve[index]["epoch"], excluded=name in excluded)
    return peaks


def _disk(counted: Sequence[Record], start: Record) -> Disk | None:
    points: list[DiskUsage] = measure_disk_usage(counted)
    if not points:
        return None
    return Disk(
        checkpoint_bytes=start["full_checkpoint_bytes"],
        peak_bytes=max(r["disk_peak_bytes"] for r in counted if "disk_peak_bytes" in r),
        mean_bytes=math.fsum(point.bytes for point in points) / len(points),
        paper_peak_copies=max(point.paper_copies for point in points),
        paper_mean_copies=math.fsum(point.paper_copies for point in points) / len(points),
        with_optimizer=start["config"]["msft"].get("optimizer_on_rollback") == "restore",
        max_disk=start["config"].get("max_disk"),
        resume_bytes=max((r["bytes"] for r in counted if r["event"] == "resume_point"), default=0),
        base_bytes=start["base_bytes"],
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
