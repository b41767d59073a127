"""Simulate another policy on the curves of a recorded run, as far as these suffice.

A stage follows from the seed, its number, its root, what it trains on, and nothing else. So a fresh
strategy with other options is told the recorded evaluations, stage by stage. While each of its
decisions leads to the stage that the run had next, the recorded curves are those that it would have
seen, also where it leaves a stage earlier than the run did. A decision that leads elsewhere, or a
curve that ends before the decision, is where the simulation ends: from there on nothing is known.

A smaller compute budget can be simulated where the learning rate does not depend on it. A run of
plain SFT has the first stage of MSFT; runs whose method itself chooses examples have none of it.

Example::

    records = read(run / "journal.jsonl")
    simulation = simulate(records, with_policy(recorded_config(records), {"peak_window": 4}))
    simulation.why
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
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
    Strategy,
)
from trainer.algorithms.peaks import first_best_index
from trainer.config.schema import OVERALL, Config
from trainer.errors import RunError
from trainer.journal import Record, effective
from trainer.report.flops import Account, Work
from trainer.simulate.stage_ends import (
    Kind,
    StageReplay,
    explain_departure,
    find_stage_end,
    first_evaluations,
    get_target,
    make_stage_end,
    why_known,
    why_open,
)

Ending = Literal["result", "left", "curve"]
"""How a simulation ends: with a result, by leaving the run's path, or where a curve ends."""

_SAME_DATA = ("msft", "sft", "single_rollout", "continual")
"""Methods that train on what their stages say, and on nothing that they find out on the way."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """The cost of the simulated stages."""

    steps: int
    evaluations: int
    """Computed ones, without those of roots, which are known already."""
    training: Work
    evaluation: Work
    """Of validation data, generation included."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The first best overall evaluation."""

    stage: int
    epoch: float
    overall: float
    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Something that moves rollback points."""

    record: Record
    """The evaluation that was committed, or the first one of what is gone back to."""
    needs: Needs
    is_roll_back: bool


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The known part of a run under another policy."""

    stages: tuple[StageReplay, ...]
    """Those that the run has; none where not even the first one is the same."""
    ending: Ending
    why: str
    """A sentence on where and why it ends."""
    recorded: Spent
    """The cost of these stages in the run."""
    simulated: Spent
    """Their cost under the other policy, as far as they are known."""
    best: Best | None
    """Of the simulated evaluations; the result where it ends with one."""
    mode: Mode
    moments: tuple[Moment, ...]
    records: tuple[Record, ...]
    """The records of the run that the other policy shares, in order."""


def simulate(records: Sequence[Record], config: Config) -> Simulation:
    """Replay a run's journal under ``config``, the run's own but for the policy.

    Raises :class:`RunError` for a journal whose curves say nothing on any other policy.
    """
    counted = effective(records)
    start = next((r for r in counted if r["event"] == "run_started"), None)
    if start is None or not any(r["event"] == "evaluated" for r in counted):
        raise RunError("the journal has no evaluation: there is no curve to simulate on")
    if start["method"] not in _SAME_DATA:
        raise RunError(
            f"a run of {start['method']} chooses its examples on the way, so its curves say "
            "nothing about another policy; simulate on a run of msft or sft"
        )
    _check_errors(counted, config)
    return _Replay(counted, start, config).run()


def _check_errors(counted: Sequence[Record], config: Config) -> None:
    """Raise :class:`RunError` where a margin has no standard errors to go by."""
    msft = config.msft
    if config.method != "msft" or msft.peaks != "robust" or not msft.margin:
        return
    if not any(r.get("errors") for r in counted if r["event"] == "evaluated"):
        raise RunError(
            "the journal has no standard errors of the metric, so a margin cannot be told: it was "
            "recorded by an earlier version; use --margin 0"
        )


class _Replay:
    """A strategy that receives the recorded evaluations."""

    def __init__(self, counted: Sequence[Record], start: Record, config: Config) -> None:
        self._stages = {group[0]["stage"]: group for group in _by_stage(counted)}
        sizes = {name: float(row["train"]) for name, row in start["sub_datasets"].items()}
        self._strategy: Strategy = make_strategy(config, sizes)
        self._budget = config.msft.compute_budget
        self._is_same_budget = self._budget == start["config"]["msft"]["compute_budget"]
        self._first = first_evaluations(counted)
        self._taken: list[Record] = [{**start, "method": config.method}]
        self._moments: list[Moment] = []
        self._replays: list[StageReplay] = []

    def run(self) -> Simulation:
        stage = self._strategy.first_stage()
        root: str | None = None
        while True:
            group = self._stages.get(stage.number)
            if group is None or not _is_same(stage, root, group[0]):
                return self._end("left", self._elsewhere(stage, group))
            decision = self._stage(group)
            turn = None
            if decision is not None:
                kind: Kind = "stop" if isinstance(decision, Stop) else "roll_back"
                turn = make_stage_end(self._taken[-1]["epoch"], kind, vars(decision), self._first)
            replay = StageReplay(
                number=stage.number,
                active=stage.active,
                recorded=find_stage_end(group, self._first),
                simulated=turn,
            )
            self._replays.append(replay)
            if isinstance(decision, Stop):
                return self._end("result", why_known(self._replays, decision.reason))
            if decision is None:
                epoch = max((r["epoch"] for r in group if r["event"] == "evaluated"), default=0.0)
                return self._end("curve", why_open(replay, epoch=epoch, budget=self._budget))
            stage, root = decision.stage, decision.checkpoint
            first = self._first[root]
            self._moments.append(
                Moment(record=first, needs=self._strategy.needs(), is_roll_back=True)
            )

    def _stage(self, group: Sequence[Record]) -> RollBack | Stop | None:
        """Tell the strategy a stage; return how it leaves it, ``None`` where the curve ends."""
        since: list[Record] = []
        for record in group:
            since.append(record)
            decision: Decision | None = None
            if record["event"] == "evaluated":
                last = self._is_last(record, group[0])
                if last is None:
                    return None
                if not record.get("reused"):
                    needs = self._strategy.needs()
                    self._moments.append(Moment(record=record, needs=needs, is_roll_back=False))
                decision = self._strategy.on_evaluation(_evaluation(record, last=last))
            elif record["event"] == "diverged":
                told = {f.name: record[f.name] for f in fields(Divergence)}
                decision = self._strategy.on_divergence(Divergence(**told))
            if decision is not None:
                self._taken += since
                since = []
            if isinstance(decision, RollBack | Stop):
                return decision
        self._taken += since
        return None

    def _is_last(self, record: Record, start: Record) -> bool | None:
        """Say whether an evaluation uses the budget up; ``None`` for one beyond the budget."""
        if self._is_same_budget or not record["index"]:
            return bool(record["last"]) and self._is_same_budget
        half_a_step = 0.5 * record["epoch"] / (record["step"] - start["step"]) + 1e-9
        if abs(record["epoch"] - self._budget) <= half_a_step:
            return True
        return None if record["epoch"] > self._budget else False

    def _elsewhere(self, stage: Stage, group: Sequence[Record] | None) -> str:
        """Say how the next stage differs from the run's."""
        if self._replays:
            before = self._replays[-1]
            same = group is not None and get_target(before.simulated) == get_target(before.recorded)
            return explain_departure(before, is_other_data=same)
        return (
            f"The run's first stage trains on {', '.join(self._stages[1][0]['active'])}, this "
            f"policy's on {', '.join(stage.active)}, so the run says nothing about it."
        )

    def _end(self, ending: Ending, why: str) -> Simulation:
        numbers = {replay.number for replay in self._replays}
        recorded = [r for n in sorted(numbers) for r in self._stages[n]]
        mode = self._strategy.mode
        return Simulation(
            stages=tuple(self._replays),
            ending=ending,
            why=why,
            recorded=_spent([self._taken[0], *recorded]),
            simulated=_spent(self._taken),
            best=_best(self._taken, mode),
            mode=mode,
            moments=tuple(self._moments),
            records=tuple(self._taken),
        )


def _by_stage(counted: Sequence[Record]) -> Iterator[list[Record]]:
    """Yield the records of each stage, from ``stage_started`` to the decision that ends it."""
    group: list[Record] = []
    for record in counted:
        if record["event"] == "stage_started":
            if group:
                yield group
            group = [record]
        elif group and record["event"] not in ("tested", "finished", "rolled_back"):
            group.append(record)
    if group:
        yield group


def _is_same(stage: Stage, root: str | None, start: Record) -> bool:
    """Say whether a stage is the one that a record began; the first one's root is the base."""
    recorded = start.get("shares") or {}
    shares = {name: share for name, share in recorded.items() if name not in start["active"]}
    return (
        (root is None or start["root"] == root)
        and tuple(start["active"]) == stage.active
        and shares == stage.shares
        and (start.get("limits") or {}) == stage.limits
    )


def _evaluation(record: Record, *, last: bool) -> Evaluation:
    told = {f.name: record[f.name] for f in fields(Evaluation) if f.name in record}
    return Evaluation(**{**told, "last": last})


def _spent(records: Sequence[Record]) -> Spent:
    account = Account.from_journal(records)
    return Spent(
        steps=_steps(records),
        evaluations=sum(r["event"] == "evaluated" and not r.get("reused") for r in records),
        training=account.trained,
        evaluation=account.evaluation + account.generation,
    )


def _steps(records: Sequence[Record]) -> int:
    """Return the optimizer steps of all stages."""
    begun, ends = {}, {}
    for record in records:
        if record["event"] == "stage_started":
            begun[record["stage"]] = record["step"]
        elif record["event"] == "trained":
            ends[record["stage"]] = record["step"]
    return sum(end - begun[stage] for stage, end in ends.items())


def _best(records: Sequence[Record], mode: Mode) -> Best | None:
    evaluated = [r for r in records if r["event"] == "evaluated"]
    index = first_best_index((r["metrics"][OVERALL] for r in evaluated), mode)
    if index is None:
        return None
    found = evaluated[index]
    return Best(
        stage=found["stage"],
        epoch=found["epoch"],
        overall=found["metrics"][OVERALL],
        checkpoint=found["checkpoint"],
    )
