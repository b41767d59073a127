"""Compare how stages end under the run's own policy and another one, and describe it in words.

Example::

    end = find_stage_end(stage_records, first_evaluations(counted))
    describe_stage_end("the run", end)     # at epoch 3 the run excludes arith and goes on from …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.journal import Record, select


@dataclass(frozen=True, kw_only=True)
class StageEnd:
    """The decision that ends a stage."""

    epoch: float
    decision: Literal["roll_back", "stop"]
    checkpoint: str
    to_stage: int
    to_epoch: float
    exclude: tuple[str, ...]
    reason: str

    @property
    def exclusion(self) -> str:
        """The exclusion as a verb with its object."""
        return f"excludes {', '.join(self.exclude) or 'nothing'}"


@dataclass(frozen=True, kw_only=True)
class StageReplay:
    """One stage under the run's policy and under another one."""

    number: int
    active: tuple[str, ...]
    recorded: StageEnd | None
    """``None`` if the stage has not ended in the run."""
    simulated: StageEnd | None
    """``None`` if the recorded curve ends before a decision."""


def first_evaluations(counted: Sequence[Record]) -> dict[str, Record]:
    """Return the first evaluation of each checkpoint."""
    found = select(counted, "evaluated", "averaged")
    return {record["checkpoint"]: record for record in reversed(found)}


def find_stage_end(records: Sequence[Record], first: Mapping[str, Record]) -> StageEnd | None:
    """Return how a stage ended, from its records; ``None`` if it has not ended."""
    epochs = {record["index"]: record["epoch"] for record in select(records, "evaluated")}
    for record in select(records, "decided"):
        if record["decision"] in ("roll_back", "stop"):
            return make_stage_end(epochs[record["index"]], record, first)
    return None


def make_stage_end(
    epoch: float, decided: Mapping[str, Any], first: Mapping[str, Record]
) -> StageEnd:
    """Return a stage end from the fields of a ``decided`` record and the first evaluations."""
    target = first[decided["checkpoint"]]
    return StageEnd(
        epoch=epoch,
        decision=decided["decision"],
        checkpoint=decided["checkpoint"],
        to_stage=target["stage"],
        to_epoch=target["epoch"],
        exclude=tuple(decided["exclude"]),
        reason=decided["reason"],
    )


def get_decision(end: StageEnd | None) -> tuple[Any, ...]:
    """Return decision, checkpoint and exclusions, which lead to the same next stage if equal."""
    return () if end is None else (end.decision, end.checkpoint, end.exclude)


def describe_stage_end(policy: str, end: StageEnd | None) -> str:
    """Describe the end of a stage, with the name of the policy as the subject."""
    if end is None:
        return f"{policy} trains on"
    verb = "goes on from" if end.decision == "roll_back" else "stops with"
    place = f"stage {end.to_stage}, epoch {end.to_epoch:.4g}"
    return f"at epoch {end.epoch:.4g} {policy} {end.exclusion} and {verb} {place}"


def explain_result(stages: Sequence[StageReplay], reason: str) -> str:
    """Explain a simulation that reaches its result; ``reason`` is that of its last decision."""
    pairs = [(get_decision(stage.recorded), get_decision(stage.simulated)) for stage in stages]
    if all(recorded == simulated for recorded, simulated in pairs):
        how = "with the run's own decisions"
    elif all(one[0] == other[0] and one[2] == other[2] for one, other in pairs if one):
        how = "with the run's own exclusions, but another result"
    else:
        how = "though not as the run"
    return f"It is known to its end, {how}: {reason}."


def explain_departure(stage: StageReplay, *, is_other_data: bool) -> str:
    """Explain how a policy leaves the run's path at the end of a stage.

    With ``is_other_data`` it decides as the run did, but the next stage has other shares.
    """
    end = describe_stage_end("it", stage.simulated)
    if stage.recorded is None:
        return f"In stage {stage.number} {end}; the run has not got that far."
    ends = f"{end}; {describe_stage_end('the run', stage.recorded)}"
    if is_other_data:
        ends += f". But stage {stage.number + 1} trains on other shares of the data"
    return f"In stage {stage.number} {ends}. From there on the run's curves say nothing."


def explain_curve_end(stage: StageReplay, *, epoch: float, budget: float) -> str:
    """Explain a stage whose curve ends, at ``epoch``, before the policy decides."""
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
