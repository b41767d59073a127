"""Several methods on the same configuration, over seeds and budgets, set side by side.

Each run is an ordinary one in a directory of its own (:mod:`trainer.comparison.grid`). One that is
finished is not repeated, one that was interrupted is continued; one that fails does not stop the
others.

Example::

    comparison = compare(load_config("config.yaml"), ["sft", "msft"], seeds=3, jobs=2)
    comparison.groups[0].row("msft").score("overall").mean
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from msft_store import StoreError
from trainer.comparison.grid import REFERENCE, Case, config_of, equal_budget, grid
from trainer.comparison.report import write_comparison
from trainer.comparison.results import Comparison, Outcome, collect, total
from trainer.comparison.subprocesses import run_children
from trainer.config.load import dump, load_config, to_dict
from trainer.config.schema import Config
from trainer.distributed import this_process
from trainer.errors import ConfigError, PausedError, RunError, TrainerError
from trainer.files import make_directory
from trainer.journal import read
from trainer.report.flops import Account
from trainer.report.summary import Summary, summarize
from trainer.training.directory import CONFIG, JOURNAL, MODEL
from trainer.training.loop import Say
from trainer.training.run import is_finished, resume, start

_FAILURES = (TrainerError, StoreError, OSError, torch.OutOfMemoryError)
_DIVERGED, _PAUSED, _SIGNALLED = 3, 75, 128


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A run that is to be done."""

    case: Case
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)


def compare(
    config: Config,
    methods: Sequence[str],
    *,
    seeds: int | None = None,
    budgets: Sequence[float] = (),
    equal_compute: bool = False,
    jobs: int = 1,
    keep_models: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> Comparison:
    """Do all runs that are not done, write the tables, and return what they come to.

    Of plain comparisons (:func:`trainer.comparison.grid.grid`) every run keeps its ``model/``; of
    others only with ``keep_models``, for the store of each run holds its result anyway. Raises
    :class:`ConfigError` or :class:`RunError` before anything runs, :class:`Interrupted` on a
    signal, :class:`PausedError` where there is no room, and :class:`RunError` if no run finished.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    if jobs > 1 and this_process().num_processes > 1:
        raise ConfigError("--jobs does not go with several processes a run: leave it out")
    cases = grid(config, methods, seeds=seeds, budgets=budgets, equal_compute=equal_compute)
    ordinary = [
        _Task(case=case, config=config_of(config, case)) for case in cases if not case.equal
    ]
    for task in ordinary:
        _check_same(task)
    directories = [Path(config.output_dir) / case.path for case in cases]
    done = sum(map(is_finished, directories))
    keeps = "each keeps its model" if keep_models or cases[0].plain else "none keeps its model"
    say(f"{len(cases)} runs in {config.output_dir}, {done} of them finished already; {keeps}")
    runner = _Runner(jobs=jobs, keep_models=keep_models, say=say, progress=progress)
    outcomes = runner.run(ordinary)
    tasks, missing = _equal_tasks(config, [case for case in cases if case.equal], outcomes)
    outcomes = {**outcomes, **missing, **runner.run(tasks)}
    comparison = collect({case: outcomes[case] for case in cases})
    if comparison.first is None:
        raise RunError(next(iter(comparison.failures.values())))
    if this_process().is_main_process:
        write_comparison(Path(config.output_dir), comparison)
    return comparison


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """Does runs, here one after the other or in several child processes."""

    jobs: int
    keep_models: bool
    say: Say
    progress: bool

    def run(self, tasks: Sequence[_Task]) -> dict[Case, Outcome]:
        """Return what became of each; those that are finished already are only read."""
        todo = [task for task in tasks if not is_finished(task.directory)]
        for task in tasks:
            if task not in todo:
                self.say(f"== {task.case.name} in {task.directory} is finished")
        failures = self._in_children(todo) if self.jobs > 1 else self._here(todo)
        return {task.case: self._outcome(task, failures.get(task.case, "")) for task in tasks}

    def _here(self, tasks: Sequence[_Task]) -> dict[Case, str]:
        failures = {}
        for task in tasks:
            self.say(f"== {task.case.name} in {task.directory}")
            try:
                if (task.directory / CONFIG).exists():
                    resume(task.directory, say=self.say, progress=self.progress)
                else:
                    start(task.config, say=self.say, progress=self.progress)
            except PausedError:
                raise
            except _FAILURES as error:
                # All processes of a run must do the same, and this one alone may have failed.
                if this_process().num_processes > 1:
                    raise
                failures[task.case] = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.say(f"{task.case.name} did not finish: {failures[task.case]}")
            self._drop_model(task)
        return failures

    def _in_children(self, tasks: Sequence[_Task]) -> dict[Case, str]:
        by_name = {task.case.name: task for task in tasks}
        failures: dict[Case, str] = {}
        paused: list[str] = []
        ended_count = 0

        def ended(name: str, code: int, line: str) -> bool:
            nonlocal ended_count
            ended_count += 1
            if code in (0, _DIVERGED):
                self._drop_model(by_name[name])
                self.say(f"{name} is finished, {ended_count} of {len(tasks)}")
                return True
            why = line or f"its process ended with code {code}"
            if code < 0 or code > _SIGNALLED:
                why = f"{why} (give the same command again to go on)"
            failures[by_name[name].case] = why
            self.say(f"{name} did not finish: {why}")
            if code == _PAUSED:
                paused.append(why)
            return not paused

        with tempfile.TemporaryDirectory(prefix="msft-compare-") as folder:
            run_children(
                {name: _command(task, Path(folder)) for name, task in by_name.items()},
                at_once=self.jobs,
                ended=ended,
                begun=lambda name: self.say(f"== {name} in {by_name[name].directory}"),
            )
        if paused:
            raise PausedError(paused[0])
        return failures

    def _drop_model(self, task: _Task) -> None:
        keep = self.keep_models or task.case.plain
        if not keep and this_process().is_main_process and is_finished(task.directory):
            shutil.rmtree(task.directory / MODEL, ignore_errors=True)

    def _outcome(self, task: _Task, failure: str) -> Outcome:
        finished = is_finished(task.directory)
        return Outcome(
            budget=task.config.msft.compute_budget,
            summary=_summary(task.directory) if finished else None,
            failure="" if finished else failure or "it has not been run",
        )


def _equal_tasks(
    config: Config, cases: Sequence[Case], ordinary: Mapping[Case, Outcome]
) -> tuple[list[_Task], dict[Case, Outcome]]:
    """Return the runs at MSFT's FLOPs, and outcomes where no run is needed or possible.

    None is needed where the method takes these FLOPs at its ordinary C.
    """
    tasks, outcomes = [], {}
    for case in cases:
        own = ordinary[replace(case, equal=False)]
        measure = ordinary[replace(case, equal=False, method=REFERENCE)]
        if own.summary is None or measure.summary is None:
            failed = case.label if own.summary is None else "MSFT"
            why = f"{failed}'s ordinary run of this seed, which sets its C, did not finish"
            outcomes[case] = Outcome(budget=case.budget, summary=None, failure=why)
            continue
        fixed = _test_flops(Path(config.output_dir) / replace(case, equal=False).path)
        budget = equal_budget(
            case,
            flops=total(own.summary.account).flops - fixed,
            reference_flops=total(measure.summary.account).flops - fixed,
            eval_every=config.evaluation.eval_every,
        )
        if budget == case.budget:
            outcomes[case] = own
            continue
        task = _Task(case=case, config=config_of(config, case, budget))
        _check_same(task)
        tasks.append(task)
    return tasks, outcomes


def _test_flops(directory: Path) -> int:
    """Return the FLOPs of a run's final tests, which are the same whatever its C."""
    kinds = ("run_started", "tested")
    records = [r for r in read(directory / JOURNAL) if r["event"] in kinds]
    return total(Account.from_journal(records)).flops


def _command(task: _Task, folder: Path) -> list[str]:
    """Return the arguments of ``msft-train`` for a run."""
    if (task.directory / CONFIG).exists():
        return ["resume", str(task.directory), "--quiet"]
    path = folder / f"{'-'.join(task.case.path.parts)}.yaml"
    path.write_text(dump(task.config), encoding="utf-8")
    make_directory(task.directory.parent)
    return ["run", str(path), "--quiet"]


def _summary(directory: Path) -> Summary:
    return summarize(read(directory / JOURNAL))


def _check_same(task: _Task) -> None:
    """Raise :class:`RunError` where the run in the task's directory has another configuration."""
    directory = task.directory
    if not (directory / CONFIG).exists():
        return
    there = to_dict(replace(load_config(directory / CONFIG), output_dir=task.config.output_dir))
    differing = _differences(there, to_dict(task.config))
    if differing:
        raise RunError(
            f"the run in {directory} has another {', '.join(differing[:3])}: choose another "
            "output_dir, or remove that directory to begin again"
        )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], at: str = "") -> list[str]:
    """Return the dotted keys in which two trees differ."""
    found = []
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{at}{key}.")
        elif a != b:
            found.append(f"{at}{key}")
    return found
