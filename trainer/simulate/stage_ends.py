"""Compare how stages end under the run's own policy and another one, and describe it in words.

Example::

    turn = find_stage_end(stage_records, first_evaluations(counted))
    describe_stage_end("the run", turn)     # at epoch 3 the run excludes arith and goes on from …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.journal import Record

Kind = Literal["roll_back", "stop"]


@dataclass(frozen=True, kw_only=True)
class StageEnd:
    """How a stage ends."""

    epoch: float
    """In the stage, at which it was decided."""
    decision: Kind
    checkpoint: str
    """The checkpoint to roll back to, or the result."""
    to_stage: int
    """Of that checkpoint."""
    to_epoch: float
    exclude: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class StageReplay:
    """One stage under the run's policy and under another one."""

    number: int
    active: tuple[str, ...]
    recorded: StageEnd | None
    """``None`` where the run was not over."""
    simulated: StageEnd | None
    """``None`` where the curve ends before a decision."""


def first_evaluations(counted: Sequence[Record]) -> dict[str, Record]:
    """Return the first evaluation of each checkpoint."""
    first: dict[str, Record] = {}
    for record in counted:
        if record["event"] == "evaluated":
            first.setdefault(record["checkpoint"], record)
    return first


def find_stage_end(group: Sequence[Record], first: Mapping[str, Record]) -> StageEnd | None:
    """Return how a stage ended, of all records of it; ``None`` where it has not."""
    epochs = {r["index"]: r["epoch"] for r in group if r["event"] == "evaluated"}
    for record in group:
        if record["event"] == "decided" and record["decision"] in ("roll_back", "stop"):
            return make_stage_end(epochs[record["index"]], record["decision"], record, first)
    return None


def make_stage_end(
    epoch: float,
    kind: Kind,
    decided: Mapping[str, Any],
    first: Mapping[str, Record],
) -> StageEnd:
    """Return a turn; ``decided`` has checkpoint, exclude and reason, ``first`` all checkpoints."""
    target = first[decided["checkpoint"]]
    return StageEnd(
        epoch=epoch,
        decision=kind,
        checkpoint=decided["checkpoint"],
        to_stage=target["stage"],
        to_epoch=target["epoch"],
        exclude=tuple(decided["exclude"]),
        reason=decided["reason"],
    )


def get_target(turn: StageEnd | None) -> tuple[Any, ...]:
    """Return decision, checkpoint and exclusions of a stage end, without its epoch."""
    return () if turn is None else (turn.decision, turn.checkpoint, turn.exclude)


def describe_stage_end(who: str, turn: StageEnd | None) -> str:
    """Describe what a policy does at the end of a stage."""
    if turn is None:
        return f"{who} trains on"
    excludes = f"excludes {', '.join(turn.exclude)}" if turn.exclude else "excludes nothing"
    place = f"stage {turn.to_stage}, epoch {turn.to_epoch:.4g}"
    goes = "goes on from" if turn.decision == "roll_back" else "stops with"
    return f"at epoch {turn.epoch:.4g} {who} {excludes} and {goes} {place}"


def why_known(stages: Sequence[StageReplay], reason: str) -> str:
    """Say that a policy is known to its end, which it gives as a reason."""
    targets = [(get_target(stage.recorded), get_target(stage.simulated)) for stage in stages]
    if all(its == mine for its, mine in targets):
        how = "with the run's own decisions"
    elif all((its[0], its[2:]) == (mine[0], mine[2:]) for its, mine in targets if its):
        how = "with the run's own exclusions, but another result"
    else:
        how = "though not as the run"
    return f"It is known to its end, {how}: {reason}."


def explain_departure(stage: StageReplay, *, is_other_data: bool) -> str:
    """Explain how a policy leaves the run's path at the end of a stage.

    With ``is_other_data`` it decides as the run did, but the next stage has other shares.
    """
    mine, its = stage.simulated, stage.recorded
    if its is None:
        end = describe_stage_end("it", mine)
        return f"In stage {stage.number} {end}; the run has not come so far."
    ends = f"{describe_stage_end('it', mine)}; {describe_stage_end('the run', its)}"
    if is_other_data:
        ends += f". But stage {stage.number + 1} trains on other shares of the data"
    return f"In stage {stage.number} {ends}. From there on the run's curves say nothing."


def why_open(stage: StageReplay, *, epoch: float, budget: float) -> str:
    """Say where the curve of a stage ends before the policy does; ``epoch`` is its last one."""
    number = stage.number
    if epoch > budget:
        return (
            f"Stage {number} has no evaluation at epoch {budget:g}, where the compute budget ends: "
            "take a multiple of the run's eval_every."
        )
    if stage.recorded is None:
        return f"The run is not over: stage {number} is known up to epoch {epoch:.4g}."
    end = describe_stage_end("the run", stage.recorded)
    return f"In stage {number} it trains on when {end}. Beyond that nothing is known."
