"""Complete the missing runs of the experiment, each in a directory of its own.

A run that has a record is never trained again. One that was killed is continued, and one that is
finished without a record is condensed. A run with the same settings, data and seed as a recorded
one of another variant takes over its record, because it would be the same run.

Example::

    experiment = Experiment(directory=Path("runs/experiment"), records=RECORDS)
    experiment.complete(list_cases(PHASES["choose"]), jobs=1)
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.experiment.make_data import write
from bench.experiment.mixtures import EVAL_EVERY
from bench.experiment.records import Case, Key, append, condense, hash_config, key_of, load
from bench.experiment.variants import Phase, find_variant, matching_budget
from trainer.comparison.subprocesses import run_subprocesses
from trainer.config.load import dump, load_config
from trainer.config.schema import Config
from trainer.signals import Interrupted
from trainer.training.directory import CONFIG
from trainer.training.run import is_finished

RECIPE = Path(__file__).parent / "experiment.yaml"
_FINISHED = (0, 3)
"""Exit codes of ``msft-train``: finished, and finished after a divergence."""
_log = logging.getLogger(__name__)

Records = Mapping[Key, Mapping[str, Any]]


def list_cases(phase: Phase) -> list[Case]:
    """Return the runs of a phase, seed by seed, so that all variants are compared early."""
    return [
        Case(mixture=mixture, variant=variant.name, seed=seed)
        for seed in phase.seeds
        for mixture in phase.mixtures
        for variant in phase.variants
    ]


@dataclass(kw_only=True)
class Experiment:
    """The runs of the experiment and their records.

    Attributes:
        directory: The directory of the runs and the data.
        records: The file with the records.
        overrides: Changes to the recipe for all variants.
        keep: Keep the directories of finished runs.
    """

    directory: Path
    records: Path
    overrides: Sequence[str] = ()
    keep: bool = False
    failures: dict[Case, str] = field(default_factory=dict)

    def complete(self, cases: Sequence[Case], *, jobs: int, minutes: float | None = None) -> bool:
        """Complete the missing runs; return true unless the time was over or a run failed.

        Args:
            cases: The runs, each after those that set its budget.
            jobs: Runs at the same time.
            minutes: Minutes after which the current runs are interrupted and no other begins.

        Raises:
            Interrupted: SIGINT or SIGTERM ended the runs. The same call continues them.
        """
        end = None if minutes is None else time.monotonic() + 60 * minutes
        while todo := self._plan(cases):
            if end is not None and end <= time.monotonic():
                return False
            try:
                with _interrupt_at(end):
                    self._run(todo, jobs=jobs)
            except Interrupted:
                if end is None or end > time.monotonic():
                    raise
                return False
        return not self.failures

    def configure(self, case: Case, recorded: Records) -> Config | None:
        """Return the configuration of a run, or ``None`` while a run that it matches is missing."""
        variant = find_variant(case.variant)
        data = (self.directory / "data" / case.mixture).absolute()
        if not data.exists():
            write(data, case.mixture)
        place, every = f"data.directory={data}", f"evaluation.eval_every={EVAL_EVERY[case.mixture]}"
        overrides = [place, every, *self.overrides, *variant.overrides]
        if variant.match is not None:
            own = self._find(replace(case, variant=variant.match.own), recorded)
            reference = self._find(replace(case, variant=variant.match.reference), recorded)
            if own is None or reference is None:
                return None
            budget = matching_budget(own, reference, variant.match.kind)
            overrides.append(f"msft.compute_budget={budget}")
        config = load_config(RECIPE, [*overrides, f"seed={case.seed}"])
        name = f"seed-{case.seed}-{hash_config(config)}"
        directory = self.directory.absolute() / case.mixture / case.variant / name
        return replace(config, output_dir=str(directory))

    def _find(self, case: Case, recorded: Records) -> Mapping[str, Any] | None:
        """Return the record of a run with its present settings, if there is one."""
        config = self.configure(case, recorded)
        if config is None:
            return None
        return recorded.get((case.mixture, case.variant, case.seed, hash_config(config)))

    def _plan(self, cases: Sequence[Case]) -> dict[Case, Config]:
        """Return the runs to be trained now; runs that need no training are recorded here."""
        recorded = {key_of(record): record for record in load(self.records)}
        todo: dict[tuple[str, int, str], tuple[Case, Config]] = {}
        for case in cases:
            config = None if case in self.failures else self.configure(case, recorded)
            if config is None:
                continue
            digest = hash_config(config)
            same = [
                record
                for (mixture, _, seed, other), record in recorded.items()
                if (mixture, seed, other) == (case.mixture, case.seed, digest)
            ]
            if any(record["variant"] == case.variant for record in same):
                continue
            if same or is_finished(Path(config.output_dir)):
                record = same[0] | asdict(case) if same else self._condense(case, config)
                append(self.records, record)
                recorded[key_of(record)] = record
            else:
                # Of variants with equal settings one is trained.
                todo.setdefault((case.mixture, case.seed, digest), (case, config))
        return dict(todo.values())

    def _condense(self, case: Case, config: Config) -> dict[str, Any]:
        record = condense(case, config, Path(config.output_dir))
        if not self.keep:
            shutil.rmtree(config.output_dir)
        return record

    def _run(self, todo: dict[Case, Config], *, jobs: int) -> None:
        cases = {f"{case.mixture}, {case.variant}, seed {case.seed}": case for case in todo}
        begun = {}

        def handle_start(name: str) -> None:
            begun[name] = time.monotonic()
            _log.info("%s begins, %d runs are waiting", name, len(cases) - len(begun))

        def handle_exit(name: str, code: int, line: str) -> bool:
            case = cases[name]
            if code in _FINISHED:
                record = self._condense(case, todo[case])
                append(self.records, record)
                took = time.monotonic() - begun[name]
                score = record["scores"]["overall"]["validation"]
                _log.info("%s is finished after %.0f s: validation %s", name, took, score)
                return True
            if code == 128 + signal.SIGTERM or code < 0:
                return False
            self.failures[case] = line or f"its process ended with code {code}"
            _log.warning("%s did not finish: %s", name, self.failures[case])
            return True

        with tempfile.TemporaryDirectory(prefix="experiment-") as folder:
            commands = {
                name: _command(todo[case], Path(folder, f"{number}.yaml"))
                for number, (name, case) in enumerate(cases.items())
            }
            run_subprocesses(commands, jobs=jobs, on_exit=handle_exit, on_start=handle_start)


def _command(config: Config, path: Path) -> list[str]:
    """Return the arguments with which ``msft-train`` runs or resumes a run."""
    directory = Path(config.output_dir)
    if (directory / CONFIG).exists():
        return ["resume", str(directory), "--quiet"]
    path.write_text(dump(config), encoding="utf-8")
    directory.parent.mkdir(parents=True, exist_ok=True)
    return ["run", str(path), "--quiet"]


@contextmanager
def _interrupt_at(end: float | None) -> Iterator[None]:
    """Send this process SIGTERM at a time of the monotonic clock, while the context lasts."""
    if end is None:
        yield
        return
    timer = threading.Timer(end - time.monotonic(), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
