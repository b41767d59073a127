"""Where a killed run stands: its journal replayed, and the one resume point.

A resume point is a safetensors file with the full state after an optimizer step: weights, optimizer
and random number generators as tensors, the position as JSON in its metadata. It is replaced
atomically. It belongs to the journal up to record ``seq``; what was written after that record
is done again, so a run that was killed ends as if it had not been.

Example::

    point = read_position(run / "resume.safetensors")
    after, origin = where_to_resume(records, point)
    standing = replay([record for record in records if record["seq"] <= after], strategy)

What a stage's observations have found so far, from the records that tell it.

The records of a stage tell each example's loss once an epoch, and what a look ahead found. The loop
and a resume both follow them here, so that both stand at the same point.

Example::

    found = Observed({"arith": 900})
    found.add_losses({"arith": [17, 4]}, {"arith": [0.7, 1.2]})
    observation = found.observation(stage=1, step=40, epoch=1.0)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.algorithms.base import (
    Adjustment,
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
    Strategy,
)
from trainer.errors import RunError
from trainer.files import enough_space, sync
from trainer.journal import Record
from trainer.model.training_state import (
    load_optimizer,
    optimizer_tensors,
    python_rng,
    set_python_rng,
)
from trainer.model.weights import unique, weights_of


class Observed:
    """The observations of one stage."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Begin without any; ``sizes`` are the training examples of the sub-datasets."""
        self._losses: dict[str, NDArray[np.float64]] = {
            name: np.full(size, np.nan) for name, size in sizes.items()
        }
        self._values: Mapping[str, Sequence[float]] | None = None
        self.adjustments: list[tuple[int, Adjustment]] = []
        """Steps in the stage, and what holds from there on."""

    def add_losses(
        self, places: Mapping[str, Sequence[int]], values: Mapping[str, Sequence[float]]
    ) -> None:
        """Take the losses of examples into account, by their places in the sub-datasets."""
        self._values = None
        for name, row in places.items():
            self._losses[name][list(row)] = values[name]

    def add_values(self, values: Mapping[str, Sequence[float]]) -> None:
        """Take what a look ahead found into account."""
        self._values = values

    def observation(self, *, stage: int, step: int, epoch: float) -> Observation:
        """Return what a strategy is told: the look ahead, or the last known loss of each example.

        A loss that is not known yet is NaN.
        """
        values: Mapping[str, Sequence[float]]
        if self._values is not None:
            values = self._values
        else:
            values = {name: losses.tolist() for name, losses in self._losses.items()}
        return Observation(stage=stage, step=step, epoch=epoch, values=values)

    def read(self, record: Record) -> Observation | None:
        """Follow a record; return the observation that an ``adjusted`` one has answered."""
        if record["event"] == "losses":
            self.add_losses(record["places"], record["values"])
        elif record["event"] == "looked_ahead":
            self.add_values(record["values"])
        elif record["event"] == "adjusted":
            return self.observation(
                stage=record["stage"], step=record["stage_step"], epoch=record["epoch"]
            )
        return None


def describe_adjustment(adjustment: Adjustment) -> dict[str, Any]:
    """Return the fields of an ``adjusted`` record that say what was decided."""
    return {
        "weights": dict(adjustment.weights),
        "mastered": {name: list(places) for name, places in adjustment.mastered.items()},
    }


Origin = Literal["resume_point", "stage_root", "end"]
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come."""

    stage: int
    step: int
    """Optimizer steps in the stage."""
    global_step: int
    """Optimizer steps since the run began."""
    evaluations: int
    """Evaluations of the stage that were decided on, that of the root included."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The position of a resume point."""

    position: Position
    seq: int
    """The journal's last record when it was written."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What an evaluation found, and where it was when it was first made."""

    metrics: Mapping[str, float]
    losses: Mapping[str, float] | None
    stage: int
    step: int
    """Optimizer steps in that stage."""
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands by its journal."""

    stage: Stage
    """The stage that runs, or is to begin."""
    root: str | None
    """The checkpoint that it begins from; ``None``: the base."""
    global_step: int
    known: Mapping[str, Known]
    """Checkpoint id → its evaluation."""
    begun: Mapping[int, tuple[Stage, str | None]]
    """The stages up to this one, by number, and their roots."""
    names: Names
    """What the strategy was told for these ids."""
    observed: Observed
    """The observations of this stage."""
    stop: Stop | None
    """The decision that ended training."""


def where_to_resume(counted: Sequence[Record], point: Point | None) -> tuple[int, Origin]:
    """Return the ``seq`` of the last record that still counts, and what training continues from.

    ``counted`` are the journal's effective records, which begin with ``run_started``.
    """
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


def replay(counted: Sequence[Record], strategy: Strategy) -> Standing:
    """Tell a fresh strategy what is recorded, and return where the run stands.

    Raises :class:`RunError` if it decides otherwise than the journal says.
    """
    stage, root, stop = strategy.first_stage(), None, None
    begun: dict[int, tuple[Stage, str | None]] = {stage.number: (stage, root)}
    global_step = stage_step = 0
    known: dict[str, Known] = {}
    names = Names()
    sizes = {name: row["train"] for r in counted[:1] for name, row in r["sub_datasets"].items()}
    observed = Observed(sizes)
    decision: Decision | None = None
    for record in counted:
        observation = observed.read(record)
        if "step" in record:
            global_step = record["step"]
        if record["event"] == "stage_started":
            stage_step = global_step
            observed = Observed(sizes)
        elif observation is not None:
            adjustment = strategy.on_observation(observation)
            observed.adjustments.append((record["stage_step"], adjustment))
            _check_same(record, describe_adjustment(adjustment))
        elif record["event"] == "evaluated":
            found = Known(
                metrics=record["metrics"],
                losses=record["losses"],
                errors=record.get("errors") or {},
                stage=record["stage"],
                step=global_step - stage_step,
            )
            known.setdefault(record["checkpoint"], found)
            evaluation = _evaluation(record, names)
            names.add(evaluation.checkpoint, record["checkpoint"])
            decision = names.resolve(strategy.on_evaluation(evaluation))
        elif record["event"] == "diverged":
            divergence = Divergence(**{f.name: record[f.name] for f in fields(Divergence)})
            decision = names.resolve(strategy.on_divergence(divergence))
        elif record["event"] == "decided":
            _check_same(record, {} if decision is None else describe(decision))
            if isinstance(decision, RollBack):
                stage, root = decision.stage, decision.checkpoint
                begun[stage.number] = (stage, root)
            stop = decision if isinstance(decision, Stop) else None
    return Standing(
        stage=stage,
        root=root,
        global_step=global_step,
        known=known,
        begun=begun,
        names=names,
        observed=observed,
        stop=stop,
    )


def _check_same(record: Record, decided: Mapping[str, Any]) -> None:
    """Raise :class:`RunError` where a record says otherwise than what is decided now."""
    if not decided or any(record[key] != value for key, value in decided.items()):
        raise RunError(
            f"journal record {record['seq']} decided {record.get('decision', 'an adjustment')!r}, "
            "but the same findings now lead to another decision: the run was made by another "
            "version or its configuration was edited; begin it again in another output_dir"
        )


def describe(decision: Decision) -> dict[str, Any]:
    """Return the fields of a ``decided`` record that say what was decided."""
    if isinstance(decision, Continue):
        return {"decision": "continue", "checkpoint": None, "exclude": []}
    if isinstance(decision, Skip):
        return {"decision": "skip", "checkpoint": decision.checkpoint, "exclude": []}
    kind = "roll_back" if isinstance(decision, RollBack) else "stop"
    exclude = list(decision.exclude)
    return {"decision": kind, "checkpoint": decision.checkpoint, "exclude": exclude}


def save_point(
    path: Path, point: Point, model: torch.nn.Module, optimizer: Any, rng: Mapping[str, Any]
) -> int:
    """Replace the resume point and return its size in bytes; ``rng`` is from ``gather_rng``."""
    tensors = {f"model.{name}": tensor for name, tensor in unique(weights_of(model)).items()}
    moments = optimizer_tensors(optimizer)
    tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
    tensors |= {f"rng.{name}": tensor for name, tensor in rng.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = content_of(point)
    temporary = path.with_name(f".{path.name}.tmp")
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with enough_space("the resume point", path, needed_bytes=needed):
        try:
            save_file(tensors, temporary, metadata={"msft": json.dumps(content)})
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
    return path.stat().st_size


def content_of(point: Point) -> dict[str, Any]:
    """Return what a resume point holds besides tensors, as JSON values."""
    content = {"version": _VERSION, "seq": point.seq, "position": asdict(point.position)}
    return {**content, "python": python_rng()}


def point_of(content: Mapping[str, Any]) -> Point | None:
    """Return the position in what :func:`content_of` returned; ``None`` if it cannot be used."""
    try:
        position = Position(**content["position"])
        return (
            Point(position=position, seq=content["seq"]) if content["version"] == _VERSION else None
        )
    except (KeyError, TypeError):
        return None


def read_position(path: Path) -> Point | None:
    """Return the position of a resume point; ``None`` if there is none that can be used."""
    try:
        return point_of(_content(path))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def load_point(path: Path, model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Restore weights and optimizer in place, and Python's and NumPy's generators.

    Returns torch's generator states of all processes, for ``set_rng``.
    """
    state = weights_of(model)
    parts: dict[str, dict[str, torch.Tensor]] = {"optimizer": {}, "rng": {}}
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for full_name in file.keys():  # noqa: SIM118 - not a mapping
            kind, name = full_name.split(".", 1)
            tensor = file.get_tensor(full_name)
            if kind == "model":
                state[name].copy_(tensor)
            else:
                parts[kind][name] = tensor
    load_optimizer(optimizer, parts["optimizer"])
    set_python_rng(_content(path)["python"])
    return parts["rng"]


def _content(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["msft"])


def _evaluation(record: Record, names: Names) -> Evaluation:
    told = {key: record[key] for key in ("stage", "index", "epoch", "step", "metrics", "last")}
    checkpoint = names.name(record["checkpoint"], stage=record["stage"], index=record["index"])
    return Evaluation(checkpoint=checkpoint, errors=record.get("errors") or {}, **told)
