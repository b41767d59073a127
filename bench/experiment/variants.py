"""The variants of the experiment: the recipe with other settings, at a compute budget.

A variant that *matches* another one gets the budget with which its run of a seed takes as many
FLOPs as the other's run of that seed. The budget is computed from two finished runs: that of the
variant without the match, and the other's.

Example::

    find_variant("sft-linear").overrides            # ("method=sft", "train.schedule=linear")
    find_variant("sft@msft-3-total").match.kind     # total
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

REFERENCE = "sft"
"""The variant with which all are compared."""
Kind = Literal["training", "total"]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A budget that makes the FLOPs of two variants equal.

    Attributes:
        own: The variant with the same settings at a fixed budget.
        reference: The variant that sets the FLOPs.
        kind: The FLOPs of training alone, or of the whole run without its final tests.
    """

    own: str
    reference: str
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A training method with its settings.

    Attributes:
        name: The name in records and on the command line.
        label: The name in tables.
        overrides: Changes to the recipe, ``dotted.key=value``.
        match: The rule for its budget; ``None``: ``overrides`` or the recipe set the budget.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    match: Match | None = None


def matched(variant: Variant, reference: str, kind: Kind) -> Variant:
    """Return a variant at the FLOPs of another one."""
    return replace(
        variant,
        name=f"{variant.name}@{reference}-{kind}",
        label=f"{variant.label}, {kind} FLOPs of {reference}",
        match=Match(own=variant.name, reference=reference, kind=kind),
    )


def matching_budget(own: Mapping[str, Any], reference: Mapping[str, Any], kind: Kind) -> float:
    """Return the budget, in epochs, at which a variant takes the FLOPs of another one.

    Args:
        own: The record of the variant at a fixed budget.
        reference: The record of the other variant, of the same seed.
        kind: The FLOPs that shall be equal.

    Returns:
        A positive multiple of the epochs between two evaluations.
    """
    eval_every = own["eval_every"]
    ratio = _flops(reference, kind) / max(_flops(own, kind), 1)
    return float(round(max(1, round(own["budget"] * ratio / eval_every)) * eval_every, 10))


def _flops(record: Mapping[str, Any], kind: Kind) -> int:
    found = record["flops"]
    return int(found["training"] if kind == "training" else found["total"] - found["tests"])


def averaged(variant: Variant, kind: str) -> Variant:
    """Return a variant whose result may be an average of checkpoints."""
    return replace(
        variant,
        name=f"{variant.name}+{kind}",
        label=f"{variant.label}, {kind} averaged",
        overrides=(*variant.overrides, f"average.kind={kind}"),
    )


OPPONENTS = (
    Variant(name="sft", label="SFT", overrides=("method=sft",)),
    Variant(
        name="sft-linear",
        label="SFT, linear decay",
        overrides=("method=sft", "train.schedule=linear"),
    ),
    Variant(name="dynamix", label="DynamixSFT", overrides=("method=dynamix",)),
    Variant(name="ies", label="IES", overrides=("method=ies", "ies.delta=0.1")),
    Variant(name="sro", label="SRO", overrides=("method=single_rollout",)),
)
"""The other methods, at the recipe's budget."""
AVERAGES = ("last", "best", "decay", "champions", "greedy")
"""Kinds of averages, each of four checkpoints."""
AVERAGED = tuple(averaged(one, "best") for one in OPPONENTS)

_ONLINE = ("method=online", "msft.smoothing=1", "msft.margin=0.5", "msft.exclusion=hard")
_WINDOW = ("method=msft", "msft.peak_window=2")
_STAGES = ("msft.root_peaks=false", "msft.overall_window=2", "msft.restart_warmup=0.5")
CANDIDATES = (
    Variant(name="online", label="One pass", overrides=_ONLINE),
    Variant(
        name="online-soft",
        label="One pass, soft exclusion",
        overrides=(*_ONLINE, "msft.exclusion=soft"),
    ),
    Variant(
        name="online-return",
        label="One pass, forgotten come back",
        overrides=(*_ONLINE, "msft.return_margin=2"),
    ),
    Variant(
        name="online-both",
        label="One pass, soft, forgotten come back",
        overrides=(*_ONLINE, "msft.exclusion=soft", "msft.return_margin=2"),
    ),
    Variant(
        name="online-eager",
        label="One pass, soft, forgotten come back, patience 1",
        overrides=(*_ONLINE, "msft.exclusion=soft", "msft.return_margin=2", "msft.patience=1"),
    ),
    Variant(
        name="online-third",
        label="One pass, soft (floor 0.3)",
        overrides=(*_ONLINE, "msft.exclusion=soft", "msft.floor=0.3"),
    ),
    Variant(
        name="online-back",
        label="One pass, soft, with roll-backs",
        overrides=(*_ONLINE, "msft.exclusion=soft", "msft.rollback_margin=1"),
    ),
    Variant(
        name="msft-mended",
        label="MSFT, window 2, robust peaks, soft, reversible",
        overrides=(
            *_WINDOW,
            *_STAGES,
            *("msft.peaks=robust", "msft.smoothing=1", "msft.margin=0.5"),
            *("msft.exclusion=soft", "msft.return_margin=2"),
        ),
    ),
    Variant(name="msft-1", label="MSFT, C = 1", overrides=("method=msft", "msft.compute_budget=1")),
    Variant(name="msft-3", label="MSFT, C = 3", overrides=("method=msft", "msft.compute_budget=3")),
    Variant(name="msft-window", label="MSFT, window 2", overrides=_WINDOW),
    Variant(
        name="msft-robust",
        label="MSFT, window 2, robust peaks",
        overrides=(*_WINDOW, "msft.peaks=robust", "msft.smoothing=1", "msft.margin=0.5"),
    ),
    Variant(
        name="msft-soft",
        label="MSFT, window 2, soft exclusion",
        overrides=(*_WINDOW, "msft.exclusion=soft"),
    ),
)
"""MSFT's variants, of which validation data of the choosing seeds selects one."""
CHOSEN = "online-soft+best"
"""The candidate in the final rows. It is set by hand after the choosing phase."""

KINDS: tuple[Kind, ...] = ("training", "total")
_FIXED = {variant.name: variant for variant in (*OPPONENTS, *CANDIDATES)}
_FIXED |= {
    one.name: one
    for variant in (*OPPONENTS, *CANDIDATES)
    for one in (averaged(variant, kind) for kind in AVERAGES)
}


def find_variant(name: str) -> Variant:
    """Return a variant by its name: ``NAME``, ``NAME+AVERAGE`` or either ``@REFERENCE-KIND``.

    Raises :class:`KeyError` for an unknown name.
    """
    own, at, target = name.partition("@")
    if not at:
        return _FIXED[name]
    reference, _, kind = target.rpartition("-")
    kinds = {str(one): one for one in KINDS}
    return matched(_FIXED[own], _FIXED[reference].name, kinds[kind])


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The runs of one part of the experiment.

    Attributes:
        mixtures: The mixtures.
        variants: The variants, each after those that it matches.
        seeds: The seeds.
        split: The examples that its scores are of.
    """

    mixtures: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    split: Literal["validation", "test"]


PHASES: Mapping[str, Phase] = {
    "choose": Phase(
        mixtures=("heterogeneous", "mixture10"),
        variants=(
            *OPPONENTS,
            *AVERAGED,
            *CANDIDATES,
            *(averaged(one, "best") for one in CANDIDATES),
        ),
        seeds=(0, 1),
        split="validation",
    ),
    "final": Phase(
        mixtures=("heterogeneous", "heterogeneous2", "mixture10"),
        variants=(
            *OPPONENTS,
            *AVERAGED,
            _FIXED["online-soft"],
            _FIXED[CHOSEN],
            _FIXED["msft-1"],
            _FIXED["msft-1+best"],
            *(matched(_FIXED["sft+best"], "msft-1+best", kind) for kind in KINDS),
        ),
        seeds=(2, 3, 4, 5, 6),
        split="test",
    ),
}
"""The settings are chosen on two seeds and validation data, and judged on five others and test."""
