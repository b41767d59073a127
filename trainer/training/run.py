"""A run from beginning to end: start or continue it, train, test, write the result.

Example::

    summary = start(load_config("config.yaml"))
    summary = resume("runs/demo")                   # after a kill, or to see that it is finished

A run that finds no room on the disk pauses: nothing is lost, and it can be resumed.

Invariant: whichever part of a run finds no room, the user gets one :class:`PausedError` that says
what was to be written, what stays in the store, and how to go on.

Example::

    with pausing(directory):
        ...                             # work that writes
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from msft_store import OutOfSpaceError, OverBudgetError, StoreError
from trainer.algorithms import make_strategy
from trainer.algorithms.base import Stop, Strategy
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.distributed import FailureWatch, this_process
from trainer.errors import ConfigError, DataError, PausedError, RunError
from trainer.files import is_full
from trainer.journal import effective, read
from trainer.model.evaluate import Evaluator
from trainer.model.export import save_model
from trainer.model.load import load_model
from trainer.model.lora import silence
from trainer.model.optim import reset
from trainer.report.report import write_report
from trainer.report.summary import Summary, summarize
from trainer.signals import Interrupted, Interrupts
from trainer.text import too_long_text
from trainer.training import resume_point
from trainer.training.commits import retention
from trainer.training.directory import (
    CONFIG,
    JOURNAL,
    MODEL,
    create_directory,
    withdraw_directory,
)
from trainer.training.loop import Loop, Say
from trainer.training.replay import (
    Position,
    Standing,
    replay,
    where_to_resume,
)
from trainer.training.workspace import (
    Workspace,
    open_workspace,
    start_record,
)


def finds_no_room(error: BaseException) -> bool:
    """Return whether an error says that there is no room, on the disk or within ``max_disk``."""
    if isinstance(error, (OutOfSpaceError, OverBudgetError, PausedError)):
        return True
    return isinstance(error, Exception) and is_full(error)


@contextmanager
def pausing(directory: Path) -> Iterator[None]:
    """Raise :class:`PausedError` for whatever finds no room; other errors go on as they are."""
    try:
        yield
    except Exception as error:
        if not finds_no_room(error):
            raise
        advice = "make room on the disk"
        if isinstance(error, OverBudgetError):
            advice = f"raise max_disk in {directory / 'config.yaml'}"
        raise PausedError(
            f"the run is paused, for there is no room: {error}. Nothing that was written before is "
            f"lost: {advice}, then continue with `msft-train resume {directory}`"
        ) from error


def _silent(line: str) -> None:
    """Say nothing."""


def start(config: Config, *, say: Say = _silent, progress: bool = False) -> Summary:
    """Begin a run in ``config.output_dir`` and return what it came to.

    Raises :class:`RunError` if a run is there already, :class:`Interrupted` on a signal,
    :class:`PausedError` where there is no room to go on.
    """
    with FailureWatch():
        try:
            create_directory(config)
            return _begin(config, say=say, progress=progress)
        except PausedError as error:
            withdraw_directory(config)
            if (Path(config.output_dir) / CONFIG).exists():
                raise
            raise RunError(f"the run did not begin: {error.__cause__ or error}") from error


def _begin(config: Config, *, say: Say, progress: bool) -> Summary:
    try:
        return _run(config, say=say, progress=progress)
    except (ConfigError, DataError, StoreError):
        withdraw_directory(config)
        raise


def resume(
    directory: str | os.PathLike[str],
    *,
    say: Say = _silent,
    progress: bool = False,
) -> Summary:
    """Continue the run in ``directory`` and return what it came to; a finished one stays."""
    directory = Path(directory).absolute()
    if not (directory / CONFIG).is_file():
        raise RunError(f"there is no run in {directory}: it has no {CONFIG}")
    if is_finished(directory):
        say(f"the run in {directory} is finished, there is nothing to resume")
        return write_report(directory)
    config = replace(load_config(directory / CONFIG), output_dir=str(directory))
    with FailureWatch():
        return _run(config, say=say, progress=progress)


def is_finished(directory: Path) -> bool:
    """Return whether a run has ended by itself."""
    if not (directory / JOURNAL).exists():
        return False
    return any(record["event"] == "finished" for record in effective(read(directory / JOURNAL)))


def _run(config: Config, *, say: Say, progress: bool) -> Summary:
    with pausing(Path(config.output_dir)):
        return _go(config, say=say, progress=progress)


def _go(config: Config, *, say: Say, progress: bool) -> Summary:
    with open_workspace(config, warn=say) as work, Interrupts() as interrupts:
        if not work.accelerator.is_main_process:
            say = _silent
        try:
            strategy = make_strategy(config, work.proportions)
            standing, position = _stand(work, strategy, say)
            stop = standing.stop
            if stop is None:
                loop = Loop(work, strategy, interrupts, say=say, progress=progress)
                stop = loop.run(standing, position)
            _finish(work, stop, interrupts, say)
        except Interrupted as interrupted:
            work.record("interrupted", step=_last_step(work), signal=interrupted.number)
            interrupted.directory = str(work.directory)
            raise
        except Exception as error:
            if finds_no_room(error):
                # There may be none for this record either.
                with suppress(Exception):
                    work.record("paused", step=_last_step(work), reason=str(error))
            raise
        main = work.accelerator.is_main_process
    if main:
        write_report(config.output_dir)
    this_process().wait_for_everyone()
    return summarize(read(work.directory / JOURNAL))


def _stand(work: Workspace, strategy: Strategy, say: Say) -> tuple[Standing, Position | None]:
    """Return where the run stands, with the model's weights and the timeline in that state."""
    shared: list[Any] = [None, None]
    if work.journal is not None:
        shared = [*_continue_journal(work, strategy, say)]
    if work.accelerator.num_processes > 1:
        broadcast_object_list(shared)
    standing: Standing = shared[0]
    position: Position | None = shared[1]
    if position is not None:
        resume_point.load(work)
        if work.timeline is not None:
            work.timeline.rewind(position.evaluations)
    elif standing.stop is None:
        policy = retention(strategy.needs(), strategy.mode, standing.names)
        work.begin_stage(standing.stage.number, standing.root, policy)
    return standing, position


def _continue_journal(
    work: Workspace, strategy: Strategy, say: Say
) -> tuple[Standing, Position | None]:
    """Begin the journal, or write where it is continued from; the main process does."""
    records = effective(read(work.directory / JOURNAL))
    if not records:
        work.record("run_started", **start_record(work))
        for name, sub in work.mixture.items():
            if sub.too_long:
                say(too_long_text(name, sub.too_long, work.config.data.max_length))
        return replay([], strategy), None
    started = records[0]["base_id"]
    if work.base is not None and work.base.id != started:
        raise RunError(
            f"the model in {work.loaded.directory} is not the one that the run began with (its id "
            f"was {started}, now it is {work.base.id}): restore it, or begin a new run"
        )
    point = resume_point.read(work)
    after, origin = where_to_resume(records, point)
    standing = replay([record for record in records if record["seq"] <= after], strategy)
    work.record("resumed", after=after, **{"from": origin})
    say(f"resumed stage {standing.stage.number} from its {origin.replace('_', ' ')}")
    return standing, point.position if point and origin == "resume_point" else None


def _finish(work: Workspace, stop: Stop, interrupts: Interrupts, say: Say) -> None:
    """Test the result and the base once, write the result, and close the run."""
    work.end_at(stop.checkpoint)
    # Its memory is wanted for a second copy of the weights, when the base is loaded.
    reset(work.optimizer)
    check = interrupts.check if work.accelerator.num_processes == 1 else None
    evaluator = Evaluator(work.config.evaluation, work.loaded, work.accelerator, check=check)
    _test(work, evaluator, "result", stop.checkpoint)
    if work.store is not None:
        export = None if work.shards is None else partial(work.store.export, stop.checkpoint)
        save_model(work.loaded, work.snapshots, work.directory / MODEL, export)
    _load_base(work)
    _test(work, evaluator, "base", work.base.id if work.base else None)
    say(f"the result is in {work.directory / MODEL}")
    if work.timeline is not None:
        work.timeline.close()
    if work.journal is not None:
        resume_point.remove(work)
        # Last, for nobody looks at a finished run again.
        started = read(work.directory / JOURNAL)[0]["time"]
        work.record(
            "finished",
            checkpoint=stop.checkpoint,
            model_dir=str(work.directory / MODEL),
            seconds=time.time() - started,
        )


def _test(work: Workspace, evaluator: Evaluator, what: str, checkpoint: str | None) -> None:
    examples = work.split("test")
    if not examples:
        return
    result = evaluator(work.model, examples)
    work.record(
        "tested",
        checkpoint=checkpoint,
        what=what,
        split="test",
        metrics=result.metrics,
        losses=result.losses,
        **result.costs(),
    )


def _load_base(work: Workspace) -> None:
    """Let the model be its base again, in every process; the weights come from its directory."""
    if work.loaded.adapter is not None:
        silence(work.loaded.model)
        return
    fresh = load_model(work.config.model).model.state_dict()
    if work.shards is not None:
        work.shards.copy(fresh)
        return
    with torch.no_grad():
        for name, tensor in work.accelerator.unwrap_model(work.model).state_dict().items():
            tensor.copy_(fresh[name])


def _last_step(work: Workspace) -> int:
    if work.journal is None:
        return 0
    steps = [record["step"] for record in effective(read(work.journal.path)) if "step" in record]
    return steps[-1] if steps else 0
