"""Rows of the experiment's tables: each a variant on a mixture over seeds, from the records.

Of several records of a mixture, variant and seed the last one counts.

Example::

    rows = build_rows(load(RECORDS), PHASES["final"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.experiment.variants import CHOSEN, REFERENCE, Phase
from trainer.comparison.results import (
    Estimate,
    estimate,
    estimate_difference,
    standard_deviation,
)
from trainer.config.schema import OVERALL

_TERA = 1e12

Record = Mapping[str, Any]
Runs = Mapping[int, Record]
"""The records of a variant on a mixture, by seed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant on a mixture, over the seeds of a phase.

    Attributes:
        mixture: The mixture.
        variant: The name of the variant.
        label: Its label.
        seeds: The seeds with a record.
        score: The overall loss.
        to_reference: The paired difference of the loss to the reference's.
        to_chosen: The paired difference of the loss to the chosen candidate's.
        right: Share of right answers on the test sets.
        spread: Standard deviation of the loss across sub-datasets.
        budget: The compute budget in epochs.
        training: Training TFLOPs.
        total: TFLOPs of the whole run.
        evaluation: Share of the total that evaluations take.
    """

    mixture: str
    variant: str
    label: str
    seeds: tuple[int, ...]
    score: Estimate | None
    to_reference: Estimate | None
    to_chosen: Estimate | None
    right: Estimate | None
    spread: Estimate | None
    budget: Estimate | None
    training: Estimate | None
    total: Estimate | None
    evaluation: Estimate | None


def group(records: Iterable[Record], phase: Phase) -> dict[str, dict[str, Runs]]:
    """Return the records of a phase's seeds by mixture, variant and seed."""
    found: dict[str, dict[str, dict[int, Record]]] = {}
    for record in records:
        if record["seed"] in phase.seeds:
            variants = found.setdefault(record["mixture"], {})
            variants.setdefault(record["variant"], {})[record["seed"]] = record
    return {
        mixture: {
            variant.name: found[mixture][variant.name]
            for variant in phase.variants
            if variant.name in found[mixture]
        }
        for mixture in phase.mixtures
        if mixture in found
    }


def build_rows(records: Iterable[Record], phase: Phase) -> list[Row]:
    """Return a row for each mixture and variant of a phase that has a record."""
    labels = {variant.name: variant.label for variant in phase.variants}
    rows = []
    for mixture, variants in group(records, phase).items():
        losses = {name: _losses(runs, phase) for name, runs in variants.items()}
        for name, runs in variants.items():
            own = losses[name]
            rows.append(
                Row(
                    mixture=mixture,
                    variant=name,
                    label=labels[name],
                    seeds=tuple(sorted(runs)),
                    score=estimate(own.values()),
                    to_reference=_difference(name, REFERENCE, losses),
                    to_chosen=_difference(name, CHOSEN, losses),
                    right=_over(runs, _right),
                    spread=_over(runs, lambda run: _spread(run, phase)),
                    budget=_over(runs, lambda run: run["budget"]),
                    training=_over(runs, lambda run: run["flops"]["training"] / _TERA),
                    total=_over(runs, lambda run: run["flops"]["total"] / _TERA),
                    evaluation=_over(
                        runs, lambda run: run["flops"]["evaluation"] / run["flops"]["total"]
                    ),
                )
            )
    return rows


def _losses(runs: Runs, phase: Phase) -> dict[int, float]:
    values = {seed: run["scores"][OVERALL][phase.split] for seed, run in runs.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _difference(
    name: str, other: str, losses: Mapping[str, Mapping[int, float]]
) -> Estimate | None:
    if name == other or other not in losses:
        return None
    return estimate_difference(losses[name], losses[other])


def _over(runs: Runs, value: Callable[[Record], float]) -> Estimate | None:
    return estimate(value(run) for run in runs.values())


def _right(run: Record) -> float:
    asked = sum(run["examples"][name]["test"] for name in run["right"])
    return float(sum(run["right"].values()) / asked)


def _spread(run: Record, phase: Phase) -> float:
    scores = (score[phase.split] for name, score in run["scores"].items() if name != OVERALL)
    return standard_deviation(float("nan") if one is None else one for one in scores)
