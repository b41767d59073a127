"""The inputs of a training method, and the decisions that it returns.

The methods are derived from :class:`~trainer.algorithms.method.Method`.

Example::

    strategy = Msft(sub_datasets=["arith", "dates"], mode="max", compute_budget=3.0)
    stage = strategy.first_stage()
    decision = strategy.on_evaluation(evaluation)
    if isinstance(decision, RollBack):
        stage = decision.stage
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from trainer.config.schema import OVERALL

Mode = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True)
class ExampleLosses:
    """A request for the loss of each training example after every epoch.

    The strategy may then name mastered examples. Until the next epoch ends, these get a forward
    pass for their loss but are not trained on.
    """


@dataclass(frozen=True, kw_only=True)
class LookAhead:
    """A request for the loss reduction of one trial step on each sub-dataset alone.

    The strategy answers with the probabilities by which the next examples are drawn.

    Attributes:
        every: Optimizer steps between two probes.
        examples: Examples of each sub-dataset, drawn again for every probe.
    """

    every: int
    examples: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One roll-out: the sub-datasets to train on and the number of epochs.

    Attributes:
        number: The stage's number, from 1.
        active: The active sub-datasets, sorted by name.
        epochs: The compute budget C (arXiv 2603.21606, section 3), in epochs of the active mixture.
        shares: Excluded sub-dataset → share of its examples that each epoch still contains.
        limits: Active sub-dataset → epoch from which the stage leaves it out.
        floor: Share of its examples that a sub-dataset keeps in each epoch behind its limit.
        observe: The observations that the strategy requests besides evaluations.
    """

    number: int
    active: tuple[str, ...]
    epochs: float
    shares: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    floor: float = 0.0
    observe: ExampleLosses | LookAhead | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """Return all sub-datasets that the stage trains on, sorted by name."""
        return tuple(sorted({*self.active, *self.shares}))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of all sub-datasets at one optimizer step, or of an average of checkpoints.

    An average has the place of the evaluation before it.
    """

    stage: int
    index: int
    """0 at the start of the stage (its root), then 1, 2, … every ``eval_every`` epochs."""
    epoch: float
    """Epochs of the active mixture since the stage began."""
    step: int
    """Optimizer steps since the run began; never goes back."""
    checkpoint: str
    """The name by which decisions refer to the checkpoint of these weights; see :class:`Names`."""
    metrics: Mapping[str, float]
    """Sub-dataset → metric, excluded ones too, and ``OVERALL``."""
    last: bool
    """True if the stage's compute budget is used up."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Sub-dataset → standard error of its metric over its examples, if known."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Sub-dataset → mean token loss, if known. It decides between equal metrics only."""
    carried: Sequence[str] = ()
    """Sub-datasets that were not measured here: their values are those of the evaluation before.
    They are not active, and such an evaluation is never the best overall."""


def measured(metrics: Mapping[str, float], carried: Collection[str]) -> dict[str, float]:
    """Return the metrics that were measured; the overall one was not if any value is carried."""
    left_out = {*carried, OVERALL} if carried else ()
    return {name: value for name, value in metrics.items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The observation of a stage with ``observe``."""

    stage: int
    step: int
    """Optimizer steps in the stage."""
    epoch: float
    """Epochs of the stage."""
    values: Mapping[str, Sequence[float]]
    """Sub-dataset → mean token loss of each training example in the epoch that has ended. For a
    probe: one number, the mean relative loss reduction of one step over its examples."""


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """Replace the sampling weights or the mastered examples, after an observation.

    Attributes:
        reason: For the journal.
        weights: Sub-dataset → probability that an example is drawn from it; empty for the
            proportions of the data.
        mastered: Sub-dataset → indices of the training examples that are not trained on.
    """

    reason: str
    weights: Mapping[str, float] = field(default_factory=dict)
    mastered: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A number that is not finite, after which training cannot continue."""

    stage: int
    epoch: float
    step: int
    """Optimizer steps since the run began, including the one that failed."""
    what: str
    """The quantity, as in ``training loss``."""
    value: str
    """``nan``, ``inf`` or ``-inf``."""


@dataclass(frozen=True, kw_only=True)
class Continue:
    """Continue the stage; ``reason`` is for the journal, as in all decisions.

    Attributes:
        reason: For the journal.
        stage: The same stage with another active set or other shares, from the next step on. Its
            steps, evaluations and learning rates stay as planned. ``None``: as before.
        exclude: The sub-datasets that leave the active set.
        include: The sub-datasets that come back to it.
    """

    reason: str
    stage: Stage | None = None
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Average:
    """Commit the weighted mean of checkpoints, evaluate it, and ask the strategy again.

    The strategy gets the evaluation by :meth:`~trainer.algorithms.method.Method.on_average` and
    returns another ``Average``, ``RollBack`` or ``Stop``, which may name the mean like any
    checkpoint.

    Attributes:
        checkpoint: The strategy's name of the mean.
        weights: Name of a checkpoint → its weight. They are divided by their sum.
        reason: For the journal.
    """

    checkpoint: str
    weights: Mapping[str, float]
    reason: str


@dataclass(frozen=True, kw_only=True)
class RollBack:
    """Restore a checkpoint, exclude sub-datasets and begin the next stage from there.

    If no sub-dataset peaked, none is excluded, and the checkpoint is the end of the roll-out.
    ``include`` names excluded sub-datasets that come back.
    """

    checkpoint: str
    exclude: tuple[str, ...]
    stage: Stage
    reason: str
    include: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Restore the last evaluation's checkpoint and skip the batches since then."""

    checkpoint: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End the run with a checkpoint as its result; the last stage excludes sub-datasets, too."""

    checkpoint: str
    exclude: tuple[str, ...] = ()
    reason: str


Decision = Continue | Average | RollBack | Skip | Stop
AnyDecision = TypeVar("AnyDecision", bound=Decision)


class Names:
    """The names that strategies use for checkpoints.

    A checkpoint's id is a hash of its content and is unknown while the checkpoint is being
    committed. So strategies receive a name, always the same one for the same checkpoint, and
    :meth:`resolve` replaces the name in a decision by the id.
    """

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}

    def name(self, checkpoint: str, *, stage: int, index: int) -> str:
        """Return a checkpoint's name; an unknown checkpoint is named after its evaluation."""
        known = (name for name, identity in self._ids.items() if identity == checkpoint)
        return next(known, f"{stage}.{index}")

    def add(self, name: str, checkpoint: str) -> None:
        """Record the checkpoint id of a name."""
        self._ids[name] = checkpoint

    def ids(self, names: Iterable[str]) -> frozenset[str]:
        """Return the known checkpoint ids of the names."""
        return frozenset(self._ids[name] for name in names if name in self._ids)

    def resolve(self, decision: AnyDecision) -> AnyDecision:
        """Return the decision with the checkpoint's name replaced by its id.

        The name of an average stays, because it does not exist yet; its sources are replaced.
        """
        if isinstance(decision, Continue):
            return decision
        if isinstance(decision, Average):
            weights = {self._ids.get(name, name): w for name, w in decision.weights.items()}
            return replace(decision, weights=weights)
        name = decision.checkpoint
        return replace(decision, checkpoint=self._ids.get(name, name))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The checkpoints that a strategy may still use; the loop makes a retention policy of them."""

    champions: tuple[str, ...] = ()
    """Sub-datasets whose first best checkpoint of the current stage must be kept."""
    modes: Mapping[str, Mode] = field(default_factory=dict)
    """The directions of their metrics that differ from the overall metric's."""
    peak_window: int | None = None
    """Evaluations after which an unbeaten champion's peak has passed; ``None``: never."""
    best: tuple[str, ...] = (OVERALL,)
    """Metrics whose best checkpoint of the whole run must be kept."""
    newest: bool = False
    """True if the checkpoint of the last evaluation must be kept, too."""
    checkpoints: tuple[str, ...] = ()
    """Names of further checkpoints that must be kept."""
