"""Parse the policies to simulate from command-line options.

A policy is a part of the ``msft`` section that does not change the training within a stage.

Example::

    expand_sweeps({"drop_passed": "2"}, ["peak-window=1,2,off"])     # 3, each with drop_passed 2
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from msft_store import KeepBest, KeepLast, Policy
from trainer.algorithms.base import Mode, Needs
from trainer.config.checks import check_ranges
from trainer.config.load import RECORDED, build
from trainer.config.schema import OVERALL, AverageConfig, Config, MsftConfig
from trainer.config.yaml import override
from trainer.errors import ConfigError, RunError
from trainer.journal import Record, run_started
from trainer.training.rollback_points import make_policy

OPTIONS = {
    "compute_budget": "C, epochs of a roll-out; at most the run's",
    "peak_window": "W, evaluations after which a peak has passed; off: the paper's rule",
    "peaks": "first_best (the paper's) or robust, to which the next three belong",
    "smoothing": "evaluations whose mean stands for a value",
    "margin": "standard errors by which a value must beat the best one",
    "patience": "evaluations after which a peak has passed",
    "overall_window": "evaluations without a better overall than the root's that end a stage",
    "root_peaks": "true (the paper's) or false: no peak at the root of a later stage",
    "drop_count": "sub-datasets of the same peak that are excluded at once, at most",
    "drop_passed": "sub-datasets with a peak that has passed that are excluded at once, at most",
    "max_stages": "stages at most",
}
"""Key of ``msft`` → its help text."""

_ROBUST_OPTIONS = ("smoothing", "margin", "patience")

Retention = Callable[[Needs, Mode], Policy]
"""Returns the retention policy for the needs of a strategy."""


def recorded_config(records: Sequence[Record]) -> Config:
    """Return the configuration of a journal's run.

    Raises :class:`RunError` if the journal has none, or if it is of an incompatible version.
    """
    start = run_started(records)
    try:
        return build(Config, {**RECORDED, **start["config"]})
    except (ConfigError, KeyError) as error:
        raise RunError(
            f"the journal's configuration is of another version ({error}): simulate with that one"
        ) from None


def with_policy(config: Config, policy: Mapping[str, Any], *, method: str = "msft") -> Config:
    """Return a run's configuration under another policy and method.

    Raises :class:`ConfigError` if a value is invalid, or if the run has no curves for it.
    """
    msft = build(MsftConfig, {**asdict(config.msft), **policy})
    # An average of the result changes no decision before it.
    changed = replace(config, method=method, msft=msft, average=AverageConfig(kind="none"))  # type: ignore[arg-type]
    check_ranges(changed)
    if msft.rollback_average > 1:
        raise ConfigError(
            "msft.rollback_average begins stages from averages, of which another policy makes "
            "others: there are no curves for them"
        )
    unused = [key for key in _ROBUST_OPTIONS if key in policy and msft.peaks != "robust"]
    if unused:
        raise ConfigError(f"{unused[0]} only applies to peaks robust: add --peaks robust")
    train, budget = config.train, config.msft.compute_budget
    if msft.compute_budget > budget:
        raise ConfigError(
            f"compute_budget {msft.compute_budget:g} is more than the run's {budget:g}: there are "
            "no curves for it"
        )
    decays = train.schedule != "constant" or train.warmup_ratio > 0
    if msft.compute_budget < budget and decays:
        raise ConfigError(
            "the run's learning rate follows its compute budget, so its curves are not those of a "
            "smaller one; only a constant rate without warm-up allows it"
        )
    return changed


def expand_sweeps(given: Mapping[str, str], sweeps: Sequence[str]) -> list[dict[str, Any]]:
    """Return one policy for each combination of values.

    ``given`` maps options to their values. ``sweeps`` have the form ``KEY=VALUE,VALUE``. Raises
    :class:`ConfigError` if a key is unknown or given twice.
    """
    choices: dict[str, list[str]] = {}
    for text in sweeps:
        name, equals, values = text.partition("=")
        key = name.strip().replace("-", "_")
        if not equals or key not in OPTIONS:
            known = ", ".join(option.replace("_", "-") for option in OPTIONS)
            raise ConfigError(f"--sweep {text!r} is not of the form KEY=VALUE,…; KEY: {known}")
        if key in choices or key in given:
            raise ConfigError(f"--sweep {text!r}: {name.strip()} is given twice")
        choices[key] = values.split(",")
    fixed = {key: _value(key, text) for key, text in given.items()}
    return [
        {**fixed, **{key: _value(key, value) for key, value in zip(choices, row, strict=True)}}
        for row in itertools.product(*choices.values())
    ]


def policy_label(policy: Mapping[str, Any]) -> str:
    """Return the options of a policy in words."""
    return ", ".join(
        f"{key.replace('_', ' ')} {'off' if value is None else value}"
        for key, value in policy.items()
    )


def retention_named(text: str) -> Retention:
    """Return a retention by name; raises :class:`ConfigError` if there is none.

    ``needs`` keeps the checkpoints that the method may use, ``last:K`` the newest, ``best:K`` the
    best overall, and ``all`` all of them.
    """
    name, _, count = text.partition(":")
    number = int(count) if count.isascii() and count.isdigit() else 0
    match name:
        case "needs" if not count:
            return make_policy
        case "all" if not count:
            return lambda needs, mode: KeepLast(2**62)
        case "last" if number:
            return lambda needs, mode: KeepLast(number)
        case "best" if number:
            return lambda needs, mode: KeepBest(OVERALL, number, mode=mode)
    raise ConfigError(f"there is no retention {text!r}: use needs, last:K, best:K or all")


def _value(key: str, text: str) -> Any:
    if text.strip().lower() in ("off", "none", "null"):
        return None
    tree: dict[str, Any] = {}
    override(tree, f"{key}={text}")
    return tree[key]
