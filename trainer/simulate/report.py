"""Report simulations of a run: tables and sentences, and JSON values.

Example::

    run = recorded(records)
    print(to_text(run, [outcome(records, {"peak_window": 4})]))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.config.schema import Config
from trainer.journal import Record, effective
from trainer.report.summary import measure_disk_usage
from trainer.simulate.policies import (
    Retention,
    label,
    recorded_config,
    retention_named,
    with_policy,
)
from trainer.simulate.replay import Simulation, simulate
from trainer.simulate.retained import HeldTotal, RetentionReplay
from trainer.simulate.stage_ends import StageEnd
from trainer.text import Table, bytes_text, count_text, flops_text, metric_text


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Full copies under the paper's disk-managed policy: distinct champions, the best overall."""

    peak: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A policy and what it would have done."""

    label: str
    policy: Mapping[str, Any]
    """Keys of ``msft`` that differ from the run's; none for the run's own."""
    method: str
    simulation: Simulation
    held: HeldTotal | None
    """Rollback points over the simulated evaluations; ``None`` where nothing was committed."""
    copies: Copies | None
    measured: tuple[int, float] | None
    """Bytes of the run's own rollback points as its store had them, peak and mean; ``None`` of any
    other policy."""
    checkpoint_bytes: int
    """One full checkpoint."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        simulation = self.simulation
        return {
            "label": self.label,
            "method": self.method,
            "policy": dict(self.policy),
            "ending": simulation.ending,
            "why": simulation.why,
            "stages": [asdict(stage) for stage in simulation.stages],
            "recorded": asdict(simulation.recorded),
            "simulated": asdict(simulation.simulated),
            "best": None if simulation.best is None else asdict(simulation.best),
            "rollback_points": None if self.held is None else asdict(self.held),
            "measured_bytes": self.measured,
            "full_copies": None if self.copies is None else asdict(self.copies),
            "checkpoint_bytes": self.checkpoint_bytes,
        }


def recorded(records: Sequence[Record], *, retention: str = "needs") -> Outcome:
    """Return the outcome of the run's own policy on its own curves."""
    config = recorded_config(records)
    own = _outcome("as recorded", {}, records, config, retention)
    return replace(own, measured=_measured(records))


def outcome(
    records: Sequence[Record],
    policy: Mapping[str, Any],
    *,
    method: str = "msft",
    retention: str = "needs",
) -> Outcome:
    """Simulate a policy on all records of a journal.

    Raises :class:`ConfigError` for a policy that cannot work, :class:`RunError` for a journal that
    cannot be simulated on.
    """
    config = with_policy(recorded_config(records), policy, method=method)
    name = label(policy) if policy else f"{method}, the run's own options"
    return _outcome(name, policy, records, config, retention)


def _outcome(
    name: str,
    policy: Mapping[str, Any],
    records: Sequence[Record],
    config: Config,
    retention: str,
) -> Outcome:
    simulation = simulate(records, config)
    counted = effective(records)
    start = next(r for r in counted if r["event"] == "run_started")
    sizes = {r["checkpoint"]: r["stored_bytes"] for r in counted if r["event"] == "committed"}
    copies = [point.paper_copies for point in measure_disk_usage(simulation.records)]
    return Outcome(
        label=name,
        policy=policy,
        method=config.method,
        simulation=simulation,
        held=_held(simulation, sizes, retention_named(retention)),
        copies=Copies(peak=max(copies), mean=_mean(copies)) if copies else None,
        measured=None,
        checkpoint_bytes=start["full_checkpoint_bytes"],
    )


def _measured(records: Sequence[Record]) -> tuple[int, float] | None:
    """Return peak and mean of the run's own store, as :mod:`trainer.report.summary` has them."""
    points = measure_disk_usage(effective(records))
    if not points:
        return None
    return max(point.peak_bytes for point in points), _mean([point.bytes for point in points])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _held(
    simulation: Simulation, sizes: Mapping[str, int], retention: Retention
) -> HeldTotal | None:
    holding = RetentionReplay(sizes)
    for moment in simulation.moments:
        move = holding.roll_back if moment.is_roll_back else holding.commit
        policy = retention(moment.needs, simulation.mode)
        move(moment.record["checkpoint"], moment.record["metrics"], policy)
    return holding.total() if holding.points else None


def to_text(run: Outcome, outcomes: Sequence[Outcome]) -> str:
    """Return tables and sentences for the terminal; ``run`` is the run's own policy."""
    table = _table([run, *outcomes]).to_text()
    if len(outcomes) > 1:
        return "\n\n".join(
            [table, _NOTE, *(f"{one.label}: {one.simulation.why}" for one in outcomes)]
        )
    (one,) = outcomes
    parts = [table, _NOTE, _stage_table(one.simulation).to_text(), one.simulation.why]
    held = [
        f"{which}: {_held_text(each)}" for which, each in (("As recorded", run), ("Simulated", one))
    ]
    return "\n\n".join([*parts, "\n".join([*held, *_gone_lines(one)])])


_NOTE = (
    "Steps, FLOPs and evaluations are of the stages that are known, beside the run's in the same "
    "stages; the best\noverall is that of the known evaluations. Points are rollback points after "
    "an evaluation, peak before eviction."
)


def _table(outcomes: Sequence[Outcome]) -> Table:
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
        best = metric_text(None if one.simulation.best is None else one.simulation.best.overall)
        points = "-" if one.held is None else f"{one.held.peak}, mean {one.held.mean:.2f}"
        rows.append([one.label, _known_text(one.simulation), *spent, best, points])
    return Table(header=header, rows=rows)


def _known_text(simulation: Simulation) -> str:
    count = len(simulation.stages)
    known = f"{count} stage{'s' * (count != 1)}"
    if simulation.ending == "result":
        return f"all, {known}"
    return known


def _stage_table(simulation: Simulation) -> Table:
    rows = [
        [str(stage.number), str(len(stage.active)), _turn(stage.recorded), _turn(stage.simulated)]
        for stage in simulation.stages
    ]
    return Table(header=("stage", "active", "the run", "simulated"), rows=rows, numeric=False)


def _turn(turn: StageEnd | None) -> str:
    if turn is None:
        return "trains on"
    excludes = f"excludes {', '.join(turn.exclude)}" if turn.exclude else "excludes nothing"
    verb = "back to" if turn.decision == "roll_back" else "result"
    return f"{turn.epoch:.2f}: {excludes}, {verb} {turn.to_stage}/{turn.to_epoch:.2f}"


def _held_text(one: Outcome) -> str:
    held, copies, full = one.held, one.copies, one.checkpoint_bytes
    if held is None or copies is None:
        return "no rollback points."
    texts = [f"{held.peak} rollback points ({held.mean:.2f} in the mean)"]
    if held.peak_bytes is not None and held.mean_bytes is not None:
        texts.append(
            f"{bytes_text(held.peak_bytes)} ({bytes_text(held.mean_bytes)}) as they were committed"
        )
    if one.measured is not None:
        peak, mean = one.measured
        texts.append(f"{bytes_text(peak)} ({bytes_text(mean)}) measured, roll-backs included")
    texts.append(
        f"{copies.peak} ({copies.mean:.2f}) full copies, {bytes_text(copies.peak * full)} "
        f"({bytes_text(copies.mean * full)}), by the paper's disk-managed policy"
    )
    return f"{'; '.join(texts)}."


def _gone_lines(one: Outcome) -> list[str]:
    if one.held is None or not one.held.gone:
        return []
    firsts = {r["checkpoint"]: r for r in reversed(one.simulation.records) if "metrics" in r}
    places = [f"stage {firsts[i]['stage']}, epoch {firsts[i]['epoch']:.4g}" for i in one.held.gone]
    return [f"This retention no longer had what was gone back to: {'; '.join(places)}."]
