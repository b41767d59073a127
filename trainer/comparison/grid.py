"""List the runs of a comparison, with the configuration and the directory of each.

With one run for each method a run is in ``OUTPUT_DIR/METHOD``. With seeds or budgets it is in
``OUTPUT_DIR/METHOD/C-1/seed-0``, and at MSFT's FLOPs in ``OUTPUT_DIR/METHOD/C-1-equal/seed-0``.

Example::

    cases = list_cases(config, ["sft", "msft"], seeds=3, budgets=[1.0, 3.0])
    build_config(config, cases[0]).output_dir              # OUTPUT_DIR/sft/C-1/seed-0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

from trainer.config.checks import check_settings
from trainer.config.schema import Config
from trainer.errors import ConfigError

LABELS = {
    "sft": "SFT",
    "continual": "Continual",
    "single_rollout": "SRO",
    "ies": "IES",
    "dynamix": "DynamixSFT",
    "online": "Online",
    "msft": "MSFT",
}

REFERENCE = "msft"
"""The method whose FLOPs set the budget of the others for equal compute."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a comparison."""

    method: str
    budget: float
    """The requested C, in epochs."""
    seed: int
    equal_compute: bool = False
    """True if C is set so that the run takes the FLOPs of MSFT's run of this seed."""
    is_single: bool = False
    """True if the comparison has one run for each method."""

    @property
    def label(self) -> str:
        """Name of the method in tables."""
        return LABELS.get(self.method, self.method.upper())

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        if self.is_single:
            return self.label
        equal = " at MSFT's FLOPs" if self.equal_compute else ""
        return f"{self.label}, C = {self.budget:g}{equal}, seed {self.seed}"

    @property
    def path(self) -> Path:
        """Directory of the run, relative to that of the comparison."""
        if self.is_single:
            return Path(self.method)
        equal = "-equal" if self.equal_compute else ""
        return Path(self.method, f"C-{self.budget:g}{equal}", f"seed-{self.seed}")


def list_cases(
    config: Config,
    methods: Sequence[str],
    *,
    seeds: int | None = None,
    budgets: Sequence[float] = (),
    equal_compute: bool = False,
) -> list[Case]:
    """Return the runs by budget, seed and method; those at MSFT's FLOPs come last.

    Seeds begin at ``config.seed``. Without ``seeds``, ``budgets`` and ``equal_compute`` there is
    one run for each method. Raises :class:`ConfigError` for an invalid combination.
    """
    _check_methods(methods)
    if equal_compute and REFERENCE not in methods:
        raise ConfigError("--equal-compute needs msft among --methods: its FLOPs are the reference")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    if len(set(budgets)) < len(budgets):
        raise ConfigError("--budgets names a budget twice: name each only once")
    is_single = seeds is None and not budgets and not equal_compute
    ordinary = [
        Case(method=method, budget=budget, seed=config.seed + number, is_single=is_single)
        for budget in (budgets or [config.msft.compute_budget])
        for number in range(seeds or 1)
        for method in methods
    ]
    for case in ordinary:
        check_settings(build_config(config, case))
    equal = [replace(case, equal_compute=True) for case in ordinary if case.method != REFERENCE]
    return ordinary + (equal if equal_compute else [])


def build_config(config: Config, case: Case, budget: float | None = None) -> Config:
    """Return the configuration of one run; ``budget`` replaces its C for equal compute."""
    return replace(
        config,
        method=case.method,  # type: ignore[arg-type]
        seed=case.seed,
        output_dir=str(Path(config.output_dir) / case.path),
        msft=replace(config.msft, compute_budget=case.budget if budget is None else budget),
    )


def compute_equal_budget(
    case: Case, *, flops: int, reference_flops: int, eval_every: float
) -> float:
    """Return the C at which a method takes about the FLOPs of MSFT's run.

    ``flops`` are those of the method at ``case.budget``. Both counts exclude the final tests, so
    that they are proportional to C. The result is a positive multiple of ``eval_every``.
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
