"""What a training method sees and what it may decide.

A :class:`Strategy` is told about evaluations and answers with one decision out of a closed set. It
imports neither torch nor accelerate and does no I/O, so that every method can be tested on recorded
curves, and a run can be resumed by telling a fresh strategy the recorded evaluations again.

Example::

    strategy = Msft(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
    stage = strategy.first_stage()
    decision = strategy.on_evaluation(evaluation)
    if isinstance(decision, RollBack):
        stage = decision.stage
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

from trainer.config.schema import OVERALL

Mode = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True)
class ExampleLosses:
    """A stage that tells the strategy each example's loss after every epoch.

    It may then name examples that are mastered; they get a forward pass, for their loss, and are
    not trained on, until it names others after the next epoch.
    """


@dataclass(frozen=True, kw_only=True)
class LookAhead:
    """A stage that tells the strategy what one step on each sub-dataset alone would bring.

    It answers with weights by which the next examples are drawn.
    """

    every: int
    """Optimizer steps between two such looks."""
    examples: int
    """Of each sub-dataset, drawn anew for every look."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One roll-out: what is trained on, and for how long."""

    number: int
    """Counts from 1."""
    active: tuple[str, ...]
    """The sub-datasets that are trained on, sorted by name."""
    epochs: float
    """Compute budget C: epochs of what is trained on."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Sub-datasets that are not active and yet take part → share of their examples an epoch has."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Active sub-dataset → epochs after which it is left out for the rest of the stage."""
    observe: ExampleLosses | LookAhead | None = None
    """What the strategy is told besides evaluations."""

    @property
    def trained(self) -> tuple[str, ...]:
        """The sub-datasets that take part, sorted by name."""
        return tuple(sorted({*self.active, *self.shares}))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All sub-datasets evaluated at one optimizer step."""

    stage: int
    index: int
    """0 at the start of the stage (its root), then 1, 2, … every ``eval_every`` epochs."""
    epoch: float
    """Epochs of the active mixture since the stage began."""
    step: int
    """Optimizer steps since the run began; never goes back."""
    checkpoint: str
    """What a decision calls the checkpoint that holds these weights; see :class:`Names`."""
    metrics: Mapping[str, float]
    """Sub-dataset → metric, excluded ones too, and ``OVERALL``."""
    last: bool
    """Whether the stage's budget is used up."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Sub-dataset → standard error of its metric over its examples, where it is known."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a stage with ``observe`` has found."""

    stage: int
    step: int
    """Optimizer steps in the stage."""
    epoch: float
    """Epochs of the stage."""
    values: Mapping[str, Sequence[float]]
    """Sub-dataset → mean token loss of each training example in the epoch that has ended; or,
    of a look ahead, one number: the mean over its examples of the share of the loss that one step
    takes away."""


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What follows an observation: the weights or the mastered examples replace those before."""

    reason: str
    weights: Mapping[str, float] = field(default_factory=dict)
    """Sub-dataset → probability that an example is drawn from it; empty: as the data come."""
    mastered: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Sub-dataset → places of the training examples that are not trained on."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A number that is not finite, so that training on from here is in vain."""

    stage: int
    epoch: float
    step: int
    """Optimizer steps since the run began, the one that failed included."""
    what: str
    """Whose number it is, as in ``training loss``."""
    value: str
    """``nan``, ``inf`` or ``-inf``."""


@dataclass(frozen=True, kw_only=True)
class Continue:
    """Train on."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class RollBack:
    """Restore ``checkpoint``, exclude sub-datasets, and begin ``stage`` from there.

    Where no sub-dataset peaked, ``checkpoint`` is the end of the roll-out and ``exclude`` is empty.
    """

    checkpoint: str
    exclude: tuple[str, ...]
    stage: Stage
    reason: str


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Restore ``checkpoint``, of the last evaluation, and train the stage on from where it is.

    The batches since that evaluation are not trained on again.
    """

    checkpoint: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The run is over; ``checkpoint`` is its result."""

    checkpoint: str
    exclude: tuple[str, ...] = ()
    reason: str


Decision = Continue | RollBack | Skip | Stop
AnyDecision = TypeVar("AnyDecision", bound=Decision)


class Names:
    """What strategies call checkpoints.

    The id of a checkpoint follows from its content and is not known while it is still being
    committed. So a strategy is told a name, always the same for the same checkpoint, and the names
    in its decisions are turned into ids where they are needed.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self._ids: dict[str, str] = {}

    def name(self, checkpoint: str, *, stage: int, index: int) -> str:
        """Return a checkpoint's name; one whose id is not known is named by its evaluation."""
        known = (name for name, identity in self._ids.items() if identity == checkpoint)
        return next(known, f"{stage}.{index}")

    def add(self, name: str, checkpoint: str) -> None:
        """Say which checkpoint id a name stands for."""
        self._ids[name] = checkpoint

    def ids(self, names: Iterable[str]) -> frozenset[str]:
        """Return the checkpoint ids that names stand for, as far as they are known."""
        return frozenset(self._ids[name] for name in names if name in self._ids)

    def resolve(self, decision: AnyDecision) -> AnyDecision:
        """Return a decision with the id of the checkpoint that it names."""
        if isinstance(decision, Continue):
            return decision
        name = decision.checkpoint
        return replace(decision, checkpoint=self._ids.get(name, name))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which checkpoints a strategy may still ask for; the loop turns it into a retention policy."""

    champions: tuple[str, ...] = ()
    """Sub-datasets whose first best checkpoint of the current stage is needed."""
    peak_window: int | None = None
    """Evaluations after which an unbeaten champion's peak has passed; ``None``: never."""
    best: tuple[str, ...] = (OVERALL,)
    """Metrics whose best checkpoint of the whole run is needed."""
    newest: bool = False
    """Whether the checkpoint of the last evaluation is needed, too."""
    checkpoints: tuple[str, ...] = ()
    """Others that are needed, by name."""


class Strategy(Protocol):
    """A training method."""

    mode: Mode
    """The direction in which the metric improves."""

    def first_stage(self) -> Stage:
        """Return what the run begins with."""

    def needs(self) -> Needs:
        """Return what must be kept now; it may change with every decision."""

    def on_evaluation(self, evaluation: Evaluation) -> Decision:
        """Decide what follows an evaluation; ``Continue`` never follows one that is ``last``."""

    def on_observation(self, observation: Observation) -> Adjustment:
        """Decide how a stage with ``observe`` goes on."""

    def on_divergence(self, divergence: Divergence) -> Skip | Stop:
        """Decide what follows a divergence; an evaluation of the stage came before it."""
