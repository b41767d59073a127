"""Train several methods on one configuration, over seeds and budgets, and compare them.

Each run has a directory of its own (:mod:`trainer.comparison.grid`).

Example::

    comparison = compare(load_config("config.yaml"), ["sft", "msft"], seeds=3, jobs=2)
    comparison.groups[0].row("msft").score("overall").mean
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from msft_store import StoreError
from trainer.comparison.grid import REFERENCE, Case, build_config, compute_equal_budget, list_cases
from trainer.comparison.report import write_comparison
from trainer.comparison.results import Comparison, Outcome, group_outcomes
from trainer.comparison.subprocesses import run_subprocesses
from trainer.config.load import dump, flatten, load_config, to_dict
from trainer.config.schema import Config
from trainer.distributed import this_process
from trainer.errors import ConfigError, PausedError, RunError, TrainerError, first_line
from trainer.files import make_directory
from trainer.journal import read, run_started, select
from trainer.report.flops import Account
from trainer.report.summary import summarize
from trainer.training.directory import CONFIG, JOURNAL, MODEL
from trainer.training.run import is_finished, resume, start

_FAILURES = (TrainerError, StoreError, OSError, torch.OutOfMemoryError)
_DIVERGED, _PAUSED, _SIGNALLED = 3, 75, 128
"""Exit codes of ``msft-train``; a signal's number is added to the last one."""
_log = logging.getLogger(__name__)


_Tasks = Mapping[Case, Config]
"""The configuration of each run to be trained."""


def compare(
    config: Config,
    methods: Sequence[str],
    *,
    seeds: int | None = None,
    budgets: Sequence[float] = (),
    equal_compute: bool = False,
    jobs: int = 1,
    keep_models: bool = False,
    progress: bool = False,
) -> Comparison:
    """Train a configuration with several methods and compare the results.

    A finished run is only read, an interrupted one is continued, and one that fails does not stop
    the others. The tables are written to ``config.output_dir``.

    Args:
        config: The configuration that all runs share, from :func:`load_config`.
        methods: Names of methods, such as ``["sft", "msft"]``.
        seeds: Runs of each method, with the configured seed and the following ones. ``None``: one.
        budgets: Values of ``msft.compute_budget`` in epochs. Empty: the configured one.
        equal_compute: Also run every other method with the budget that takes about MSFT's FLOPs.
        jobs: Runs at the same time, each in a process of its own.
        keep_models: Keep ``model/`` of every run. By default only a comparison with one run for
            each method keeps it; the store of each run has the result anyway.
        progress: Show progress bars on stderr.

    Returns:
        The comparison, by budget, method and seed, with means and their standard errors.

    Raises:
        ConfigError: An argument or the configuration is wrong. Nothing was run.
        RunError: ``output_dir`` has runs of another configuration, or no run finished.
        PausedError: The disk is full. The same call continues the comparison.
        ~trainer.signals.Interrupted: SIGINT or SIGTERM ended a run. The same call continues the
            comparison.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    if jobs > 1 and this_process().num_processes > 1:
        raise ConfigError("--jobs cannot be combined with several processes for each run: omit it")
    cases = list_cases(config, methods, seeds=seeds, budgets=budgets, equal_compute=equal_compute)
    ordinary = {case: _configure(config, case) for case in cases if not case.equal_compute}
    done = sum(is_finished(Path(config.output_dir) / case.path) for case in cases)
    keeps = "each keeps its model" if keep_models or cases[0].is_single else "none keeps its model"
    _log.info(
        "%d runs in %s, %d of them finished already; %s", len(cases), config.output_dir, done, keeps
    )
    runner = _Runner(jobs=jobs, keep_models=keep_models, progress=progress)
    outcomes = runner.run(ordinary)
    equal = [case for case in cases if case.equal_compute]
    tasks, not_run = _plan_equal_compute(config, equal, outcomes)
    outcomes = {**outcomes, **not_run, **runner.run(tasks)}
    comparison = group_outcomes({case: outcomes[case] for case in cases})
    if comparison.first is None:
        raise RunError(next(iter(comparison.failures.values())))
    if this_process().is_main_process:
        write_comparison(Path(config.output_dir), comparison)
    return comparison


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """Trains runs one after the other in this process, or several at once in subprocesses."""

    jobs: int
    keep_models: bool
    progress: bool

    def run(self, tasks: _Tasks) -> dict[Case, Outcome]:
        """Train the runs that are not finished, and return the outcomes of all."""
        todo = {}
        for case, config in tasks.items():
            if is_finished(Path(config.output_dir)):
                _log.info("== %s in %s is finished", case.name, config.output_dir)
            else:
                todo[case] = config
        failures = self._run_in_subprocesses(todo) if self.jobs > 1 else self._run_here(todo)
        outcomes = {}
        for case, config in tasks.items():
            directory = Path(config.output_dir)
            finished = is_finished(directory)
            outcomes[case] = Outcome(
                budget=config.msft.compute_budget,
                summary=summarize(read(directory / JOURNAL)) if finished else None,
                failure="" if finished else failures.get(case) or "it was not run",
            )
        return outcomes

    def _run_here(self, tasks: _Tasks) -> dict[Case, str]:
        failures = {}
        for case, config in tasks.items():
            _log.info("== %s in %s", case.name, config.output_dir)
            try:
                if (Path(config.output_dir) / CONFIG).exists():
                    resume(config.output_dir, progress=self.progress)
                else:
                    start(config, progress=self.progress)
            except PausedError:
                raise
            except _FAILURES as error:
                # The other processes of a distributed run may not have failed, so none may go on.
                if this_process().num_processes > 1:
                    raise
                failures[case] = first_line(error)
                _log.warning("%s did not finish: %s", case.name, failures[case])
            self._drop_model(case, config)
        return failures

    def _run_in_subprocesses(self, tasks: _Tasks) -> dict[Case, str]:
        cases = {case.name: case for case in tasks}
        failures: dict[Case, str] = {}
        paused: list[str] = []
        ended: list[str] = []

        def handle_exit(name: str, code: int, line: str) -> bool:
            ended.append(name)
            if code in (0, _DIVERGED):
                self._drop_model(cases[name], tasks[cases[name]])
                _log.info("%s is finished, %d of %d", name, len(ended), len(tasks))
                return True
            why = line or f"its process ended with code {code}"
            if code < 0 or code > _SIGNALLED:
                why = f"{why} (give the same command again to continue)"
            failures[cases[name]] = why
            _log.warning("%s did not finish: %s", name, why)
            if code == _PAUSED:
                paused.append(why)
            return not paused

        def handle_start(name: str) -> None:
            _log.info("== %s in %s", name, tasks[cases[name]].output_dir)

        with tempfile.TemporaryDirectory(prefix="msft-compare-") as folder:
            commands = {n: _build_command(c, tasks[c], Path(folder)) for n, c in cases.items()}
            run_subprocesses(commands, jobs=self.jobs, on_exit=handle_exit, on_start=handle_start)
        if paused:
            raise PausedError(paused[0])
        return failures

    def _drop_model(self, case: Case, config: Config) -> None:
        directory = Path(config.output_dir)
        keep = self.keep_models or case.is_single
        if not keep and this_process().is_main_process and is_finished(directory):
            shutil.rmtree(directory / MODEL, ignore_errors=True)


def _plan_equal_compute(
    config: Config, cases: Sequence[Case], ordinary: Mapping[Case, Outcome]
) -> tuple[_Tasks, dict[Case, Outcome]]:
    """Return the runs at MSFT's FLOPs, and the outcomes of the cases that are not run.

    A case is not run if an ordinary run that sets its C did not finish, or if its C is the ordinary
    one.
    """
    tasks, outcomes = {}, {}
    for case in cases:
        own_case = replace(case, equal_compute=False)
        own, reference = ordinary[own_case], ordinary[replace(own_case, method=REFERENCE)]
        if own.summary is None or reference.summary is None:
            failed = case.label if own.summary is None else "MSFT"
            why = f"{failed}'s ordinary run of this seed, which sets its C, did not finish"
            outcomes[case] = Outcome(budget=case.budget, summary=None, failure=why)
            continue
        fixed = _count_test_flops(Path(config.output_dir) / own_case.path)
        budget = compute_equal_budget(
            case,
            flops=own.summary.account.total.flops - fixed,
            reference_flops=reference.summary.account.total.flops - fixed,
            eval_every=_epochs_between_evaluations(Path(config.output_dir) / own_case.path),
        )
        if budget == case.budget:
            outcomes[case] = own
        else:
            tasks[case] = _configure(config, case, budget)
    return tasks, outcomes


def _epochs_between_evaluations(directory: Path) -> float:
    """Return the epochs of the whole mixture between two evaluations of a run."""
    start = run_started(read(directory / JOURNAL))
    evaluation = start["config"]["evaluation"]
    every = float(evaluation["eval_every"])
    return every / start["steps_per_epoch"] if evaluation.get("cadence") == "steps" else every


def _count_test_flops(directory: Path) -> int:
    """Return the FLOPs of a run's final tests, which do not depend on its C."""
    records = select(read(directory / JOURNAL), "run_started", "tested")
    return Account.from_journal(records).total.flops


def _build_command(case: Case, config: Config, folder: Path) -> list[str]:
    """Return the arguments with which ``msft-train`` runs or resumes a run."""
    directory = Path(config.output_dir)
    if (directory / CONFIG).exists():
        return ["resume", str(directory), "--quiet"]
    path = folder / f"{'-'.join(case.path.parts)}.yaml"
    path.write_text(dump(config), encoding="utf-8")
    make_directory(directory.parent)
    return ["run", str(path), "--quiet"]


def _configure(config: Config, case: Case, budget: float | None = None) -> Config:
    """Configure a run; raise :class:`RunError` if its directory has another run."""
    own = build_config(config, case, budget)
    path = Path(own.output_dir) / CONFIG
    if not path.exists():
        return own
    stored = replace(load_config(path), output_dir=own.output_dir)
    existing, wanted = flatten(to_dict(stored)), flatten(to_dict(own))
    differing = [key for key in {**existing, **wanted} if existing.get(key) != wanted.get(key)]
    if differing:
        raise RunError(
            f"the run in {own.output_dir} has another {', '.join(differing[:3])}: choose another "
            "output_dir, or remove that directory to start again"
        )
    return own
