"""Report the simulations of a run as tables and sentences, and as JSON values.

Example::

    run = simulate_own_policy(records)
    print(to_text(run, [simulate_policy(records, {"peak_window": 4})]))
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.config.schema import OVERALL, Config
from trainer.journal import Record, effective, run_started, select
from trainer.report.summary import measure_disk_usage
from trainer.simulate.policies import (
    policy_label,
    recorded_config,
    retention_named,
    with_policy,
)
from trainer.simulate.replay import Simulation, simulate
from trainer.simulate.retained import RetentionSummary, replay_retention, summarize_retention
from trainer.simulate.stage_ends import StageEnd
from trainer.text import Table, bytes_text, count_text, flops_text, metric_text


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Full copies of checkpoints under a policy: the most at once, and the mean."""

    peak: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class PolicyOutcome:
    """A policy and its simulation."""

    label: str
    policy: Mapping[str, Any]
    """The keys of ``msft`` that differ from the run's; empty for the run's own policy."""
    method: str
    simulation: Simulation
    retained: RetentionSummary | None
    """The rollback points over the simulated evaluations; ``None`` without a commit."""
    copies: Copies | None
    """Under the paper's policy: distinct champions and the best overall."""
    released: Copies | None
    """Under the policy of its released code, which never deletes the roots of stages."""
    measured: tuple[int, float] | None
    """Peak and mean bytes of the run's own rollback points in its store; ``None`` for any other
    policy."""
    checkpoint_bytes: int

    def to_dict(self) -> dict[str, Any]:
        simulation = self.simulation
        best = simulation.best and {
            **{key: simulation.best[key] for key in ("stage", "epoch", "checkpoint")},
            "overall": simulation.best["metrics"][OVERALL],
        }
        return {
            "label": self.label,
            "method": self.method,
            "policy": dict(self.policy),
            "ending": simulation.ending,
            "why": simulation.why,
            "stages": [asdict(stage) for stage in simulation.stages],
            "recorded": asdict(simulation.recorded),
            "simulated": asdict(simulation.simulated),
            "best": best,
            "rollback_points": None if self.retained is None else asdict(self.retained),
            "measured_bytes": self.measured,
            "full_copies": None if self.copies is None else asdict(self.copies),
            "released_copies": None if self.released is None else asdict(self.released),
            "checkpoint_bytes": self.checkpoint_bytes,
        }


def simulate_own_policy(records: Sequence[Record]) -> PolicyOutcome:
    """Return the outcome of the run's own policy on its own curves."""
    usages = measure_disk_usage(effective(records))
    measured = None
    if usages:
        peak = max(usage.peak_bytes for usage in usages)
        measured = peak, statistics.fmean(usage.bytes for usage in usages)
    own = _outcome("as recorded", {}, records, recorded_config(records), "needs")
    return replace(own, measured=measured)


def simulate_policy(
    records: Sequence[Record],
    policy: Mapping[str, Any],
    *,
    method: str = "msft",
    retention: str = "needs",
) -> PolicyOutcome:
    """Simulate a policy on all records of a journal.

    Raises :class:`ConfigError` if the policy is invalid, and :class:`RunError` if the journal
    cannot be simulated on.
    """
    config = with_policy(recorded_config(records), policy, method=method)
    name = policy_label(policy) if policy else f"{method}, the run's own options"
    return _outcome(name, policy, records, config, retention)


def _outcome(
    name: str,
    policy: Mapping[str, Any],
    records: Sequence[Record],
    config: Config,
    retention: str,
) -> PolicyOutcome:
    simulation = simulate(records, config)
    counted = effective(records)
    sizes = {r["checkpoint"]: r["stored_bytes"] for r in select(counted, "committed")}
    usages, gone = replay_retention(simulation, retention_named(retention), sizes)
    usage_by_time = measure_disk_usage(simulation.records)
    return PolicyOutcome(
        label=name,
        policy=policy,
        method=config.method,
        simulation=simulation,
        retained=summarize_retention(usages, gone, sizes),
        copies=_count_copies([usage.paper_copies for usage in usage_by_time]),
        released=_count_copies([usage.released_copies for usage in usage_by_time]),
        measured=None,
        checkpoint_bytes=run_started(counted)["full_checkpoint_bytes"],
    )


def _count_copies(copies: Sequence[int]) -> Copies | None:
    return Copies(peak=max(copies), mean=statistics.fmean(copies)) if copies else None


def to_text(run: PolicyOutcome, outcomes: Sequence[PolicyOutcome]) -> str:
    """Return tables and sentences for the terminal; ``run`` is the run's own policy."""
    parts = [_table([run, *outcomes]).to_text(), _NOTE]
    if len(outcomes) > 1:
        return "\n\n".join([*parts, *(f"{o.label}: {o.simulation.why}" for o in outcomes)])
    (one,) = outcomes
    parts += [_stage_table(one.simulation).to_text(), one.simulation.why]
    lines = [f"As recorded: {_disk_text(run)}", f"Simulated: {_disk_text(one)}"]
    return "\n\n".join([*parts, "\n".join([*lines, *_gone_lines(one)])])


_NOTE = (
    "Steps, FLOPs and evaluations are of the stages that are known, beside the run's in the same "
    "stages; the best\noverall is that of the known evaluations. Points are rollback points after "
    "an evaluation, peak before eviction."
)


def _table(outcomes: Sequence[PolicyOutcome]) -> Table:
    run = outcomes[0]
    header = ("policy", "known", "steps", "training FLOPs", "evaluations", "best overall", "points")
    rows = []
    for one in outcomes:
        mine, its = one.simulation.simulated, one.simulation.recorded
        pairs = [
            (count_text(mine.steps), count_text(its.steps)),
            (flops_text(mine.training.flops), flops_text(its.training.flops)),
            (count_text(mine.evaluations), count_text(its.evaluations)),
        ]
        spent = [a if one is run else f"{a} of {b}" for a, b in pairs]
        found = one.simulation.best
        best = metric_text(None if found is None else found["metrics"][OVERALL])
        retained = one.retained
        points = "-" if retained is None else f"{retained.peak}, mean {retained.mean:.2f}"
        rows.append([one.label, _known_text(one.simulation), *spent, best, points])
    return Table(header=header, rows=rows)


def _known_text(simulation: Simulation) -> str:
    count = len(simulation.stages)
    known = f"{count} stage{'s' * (count != 1)}"
    return f"all, {known}" if simulation.ending == "result" else known


def _stage_table(simulation: Simulation) -> Table:
    rows = [
        [
            str(stage.number),
            str(len(stage.active)),
            *map(_end_text, (stage.recorded, stage.simulated)),
        ]
        for stage in simulation.stages
    ]
    return Table(header=("stage", "active", "the run", "simulated"), rows=rows, numeric=False)


def _end_text(end: StageEnd | None) -> str:
    if end is None:
        return "trains on"
    verb = "back to" if end.decision == "roll_back" else "result"
    return f"{end.epoch:.2f}: {end.exclusion}, {verb} {end.to_stage}/{end.to_epoch:.2f}"


def _disk_text(one: PolicyOutcome) -> str:
    """Return rollback points, bytes and full copies of a policy, each with its mean."""
    retained, full = one.retained, one.checkpoint_bytes
    if retained is None or one.copies is None or one.released is None:
        return "no rollback points."
    texts = [f"{retained.peak} rollback points ({retained.mean:.2f} in the mean)"]
    if retained.peak_bytes is not None and retained.mean_bytes is not None:
        peak, mean = bytes_text(retained.peak_bytes), bytes_text(retained.mean_bytes)
        texts.append(f"{peak} ({mean}) as they were committed")
    if one.measured is not None:
        peak, mean = map(bytes_text, one.measured)
        texts.append(f"{peak} ({mean}) measured, roll-backs included")
    for copies, whose in (
        (one.copies, "the paper's disk-managed policy"),
        (one.released, "its code"),
    ):
        texts.append(
            f"{copies.peak} ({copies.mean:.2f}) full copies, {bytes_text(copies.peak * full)} "
            f"({bytes_text(copies.mean * full)}), by {whose}"
        )
    return f"{'; '.join(texts)}."


def _gone_lines(one: PolicyOutcome) -> list[str]:
    """Return a line on the roll-back targets that the retention had evicted, if any."""
    gone = one.retained.gone if one.retained else ()
    if not gone:
        return []
    firsts = {r["checkpoint"]: r for r in reversed(one.simulation.records) if "metrics" in r}
    places = [f"stage {firsts[i]['stage']}, epoch {firsts[i]['epoch']:.4g}" for i in gone]
    return [f"This retention no longer had what was gone back to: {'; '.join(places)}."]
