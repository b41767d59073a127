"""Simulate how often MSFT's first stage excludes a sub-dataset too early because of noise.

The recorded validation curves of plain SFT are smoothed to *true* curves, each of which first falls
and then rises. Noise of the recorded standard errors is added to them, many times, and each noisy
copy goes through the rule that ends MSFT's first stage. An exclusion is *false* if the true peak
has not passed at the evaluation that decides it. It is *early* if the true peak lies after the
checkpoint of the roll-back.

The noise of an evaluation is independent of that of the next one here. In a run all evaluations
have the same examples, so that their errors are correlated and the rates are upper bounds.

Example::

    python -m bench.experiment.false_exclusions     # the table, of bench/results/experiment.jsonl
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.experiment.records import RECORDS, load
from bench.experiment.variants import REFERENCE
from trainer.algorithms.peaks import PeakRule, champions
from trainer.config.schema import OVERALL
from trainer.text import Table

DRAWS = 1000
"""Noisy copies for each mixture, over all its recorded runs."""
Curves = Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A rule that ends MSFT's first stage.

    Attributes:
        label: Its name in the table.
        rule: The rule that finds peaks.
        evaluations: Evaluations after the first one in the compute budget; ``None``: all recorded.
        window: The peak window W; ``None``: none.
    """

    label: str
    rule: PeakRule
    evaluations: int | None = None
    window: int | None = None


_ROBUST = PeakRule(smoothing=3, margin=1.0, patience=2)
_MARGIN = PeakRule(margin=1.0, patience=2)
SETTINGS = (
    Setting(label="first best, C = 3", rule=PeakRule(), evaluations=3),
    Setting(label="margin 1, patience 2, C = 3", rule=_MARGIN, evaluations=3),
    Setting(label="robust, C = 3", rule=_ROBUST, evaluations=3),
    Setting(label="first best, window 1", rule=PeakRule(), window=1),
    Setting(label="first best, window 2", rule=PeakRule(), window=2),
    Setting(label="margin 1, patience 2, window 2", rule=_MARGIN, window=2),
    Setting(label="robust, window 2", rule=_ROBUST, window=2),
    Setting(label="first best, whole curve", rule=PeakRule()),
    Setting(label="robust, whole curve", rule=_ROBUST),
)


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """The exclusion of a first stage: the sub-dataset, the index of its peak, that of the end."""

    name: str
    peak: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Exclusions in a share of the first stages."""

    any: float
    false: float
    early: float


def fit(values: Sequence[float]) -> list[float]:
    """Return the curve nearest to the values, by least squares, that first falls and then rises."""
    fits = []
    for turn in range(len(values)):
        falling = [-value for value in _rising([-value for value in values[:turn]])]
        fits.append([*falling, *_rising(values[turn:])])
    return min(fits, key=lambda found: math.dist(found, values))


def _rising(values: Sequence[float]) -> list[float]:
    """Return the nearest curve that never falls, by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] >= mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def first_exclusion(curves: Curves, errors: Curves, setting: Setting) -> Exclusion | None:
    """Return the exclusion that ends the first stage on these curves of losses, if there is one."""
    last = min(map(len, curves.values())) - 1
    last = last if setting.evaluations is None else min(last, setting.evaluations)
    modes = dict.fromkeys(curves, "min")
    for end in range(1 if setting.window is not None else last, last + 1):
        found = champions(
            {name: values[: end + 1] for name, values in curves.items()},
            {name: values[: end + 1] for name, values in errors.items()},
            modes,  # type: ignore[arg-type]
            setting.rule,
        )
        if setting.window is not None and end < last and end - found[0][0] < setting.window:
            continue
        peak, name = found[0]
        passed = setting.rule.has_passed(peak, end)
        return Exclusion(name=name, peak=peak, end=end) if passed else None
    return None


def simulate(
    runs: Sequence[tuple[Curves, Curves]], setting: Setting, *, draws: int = DRAWS, seed: int = 0
) -> Rates:
    """Return the rates of exclusions on noisy copies of the curves of some runs.

    Args:
        runs: Of each run the losses of its sub-datasets, and their standard errors.
        setting: The rule that ends the first stage.
        draws: Noisy copies, over all runs in turns.
        seed: Seed of the noise.
    """
    rng = random.Random(seed)
    true = [{name: fit(values) for name, values in curves.items()} for curves, _ in runs]
    counts = {"any": 0, "false": 0, "early": 0}
    for curves, (_, errors) in itertools.islice(
        itertools.cycle(zip(true, runs, strict=True)), draws
    ):
        noisy = {
            name: [rng.gauss(v, e) for v, e in zip(values, errors[name], strict=True)]
            for name, values in curves.items()
        }
        found = first_exclusion(noisy, errors, setting)
        if found is not None:
            values = curves[found.name]
            peak = values.index(min(values))
            counts["any"] += 1
            counts["false"] += peak > found.end
            counts["early"] += peak > found.peak
    return Rates(**{name: count / draws for name, count in counts.items()})


def recorded_curves(records: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[Curves, Curves]]]:
    """Return losses and standard errors of the finite runs of plain SFT, by mixture."""
    found: dict[str, list[tuple[Curves, Curves]]] = {}
    for record in records:
        stage = record["first_stage"]
        values = {name: curve for name, curve in stage["values"].items() if name != OVERALL}
        numbers = [*values.values(), *stage["errors"].values()]
        is_whole = values.keys() == stage["errors"].keys() and None not in itertools.chain(*numbers)
        if record["variant"] == REFERENCE and is_whole and len(stage["epochs"]) > 1:
            found.setdefault(record["mixture"], []).append((values, stage["errors"]))
    return found


def exclusion_table(records: Iterable[Mapping[str, Any]], *, draws: int = DRAWS) -> Table:
    """Return the rates by mixture and setting, in percent of the first stages."""
    rows = []
    for mixture, runs in sorted(recorded_curves(records).items()):
        for setting in SETTINGS:
            rates = simulate(runs, setting, draws=draws)
            shares = (rates.any, rates.early, rates.false)
            rows.append((f"{mixture}: {setting.label}", *(f"{100 * one:.1f}" for one in shares)))
    return Table(header=("% of first stages", "exclude", "too early", "falsely"), rows=rows)


if __name__ == "__main__":
    print(exclusion_table(load(RECORDS)).to_markdown())
