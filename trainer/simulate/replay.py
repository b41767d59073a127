"""Simulate another policy on the curves of a recorded run, as far as these are known.

A stage follows from the seed, its number, its root and its training data alone. So as long as the
decisions of a new strategy lead to the next stage of the run, it would have seen the same curves,
even if it ends a stage earlier. The simulation ends at a decision that leads elsewhere, or where a
curve ends before the decision.

A smaller compute budget can be simulated if the learning rate does not depend on it. A run of plain
SFT has the first stage of MSFT. A run whose method chooses examples has no stage of another method.

Example::

    records = read(run / "journal.jsonl")
    simulation = simulate(records, with_policy(recorded_config(records), {"peak_window": 4}))
    simulation.why
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.algorithms import make_strategy
from trainer.algorithms.base import (
    Decision,
    Divergence,
    Evaluation,
    Mode,
    Needs,
    RollBack,
    Stage,
    Stop,
)
from trainer.algorithms.method import Method
from trainer.algorithms.peaks import first_best_index
from trainer.config.schema import OVERALL, Config
from trainer.errors import RunError
from trainer.journal import Record, effective, run_started, select
from trainer.report.flops import Account, Work
from trainer.simulate.stage_ends import (
    StageReplay,
    explain_curve_end,
    explain_departure,
    explain_result,
    find_stage_end,
    first_evaluations,
    get_decision,
    make_stage_end,
)
from trainer.training.replay import describe_decision, fields_of

Ending = Literal["result", "left", "curve"]
"""How a simulation ends: with a result, by leaving the run's path, or where a curve ends."""

_FIXED_DATA_METHODS = ("msft", "sft", "single_rollout", "continual")
"""Methods whose training data follow from their stages alone."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """The cost of the simulated stages."""

    steps: int
    evaluations: int
    """Evaluations that were computed, without those of roots, which are reused."""
    training: Work
    evaluation: Work
    """Work on validation data, generation included."""


@dataclass(frozen=True, kw_only=True)
class TimelineChange:
    """A commit or a roll-back of the simulated run."""

    record: Record
    """The evaluation of the committed checkpoint, or the first one of the roll-back's target."""
    needs: Needs
    is_roll_back: bool


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The known part of a run under another policy."""

    stages: tuple[StageReplay, ...]
    """The stages that the run has in common with it; empty if the first stage differs."""
    ending: Ending
    why: str
    """A sentence on where and why the simulation ends."""
    recorded: Spent
    """The cost of these stages in the run."""
    simulated: Spent
    """Their cost under the other policy, as far as they are known."""
    best: Record | None
    """The first evaluation with the best overall metric, if any was finite."""
    mode: Mode
    changes: tuple[TimelineChange, ...]
    records: tuple[Record, ...]
    """The records that the run has in common with the simulated run, in order."""


def simulate(records: Sequence[Record], config: Config) -> Simulation:
    """Replay a run's journal under ``config``, which differs from the run's only in the policy.

    Raises :class:`RunError` if the journal's curves say nothing about any other policy.
    """
    counted = effective(records)
    start, evaluated = run_started(counted), select(counted, "evaluated")
    if not evaluated:
        raise RunError("the journal has no evaluation: there is no curve to simulate on")
    if start["method"] not in _FIXED_DATA_METHODS:
        raise RunError(
            f"a run of {start['method']} chooses its examples during training, so its curves say "
            "nothing about another policy; simulate on a run of msft or sft"
        )
    shortens = config.msft.compute_budget < start["config"]["msft"]["compute_budget"]
    if shortens and any(record.get("carried") for record in evaluated):
        raise RunError(
            "the run measured excluded sub-datasets at every "
            f"{start['config']['evaluation']['excluded_every']}th evaluation only, so what a "
            "smaller compute_budget would measure at the end of a stage is not known: record a run "
            "with evaluation.excluded_every=1"
        )
    needs_errors = config.method == "msft" and config.msft.peaks == "robust" and config.msft.margin
    if needs_errors and not any(record.get("errors") for record in evaluated):
        raise RunError(
            "the journal has no standard errors of the metric, so a margin cannot be applied: it "
            "was recorded by an earlier version; use --margin 0"
        )
    return _Replay(counted, start, config).run()


class _Replay:
    """A strategy that receives the recorded evaluations."""

    def __init__(self, counted: Sequence[Record], start: Record, config: Config) -> None:
        self._stages = _by_stage(counted)
        sizes = {name: float(row["train"]) for name, row in start["sub_datasets"].items()}
        self._strategy: Method = make_strategy(
            config, sizes, mode=start["mode"], modes=start.get("modes")
        )
        self._budget = config.msft.compute_budget
        self._is_same_budget = self._budget == start["config"]["msft"]["compute_budget"]
        self._first = first_evaluations(counted)
        self._records: list[Record] = [{**start, "method": config.method}]
        self._changes: list[TimelineChange] = []
        self._replays: list[StageReplay] = []

    def run(self) -> Simulation:
        stage = self._strategy.first_stage()
        root: str | None = None
        while True:
            group = self._stages.get(stage.number)
            if group is None or not _is_same(stage, root, group[0]):
                return self._end("left", self._explain_departure(stage, group))
            decision = self._replay_stage(group)
            end = None
            if decision is not None:
                decided = describe_decision(decision)
                end = make_stage_end(self._records[-1]["epoch"], decided, self._first)
            replay = StageReplay(
                number=stage.number,
                active=stage.active,
                recorded=find_stage_end(group, self._first),
                simulated=end,
            )
            self._replays.append(replay)
            if isinstance(decision, Stop):
                return self._end("result", explain_result(self._replays, decision.reason))
            if decision is None:
                epoch = max((r["epoch"] for r in select(group, "evaluated")), default=0.0)
                why = explain_curve_end(replay, epoch=epoch, budget=self._budget)
                return self._end("curve", why)
            stage, root = decision.stage, decision.checkpoint
            self._add_change(self._first[root], is_roll_back=True)

    def _replay_stage(self, group: Sequence[Record]) -> RollBack | Stop | None:
        """Pass a stage to the strategy; return the decision that ends it, if there is one."""
        since: list[Record] = []
        for record in group:
            since.append(record)
            decision: Decision | None = None
            if record["event"] == "evaluated":
                last = self._is_last(record, group[0])
                if last is None:
                    return None
                if record["index"] or record["stage"] == 1:
                    self._add_change(record, is_roll_back=False)
                values = {**fields_of(Evaluation, record), "last": last}
                decision = self._strategy.on_evaluation(Evaluation(**values))
            elif record["event"] == "diverged":
                values = fields_of(Divergence, record)
                decision = self._strategy.on_divergence(Divergence(**values))
            if decision is not None:
                self._records += since
                since = []
            if isinstance(decision, RollBack | Stop):
                return decision
        self._records += since
        return None

    def _add_change(self, record: Record, *, is_roll_back: bool) -> None:
        needs = self._strategy.needs()
        self._changes.append(TimelineChange(record=record, needs=needs, is_roll_back=is_roll_back))

    def _is_last(self, record: Record, start: Record) -> bool | None:
        """Return whether an evaluation is the last one of the budget; ``None`` if it is beyond."""
        if self._is_same_budget or not record["index"]:
            return bool(record["last"]) and self._is_same_budget
        half_a_step = 0.5 * record["epoch"] / (record["step"] - start["step"]) + 1e-9
        if abs(record["epoch"] - self._budget) <= half_a_step:
            return True
        return None if record["epoch"] > self._budget else False

    def _explain_departure(self, stage: Stage, group: Sequence[Record] | None) -> str:
        """Explain how the next stage differs from the run's."""
        if self._replays:
            before = self._replays[-1]
            is_same = get_decision(before.simulated) == get_decision(before.recorded)
            return explain_departure(before, is_other_data=group is not None and is_same)
        return (
            f"The run's first stage trains on {', '.join(self._stages[1][0]['active'])}, this "
            f"policy's on {', '.join(stage.active)}, so the run says nothing about it."
        )

    def _end(self, ending: Ending, why: str) -> Simulation:
        start, mode = self._records[0], self._strategy.mode
        recorded = [r for replay in self._replays for r in self._stages[replay.number]]
        return Simulation(
            stages=tuple(self._replays),
            ending=ending,
            why=why,
            recorded=_spent([start, *recorded]),
            simulated=_spent(self._records),
            best=_best(self._records, mode),
            mode=mode,
            changes=tuple(self._changes),
            records=tuple(self._records),
        )


def _by_stage(counted: Sequence[Record]) -> dict[int, list[Record]]:
    """Return the records of each stage, from ``stage_started`` to the decision that ends it."""
    groups: dict[int, list[Record]] = {}
    group: list[Record] = []
    for record in counted:
        if record["event"] == "stage_started":
            group = groups[record["stage"]] = [record]
        elif group and record["event"] not in ("tested", "finished", "rolled_back"):
            group.append(record)
    return groups


def _is_same(stage: Stage, root: str | None, start: Record) -> bool:
    """Return whether a record began this stage; ``root`` is ``None`` in the first one."""
    recorded = start.get("shares") or {}
    shares = {name: share for name, share in recorded.items() if name not in start["active"]}
    return (
        (root is None or start["root"] == root)
        and tuple(start["active"]) == stage.active
        and shares == stage.shares
        and (start.get("limits") or {}) == stage.limits
        and (start.get("floor") or 0.0) == stage.floor
    )


def _spent(records: Sequence[Record]) -> Spent:
    account = Account.from_journal(records)
    first = {record["stage"]: record["step"] for record in select(records, "stage_started")}
    last = {record["stage"]: record["step"] for record in select(records, "trained")}
    return Spent(
        steps=sum(step - first[stage] for stage, step in last.items()),
        evaluations=sum(not record.get("reused") for record in select(records, "evaluated")),
        training=account.trained,
        evaluation=account.evaluation + account.generation,
    )


def _best(records: Sequence[Record], mode: Mode) -> Record | None:
    evaluated = [r for r in select(records, "evaluated") if not r.get("carried")]
    index = first_best_index((r["metrics"][OVERALL] for r in evaluated), mode)
    return None if index is None else evaluated[index]
