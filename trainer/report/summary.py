"""Summarize a run from its journal alone: peaks, metrics, disk and work.

A run that is not finished can be summarized, too; unknown values are ``None``.

The disk of the rollback points is compared with the paper's disk-managed variant, which keeps a
full copy of each distinct champion of the active sub-datasets, and of the best overall. The paper's
released code also never deletes the roots of earlier stages. The base, which is on disk anyway,
counts on no side.

Example::

    records = read(run / "journal.jsonl")
    summary = summarize(records)
    summary.disk.peak, summary.overall.test
    max(usage.peak_bytes for usage in measure_disk_usage(effective(records)))
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.algorithms.base import Mode
from trainer.algorithms.peaks import first_best_index, is_better
from trainer.config.schema import OVERALL
from trainer.errors import RunError
from trainer.journal import Record, effective, mode_of, replace_non_finite, run_started, select
from trainer.report.flops import Account, find_result_evaluation, find_stop
from trainer.report.headroom import Diagnosis, Forgetting, diagnose, measure_forgetting
from trainer.report.plan import rule_text
from trainer.text import metric_name_text, metric_title

_TIMED = ("trained", "evaluated", "averaged", "committed", "tested")
"""The events whose ``seconds`` do not overlap."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The peak of a sub-dataset in the last stage that trained on it."""

    stage: int
    epoch: float
    excluded: bool


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metric of a sub-dataset, or of the mixture, for the base and for the result."""

    base_validation: float | None
    base_test: float | None
    validation: float | None
    test: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The checkpoint that is the result of a run."""

    checkpoint: str
    stage: int
    epoch: float


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The bytes of all rollback points together, over the evaluations of a run."""

    checkpoint_bytes: int
    peak_bytes: int
    """The maximum, before eviction."""
    mean_bytes: float
    """The mean over the evaluations, after eviction."""
    paper_peak_copies: int
    """The maximum of full copies under the paper's disk-managed policy."""
    paper_mean_copies: float
    released_peak_copies: int
    """The maximum of full copies under the policy of the paper's released code."""
    released_mean_copies: float
    with_optimizer: bool
    """True if rollback points include the state of the optimizer; a full checkpoint never does."""
    max_disk: str | None
    resume_bytes: int
    """The resume point; 0 without one."""
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
    """The numbers of a run."""

    method: str
    rule: str
    """The stages of the method, or the rule that ends a roll-out."""
    metric: str
    """The metric of the mixture."""
    mode: Mode
    """The direction of the mixture's metric."""
    metrics: Mapping[str, str]
    """Sub-dataset → metric; empty in the journal of an earlier version."""
    modes: Mapping[str, Mode]
    """Sub-dataset → direction of its metric."""
    overall_rule: str | None
    """How the metric of the mixture is computed: ``evaluation.overall``."""
    lr: float
    dtype: str
    seed: int
    stages: int
    roll_backs: int
    """Returns to an earlier checkpoint. A stage without a peak continues from its end instead."""
    steps: int
    evaluations: int
    """Evaluations that were computed; those of known checkpoints are reused."""
    seconds: float
    result: Result | None
    divergences: int
    """Number of times that a training loss, a gradient norm or all validation losses were not
    finite."""
    diverged: bool
    """True if the last divergence ended the run."""
    never_right: bool
    """True if the metric is exact match and no evaluation had a right answer."""
    never_measured: bool
    """True if there are evaluations, and no metric gave a finite number in any of them."""
    peaks: Mapping[str, Peak]
    scores: Mapping[str, Scores]
    overall: Scores
    diagnosis: Diagnosis | None
    """``None`` where :func:`~trainer.report.headroom.diagnose` raises an error."""
    forgetting: Mapping[str, Forgetting]
    """By sub-dataset, of those that were excluded before the result."""
    disk: Disk | None
    """``None`` before the first commit."""
    account: Account

    @property
    def has_one_metric(self) -> bool:
        """True if all sub-datasets, and the mixture, have the same metric."""
        return all(metric == self.metric for metric in self.metrics.values())

    def overall_text(self) -> str:
        """Return a sentence on the metrics; empty if all are the same."""
        if self.has_one_metric:
            return ""
        parts = [
            f"{metric_name_text(metric, self.modes[name])} for {name}"
            for name, metric in self.metrics.items()
        ]
        means = {
            "relative": "the mean relative change against the base, in each metric's direction",
            "examples": f"the mean over the examples measured by {metric_title(self.metric)}",
            "sub_datasets": f"the mean over those measured by {metric_title(self.metric)}",
        }
        rule = means[self.overall_rule or "relative"]
        return f"The metrics are {', '.join(parts)}; overall is {rule}."

    def untested_text(self) -> str:
        """Return a sentence on the sub-datasets without test data; empty if all or none have it."""
        names = [name for name, scores in self.scores.items() if scores.test is None]
        if not names or self.overall.test is None:
            return ""
        verb = "has" if len(names) == 1 else "have"
        return f"The overall test figures leave out {', '.join(names)}, which {verb} no test data."

    def scores_of(self, name: str) -> Scores:
        """Return the scores of a sub-dataset, or of the mixture (``OVERALL``)."""
        return self.overall if name == OVERALL else self.scores[name]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; numbers that are not finite become ``None``."""
        tree: dict[str, Any] = replace_non_finite(asdict(self))
        if self.disk is not None:
            tree["disk"] |= {"peak": self.disk.peak, "mean": self.disk.mean}
        tree["diagnosis"] = self.diagnosis and self.diagnosis.to_dict()
        return tree


def summarize(records: Sequence[Record]) -> Summary:
    """Return the summary of a run from all records of its journal.

    Raises :class:`RunError` if the run ended before its first record.
    """
    counted = effective(records)
    start = run_started(counted)
    config = start["config"]
    metrics = dict(sorted((start.get("metrics") or {}).items()))
    evaluated = select(counted, "evaluated")
    found = find_result_evaluation(counted)
    base = evaluated[0]["metrics"] if evaluated else {}
    result = {} if found is None else found["metrics"]
    tests = {record["what"]: record["metrics"] for record in select(counted, "tested")}
    scores = {
        name: Scores(
            base_validation=base.get(name),
            base_test=tests.get("base", {}).get(name),
            validation=result.get(name),
            test=tests.get("result", {}).get(name),
        )
        for name in [*sorted(start["sub_datasets"]), OVERALL]
    }
    return Summary(
        method=start["method"],
        rule=rule_text(start["method"], config["msft"]["peak_window"]),
        metric=start["metric"],
        mode=start["mode"],
        metrics=metrics,
        modes={name: mode_of(start, name) for name in metrics},
        overall_rule=start.get("overall"),
        lr=config["train"]["lr"],
        dtype=start["model"]["dtype"],
        seed=config["seed"],
        stages=len(select(counted, "stage_started")),
        roll_backs=len(find_roll_backs(counted)),
        steps=max((record["step"] for record in select(counted, "trained")), default=0),
        evaluations=sum(not record["reused"] for record in evaluated)
        + len(select(counted, "averaged")),
        seconds=math.fsum(record.get("seconds") or 0 for record in select(counted, *_TIMED)),
        result=None
        if found is None
        else Result(checkpoint=found["checkpoint"], stage=found["stage"], epoch=found["epoch"]),
        divergences=len(select(counted, "diverged")),
        diverged=_has_diverged(counted),
        never_right=(set(metrics.values()) or {start["metric"]}) == {"exact_match"}
        and bool(evaluated)
        and all(not value > 0 for r in evaluated for value in r["metrics"].values()),
        never_measured=bool(evaluated)
        and not any(math.isfinite(value) for r in evaluated for value in r["metrics"].values()),
        peaks=find_sub_dataset_peaks(counted),
        scores={name: score for name, score in scores.items() if name != OVERALL},
        overall=scores[OVERALL],
        diagnosis=_diagnose(counted),
        forgetting=measure_forgetting(counted),
        disk=_summarize_disk(counted, start),
        account=Account.from_journal(records),
    )


def _diagnose(counted: Sequence[Record]) -> Diagnosis | None:
    try:
        return diagnose(counted)
    except RunError:
        return None


def find_roll_backs(counted: Sequence[Record]) -> list[Record]:
    """Return the decisions that go back to a checkpoint before the evaluation that they follow."""
    newest = {(r["stage"], r["index"]): r["checkpoint"] for r in select(counted, "evaluated")}
    return [
        record
        for record in select(counted, "decided")
        if record["decision"] == "roll_back"
        and record["checkpoint"] != newest[record["stage"], record["index"]]
    ]


def find_sub_dataset_peaks(counted: Sequence[Record]) -> dict[str, Peak]:
    """Return each sub-dataset's first best evaluation in the last stage that trained on it."""
    start = run_started(counted)
    last_stage = {n: r["stage"] for r in select(counted, "stage_started") for n in r["active"]}
    excluded = {name for record in select(counted, "decided") for name in record["exclude"]}
    peaks = {}
    for name, stage in sorted(last_stage.items()):
        curve = [r for r in select(counted, "evaluated") if r["stage"] == stage]
        index = first_best_index((r["metrics"][name] for r in curve), mode_of(start, name))
        if index is not None:
            peaks[name] = Peak(stage=stage, epoch=curve[index]["epoch"], excluded=name in excluded)
    return peaks


def _has_diverged(counted: Sequence[Record]) -> bool:
    """Return whether the decision to stop follows a divergence."""
    stop = find_stop(counted)
    diverged = {record["seq"] for record in select(counted, "diverged")}
    return stop is not None and stop["seq"] - 1 in diverged


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """The disk of the rollback points at an evaluation whose checkpoint was committed."""

    step: int
    peak_bytes: int
    """Bytes of the store before eviction, the new checkpoint included."""
    bytes: int
    paper_copies: int
    """Full copies under the paper's policy; for plain SFT only the best overall."""
    released_copies: int
    """The same with the roots of all stages so far."""


def measure_disk_usage(counted: Sequence[Record]) -> list[DiskUsage]:
    """Return the disk usage at each evaluation whose checkpoint was committed."""
    start = run_started(counted)
    usages: list[DiskUsage] = []
    base: str | None = None
    best: str | None = None
    best_value: float | None = None
    roots: set[str] = set()
    active: Sequence[str] = ()
    curve: list[Record] = []
    committed: Record | None = None
    for record in counted:
        match record["event"]:
            case "stage_started":
                active, curve = (() if start["method"] == "sft" else record["active"]), []
                base = base or record["root"]
                roots.add(record["root"])
            case "committed":
                committed = record
            case "evaluated":
                curve.append(record)
                value = record["metrics"][OVERALL]
                ranks = not record.get("carried")
                if ranks and is_better(value, best_value, start["mode"]):
                    best, best_value = record["checkpoint"], value
                if committed is not None and committed["checkpoint"] == record["checkpoint"]:
                    copies = {best, *_champions(curve, active, start)} - {base, None}
                    usages.append(
                        DiskUsage(
                            step=committed["step"],
                            peak_bytes=committed["disk_peak_bytes"],
                            bytes=committed["disk_bytes"],
                            paper_copies=len(copies),
                            released_copies=len(copies | roots - {base}),
                        )
                    )
                committed = None
    return usages


def _champions(curve: Sequence[Record], active: Sequence[str], start: Record) -> set[str]:
    """Return the distinct checkpoints of the active sub-datasets' first best evaluations."""
    indices = {
        first_best_index((r["metrics"][name] for r in curve), mode_of(start, name))
        for name in active
    }
    return {curve[index]["checkpoint"] for index in indices if index is not None}


def _summarize_disk(counted: Sequence[Record], start: Record) -> Disk | None:
    usages = measure_disk_usage(counted)
    if not usages:
        return None
    return Disk(
        checkpoint_bytes=start["full_checkpoint_bytes"],
        peak_bytes=max(r["disk_peak_bytes"] for r in counted if "disk_peak_bytes" in r),
        mean_bytes=statistics.fmean(usage.bytes for usage in usages),
        paper_peak_copies=max(usage.paper_copies for usage in usages),
        paper_mean_copies=statistics.fmean(usage.paper_copies for usage in usages),
        released_peak_copies=max(usage.released_copies for usage in usages),
        released_mean_copies=statistics.fmean(usage.released_copies for usage in usages),
        with_optimizer=start["config"]["msft"].get("optimizer_on_rollback") == "restore",
        max_disk=start["config"].get("max_disk"),
        resume_bytes=max((r["bytes"] for r in select(counted, "resume_point")), default=0),
        base_bytes=start["base_bytes"],
    )
