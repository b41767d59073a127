"""Which runs a comparison is made of, and where each is kept.

Plain: one run a method, in ``OUTPUT_DIR/METHOD``. With seeds or budgets:
``OUTPUT_DIR/METHOD/C-1/seed-0``, and at MSFT's FLOPs ``OUTPUT_DIR/METHOD/C-1-equal/seed-0``.

Example::

    cases = grid(config, ["sft", "msft"], seeds=3, budgets=[1.0, 3.0])
    config_of(config, cases[0]).output_dir              # OUTPUT_DIR/sft/C-1/seed-0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from trainer.config.checks import check_settings
from trainer.config.schema import Config
from trainer.errors import ConfigError

LABELS = {
    "sft": "SFT",
    "continual": "Continual",
    "single_rollout": "SRO",
    "ies": "IES",
    "dynamix": "DynamixSFT",
    "msft": "MSFT",
}
"""What tables call a method."""

REFERENCE = "msft"
"""The method whose FLOPs the others are given for equal compute."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a comparison."""

    method: str
    budget: float
    """C as it was asked for, in epochs."""
    seed: int
    equal: bool = False
    """Whether C is replaced by what takes the FLOPs of MSFT's run of this budget and seed."""
    plain: bool = False
    """Whether the comparison has one run a method."""

    @property
    def label(self) -> str:
        """What tables call its method."""
        return LABELS.get(self.method, self.method.upper())

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.plain:
            return self.label
        equal = " at MSFT's FLOPs" if self.equal else ""
        return f"{self.label}, C = {self.budget:g}{equal}, seed {self.seed}"

    @property
    def path(self) -> Path:
        """Its directory, relative to that of the comparison."""
        if self.plain:
            return Path(self.method)
        equal = "-equal" if self.equal else ""
        return Path(self.method, f"C-{self.budget:g}{equal}", f"seed-{self.seed}")


def grid(
    config: Config,
    methods: Sequence[str],
    *,
    seeds: int | None = None,
    budgets: Sequence[float] = (),
    equal_compute: bool = False,
) -> list[Case]:
    """Return the runs, by budget, then seed, then method; those at MSFT's FLOPs come last.

    ``seeds`` counts from ``config.seed``. Without ``seeds``, ``budgets`` and ``equal_compute`` the
    comparison is plain. Raises :class:`ConfigError` for what cannot be run.
    """
    _check_methods(methods)
    if equal_compute and REFERENCE not in methods:
        raise ConfigError("--equal-compute needs msft among --methods: its FLOPs are the measure")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    if len(set(budgets)) < len(budgets):
        raise ConfigError("--budgets names a budget twice: name each only once")
    plain = seeds is None and not budgets and not equal_compute
    ordinary = [
        Case(method=method, budget=budget, seed=config.seed + number, plain=plain)
        for budget in (budgets or [config.msft.compute_budget])
        for number in range(seeds or 1)
        for method in methods
    ]
    for case in ordinary:
        check_settings(config_of(config, case))
    equal = [replace(case, equal=True) for case in ordinary if case.method != REFERENCE]
    return ordinary + (equal if equal_compute else [])


def config_of(config: Config, case: Case, budget: float | None = None) -> Config:
    """Return the configuration of one run; ``budget`` replaces its C where compute is equal."""
    changed: Any = replace(
        config,
        method=case.method,  # type: ignore[arg-type]
        seed=case.seed,
        output_dir=str(Path(config.output_dir) / case.path),
        msft=replace(config.msft, compute_budget=case.budget if budget is None else budget),
    )
    return changed  # type: ignore[no-any-return]


def equal_budget(case: Case, *, flops: int, reference_flops: int, eval_every: float) -> float:
    """Return the C at which a method takes about the FLOPs of MSFT's run.

    ``flops`` is what it took at ``case.budget``, taken to be proportional to C (so without the
    final tests); the result is the nearest multiple of ``eval_every``, at least one.
    """
    evaluations = case.budget * reference_flops / max(flops, 1) / eval_every
    return round(max(1, round(evaluations)) * eval_every, 10)


def _check_methods(methods: Sequence[str]) -> None:
    known = get_args(get_type_hints(Config)["method"])
    for method in methods:
        if method not in known:
            raise ConfigError(f"there is no method {method!r}; there are {', '.join(known)}")
    if not methods or len(set(methods)) < len(methods):
        raise ConfigError("name at least one method, and each only once")
