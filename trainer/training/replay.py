"""Replay a journal to find where a run stands.

``where_to_resume`` chooses the last record that still counts, and ``replay`` feeds the records up
to it to a fresh strategy. Records after it are void: their steps are trained again, so a run that
was killed ends as if it had never been killed.

Invariant: a decision that differs from the recorded one is an error.

Example::

    point = resume_point.read(work)
    after, origin = where_to_resume(records, point)
    state = replay([record for record in records if record["seq"] <= after], strategy)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.algorithms.base import (
    Adjustment,
    Average,
    Continue,
    Decision,
    Divergence,
    Evaluation,
    Names,
    Observation,
    RollBack,
    Skip,
    Stage,
    Stop,
)
from trainer.algorithms.method import Method
from trainer.errors import RunError
from trainer.journal import Record

Origin = Literal["resume_point", "stage_root", "end"]

_KINDS = {
    Continue: "continue",
    Average: "average",
    RollBack: "roll_back",
    Skip: "skip",
    Stop: "stop",
}


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come."""

    stage: int
    step: int
    """Optimizer steps in the stage."""
    global_step: int
    """Optimizer steps since the run began."""
    evaluations: int
    """Evaluations of the stage that have a decision, including the one of the root."""


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The position of a resume point."""

    position: Position
    seq: int
    """The journal's last record when the resume point was written."""


@dataclass(frozen=True, kw_only=True)
class KnownEvaluation:
    """The newest results for a checkpoint, and the stage and step at which it was made."""

    metrics: Mapping[str, float]
    losses: Mapping[str, float] | None
    stage: int
    step: int
    """Optimizer steps in that stage."""
    errors: Mapping[str, float] = field(default_factory=dict)
    carried: Sequence[str] = ()
    """Sub-datasets that were not measured, as in :class:`~trainer.algorithms.base.Evaluation`."""


@dataclass(frozen=True, kw_only=True)
class StageStart:
    """A stage and the checkpoint that it begins from."""

    stage: Stage
    root: str | None
    """The checkpoint's id; ``None``: the base."""


class ObservationLog:
    """The observations of one stage: losses of examples, results of probes, adjustments.

    The loop and a resume both keep their state here, so that a strategy sees the same after a kill.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Start empty; ``sizes`` are the numbers of training examples of the sub-datasets."""
        self._losses: dict[str, NDArray[np.float64]] = {
            name: np.full(size, np.nan) for name, size in sizes.items()
        }
        self._rewards: Mapping[str, Sequence[float]] | None = None
        self.adjustments: list[tuple[int, Adjustment]] = []
        """Steps of the stage, and the adjustment that applies from there on."""

    def add_losses(
        self, places: Mapping[str, Sequence[int]], values: Mapping[str, Sequence[float]]
    ) -> None:
        """Store the losses of examples by their places in the sub-datasets."""
        self._rewards = None
        for name, row in places.items():
            self._losses[name][list(row)] = values[name]

    def add_rewards(self, rewards: Mapping[str, Sequence[float]]) -> None:
        """Store the rewards that a probe found."""
        self._rewards = rewards

    def make_observation(self, *, stage: int, step: int, epoch: float) -> Observation:
        """Return the newest rewards, or the last known loss of each example (NaN if unknown)."""
        values: Mapping[str, Sequence[float]]
        if self._rewards is not None:
            values = self._rewards
        else:
            values = {name: losses.tolist() for name, losses in self._losses.items()}
        return Observation(stage=stage, step=step, epoch=epoch, values=values)

    def apply_record(self, record: Record) -> Observation | None:
        """Apply a journal record; for an ``adjusted`` one, return the observation before it."""
        if record["event"] == "losses":
            self.add_losses(record["places"], record["values"])
        elif record["event"] == "looked_ahead":
            self.add_rewards(record["values"])
        elif record["event"] == "adjusted":
            return self.make_observation(
                stage=record["stage"], step=record["stage_step"], epoch=record["epoch"]
            )
        return None


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run according to its journal."""

    starts: Mapping[int, StageStart]
    """The starts of all stages up to the current one, by number."""
    global_step: int
    known: Mapping[str, KnownEvaluation]
    """Checkpoint id → its evaluation."""
    names: Names
    observations: ObservationLog
    changes: tuple[tuple[int, Stage], ...]
    """Steps of the current stage, and the active set and shares that it has from there on."""
    stop: Stop | None

    @property
    def current(self) -> StageStart:
        """The start of the current stage, which may not have begun."""
        return self.starts[max(self.starts)]


def where_to_resume(counted: Sequence[Record], point: ResumePoint | None) -> tuple[int, Origin]:
    """Return the ``seq`` of the last record that still counts, and the origin of the resume."""
    for i in range(len(counted) - 1, 0, -1):
        record = counted[i]
        if record["event"] == "decided" and record["decision"] in ("roll_back", "stop"):
            return record["seq"], "end" if record["decision"] == "stop" else "stage_root"
        if record["event"] == "stage_started":
            inside = {later["seq"] for later in counted[i:]}
            if point and point.seq in inside and point.position.stage == record["stage"]:
                return point.seq, "resume_point"
            return counted[i - 1]["seq"], "stage_root"
    return counted[0]["seq"], "stage_root"


def replay(counted: Sequence[Record], strategy: Method) -> RunState:
    """Feed the recorded events to a fresh strategy, and return the state of the run.

    Raises :class:`RunError` if a decision differs from the recorded one.
    """
    stage, stop = strategy.first_stage(), None
    starts = {stage.number: StageStart(stage=stage, root=None)}
    global_step = first_step = 0
    known: dict[str, KnownEvaluation] = {}
    names = Names()
    sizes = {name: row["train"] for r in counted[:1] for name, row in r["sub_datasets"].items()}
    observations = ObservationLog(sizes)
    changes: list[tuple[int, Stage]] = []
    decision: Decision | None = None
    for record in counted:
        observation = observations.apply_record(record)
        if "step" in record:
            global_step = record["step"]
        if record["event"] == "stage_started":
            first_step = global_step
            observations, changes = ObservationLog(sizes), []
        elif observation is not None:
            adjustment = strategy.on_observation(observation)
            observations.adjustments.append((record["stage_step"], adjustment))
            _check_same(record, describe_adjustment(adjustment))
        elif record["event"] == "evaluated":
            evaluation = _read_evaluation(record, step=global_step - first_step)
            made = known.get(record["checkpoint"], evaluation)
            known[record["checkpoint"]] = replace(evaluation, stage=made.stage, step=made.step)
            decision = _replay_evaluation(record, names, strategy)
        elif record["event"] == "averaged":
            known[record["checkpoint"]] = _read_evaluation(record, step=global_step - first_step)
            names.add(record["name"], record["checkpoint"])
            facts = {**fields_of(Evaluation, record), "checkpoint": record["name"]}
            decision = names.resolve(strategy.on_average(Evaluation(**facts)))
        elif record["event"] == "diverged":
            divergence = Divergence(**fields_of(Divergence, record))
            decision = names.resolve(strategy.on_divergence(divergence))
        elif record["event"] == "decided":
            _check_same(record, {} if decision is None else describe_decision(decision))
            if isinstance(decision, RollBack):
                start = StageStart(stage=decision.stage, root=decision.checkpoint)
                starts[start.stage.number] = start
            if isinstance(decision, Continue) and decision.stage is not None:
                changes.append((global_step - first_step, decision.stage))
            stop = decision if isinstance(decision, Stop) else None
    return RunState(
        starts=starts,
        global_step=global_step,
        known=known,
        names=names,
        observations=observations,
        changes=tuple(changes),
        stop=stop,
    )


def _read_evaluation(record: Record, *, step: int) -> KnownEvaluation:
    return KnownEvaluation(
        metrics=record["metrics"],
        losses=record["losses"],
        errors=record.get("errors") or {},
        stage=record["stage"],
        step=step,
        carried=record.get("carried") or (),
    )


def _replay_evaluation(record: Record, names: Names, strategy: Method) -> Decision:
    checkpoint = names.name(record["checkpoint"], stage=record["stage"], index=record["index"])
    names.add(checkpoint, record["checkpoint"])
    facts = {**fields_of(Evaluation, record), "checkpoint": checkpoint}
    return names.resolve(strategy.on_evaluation(Evaluation(**facts)))


def fields_of(kind: type[Divergence | Evaluation], record: Record) -> dict[str, Any]:
    """Return the fields of a record that are those of an event for the strategy."""
    known = (field.name for field in fields(kind) if record.get(field.name) is not None)
    return {name: record[name] for name in known}


def _check_same(record: Record, decided: Mapping[str, Any]) -> None:
    """Raise :class:`RunError` if a decision differs from the recorded one, except in its reason."""
    fields_that_count = decided.keys() - {"reason"}
    if not decided or any(record.get(key) != decided[key] for key in fields_that_count):
        raise RunError(
            f"journal record {record['seq']} decided {record.get('decision', 'an adjustment')!r}, "
            "but the same evaluations now lead to another decision: the run was made by another "
            "version or its configuration was edited; begin it again in another output_dir"
        )


def describe_decision(decision: Decision) -> dict[str, Any]:
    """Return the fields of a ``decided`` record that hold the decision."""
    found = {
        "decision": _KINDS[type(decision)],
        "checkpoint": getattr(decision, "checkpoint", None),
        "exclude": list(getattr(decision, "exclude", ())),
    }
    if isinstance(decision, Continue) and decision.stage is not None:
        found |= {"active": list(decision.stage.active), "shares": dict(decision.stage.shares)}
    if isinstance(decision, Continue | RollBack) and decision.include:
        found["include"] = list(decision.include)
    if isinstance(decision, Average):
        found["weights"] = dict(decision.weights)
    return {**found, "reason": decision.reason}


def describe_adjustment(adjustment: Adjustment) -> dict[str, Any]:
    """Return the fields of an ``adjusted`` record that hold the decision."""
    return {
        "weights": dict(adjustment.weights),
        "mastered": {name: list(places) for name, places in adjustment.mastered.items()},
        "reason": adjustment.reason,
    }
