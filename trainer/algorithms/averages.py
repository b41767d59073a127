"""Decide which checkpoints of a run to average: pure functions, for every method.

The mean of several checkpoints of one run is often better than each of them, because the noise of
single steps cancels. A mean costs one evaluation, and becomes the result only if its overall metric
is better than that of the best checkpoint.

- ``last``: the last ``count`` evaluations of the run, equally (LAWA, arXiv 2209.14981);
- ``best``: the ``count`` successive evaluations of one stage around the best overall, equally;
- ``decay``: the last ``count`` of the run, with the weights that stand for a decay of the learning
  rate by 1 - √x over them (WSM, arXiv 2507.17634);
- ``champions``: the best checkpoint of each sub-dataset in the whole run, equally;
- ``greedy``: the ``count`` best overall checkpoints; beginning with the best, each stays in the
  mean if the mean is better with it (model soups, arXiv 2203.05482). This takes ``count`` - 1
  evaluations.

Example::

    pool = AveragePool(settings=AverageConfig(kind="best"), mode="min", modes={})
    pool.add(evaluation)                       # after each evaluation
    pool.needed()                              # names of the checkpoints to keep
    pool.propose()                             # {"1.3": 1.0, "1.4": 1.0, "1.5": 1.0, "1.6": 1.0}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trainer.algorithms.base import Evaluation, Mode
from trainer.algorithms.peaks import first_best_index, is_better
from trainer.config.schema import OVERALL, AverageConfig

Weights = Mapping[str, float]
"""Name of a checkpoint → its weight."""


def decay_weights(count: int) -> tuple[float, ...]:
    """Return the weights of ``count`` successive checkpoints, oldest first, with the sum 1.

    The steps after checkpoint j enter the mean with the sum of the weights of all later ones, which
    is 1 - √((j + 1) / count), as if the learning rate had decayed so (arXiv 2507.17634).
    """
    return tuple(math.sqrt((j + 1) / count) - math.sqrt(j / count) for j in range(count))


def window_around(index: int, length: int, count: int) -> range:
    """Return ``count`` successive indices around ``index`` of a sequence, fewer if it is shorter.

    The window is moved where it would reach beyond an end.
    """
    first = max(0, min(index - (count - 1) // 2, length - count))
    return range(first, min(first + count, length))


@dataclass(kw_only=True, eq=False)
class AveragePool:
    """The evaluations of a run from which averages may be made.

    Attributes:
        settings: The section ``average`` of the configuration.
        mode: The direction of the overall metric.
        modes: The directions of sub-datasets' metrics that differ from it.
    """

    settings: AverageConfig
    mode: Mode
    modes: Mapping[str, Mode]
    _run: list[Evaluation] = field(init=False, default_factory=list)
    _tried: list[tuple[Weights, float]] = field(init=False, default_factory=list)

    @property
    def is_used(self) -> bool:
        """True if the run shall be averaged."""
        return self.settings.kind != "none"

    def add(self, evaluation: Evaluation) -> None:
        """Add the next evaluation; one of a known checkpoint replaces carried values only."""
        if not self.is_used:
            return
        places = {one.checkpoint: i for i, one in enumerate(self._run)}
        place = places.get(evaluation.checkpoint)
        if place is None:
            self._run.append(evaluation)
        elif self._run[place].carried:
            self._run[place] = replace(
                self._run[place], metrics=evaluation.metrics, carried=evaluation.carried
            )

    def needed(self) -> tuple[str, ...]:
        """Return the names of the checkpoints that an average may still need."""
        recent = self._run[-self.settings.count :] if self.is_used else []
        names = [one.checkpoint for one in recent]
        match self.settings.kind:
            case "best":
                names += self._around_best()
            case "champions":
                names += self._champions()
            case "greedy":
                names += self._ranked()
        return tuple(dict.fromkeys(names))

    def propose(self) -> Weights | None:
        """Return the next average to evaluate, or ``None`` if there is none."""
        if self.settings.kind == "greedy":
            return self._propose_greedily()
        weights: Weights = {}
        recent = [one.checkpoint for one in self._run[-self.settings.count :]]
        match self.settings.kind:
            case "last":
                weights = dict.fromkeys(recent, 1.0)
            case "decay":
                weights = dict(zip(recent, decay_weights(len(recent)), strict=True))
            case "best":
                weights = dict.fromkeys(self._around_best(), 1.0)
            case "champions":
                weights = {name: float(n) for name, n in Counter(self._champions()).items()}
        return weights if len(weights) > 1 and not self._tried else None

    def add_result(self, weights: Weights, evaluation: Evaluation) -> None:
        """Add the evaluation of an average."""
        self._tried.append((weights, evaluation.metrics[OVERALL]))

    def _overall(self) -> list[float]:
        return [math.nan if one.carried else one.metrics[OVERALL] for one in self._run]

    def _around_best(self) -> list[str]:
        best = first_best_index(self._overall(), self.mode)
        if best is None:
            return []
        stage = self._run[best].stage
        names = [one.checkpoint for one in self._run if one.stage == stage]
        at = names.index(self._run[best].checkpoint)
        return [names[i] for i in window_around(at, len(names), self.settings.count)]

    def _champions(self) -> list[str]:
        found = []
        for name in sorted(self._run[0].metrics.keys() - {OVERALL}) if self._run else ():
            curve = [math.nan if name in one.carried else one.metrics[name] for one in self._run]
            index = first_best_index(curve, self.modes.get(name, self.mode))
            if index is not None:
                found.append(self._run[index].checkpoint)
        return found

    def _ranked(self) -> list[str]:
        sign = -1.0 if self.mode == "max" else 1.0
        values = zip(self._overall(), self._run, strict=True)
        finite = [(sign * value, i) for i, (value, _) in enumerate(values) if math.isfinite(value)]
        return [self._run[i].checkpoint for _, i in sorted(finite)[: self.settings.count]]

    def _propose_greedily(self) -> Weights | None:
        ranked = self._ranked()
        kept: Sequence[str] = ranked[:1]
        best = next(
            (
                o
                for o, one in zip(self._overall(), self._run, strict=True)
                if one.checkpoint in kept
            ),
            None,
        )
        for name, (_, value) in zip(ranked[1:], self._tried, strict=False):
            if is_better(value, best, self.mode):
                kept, best = [*kept, name], value
        following = ranked[1 + len(self._tried) :]
        return dict.fromkeys([*kept, following[0]], 1.0) if following else None
