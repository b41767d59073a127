"""Run a training method from beginning to end: start or resume, train, test, write the result.

Invariants: ``finished`` is the last record of a journal. If any part of a run finds no room on the
disk, the caller gets one :class:`PausedError` that names the file and how to continue; everything
that was written before is kept.

Example::

    summary = start(load_config("config.yaml"))
    summary = resume("runs/demo")                   # after a kill; a finished run stays as it is
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from msft_store import OutOfSpaceError, OverBudgetError
from trainer.algorithms import make_strategy
from trainer.algorithms.base import Stop
from trainer.algorithms.method import Method
from trainer.config.load import RECORDED, load_config
from trainer.config.schema import OVERALL, Config
from trainer.distributed import share, this_process, watch_failures
from trainer.errors import PausedError, RunError
from trainer.files import is_full
from trainer.journal import effective, read
from trainer.model.evaluate import EvaluationResult, Evaluator
from trainer.model.load import load_model
from trainer.model.lora import zero_adapter
from trainer.model.optim import reset_optimizer
from trainer.report.report import write_report
from trainer.report.summary import Summary, summarize
from trainer.signals import Interrupted, Interrupts
from trainer.text import too_long_text
from trainer.training import resume_point
from trainer.training.directory import CONFIG, JOURNAL, MODEL, new_directory
from trainer.training.loop import Loop
from trainer.training.progress import Heartbeat
from trainer.training.replay import Position, RunState, replay, where_to_resume
from trainer.training.rollback_points import begin_stage, keep_only_result, make_policy
from trainer.training.workspace import RESULT, Workspace, open_workspace, start_record

_log = logging.getLogger(__name__)


def start(config: Config, *, progress: bool = False) -> Summary:
    """Begin a run in ``config.output_dir`` and train it to its end; see :mod:`trainer.api`."""
    return _run(config, is_new=True, progress=progress)


def resume(directory: str | os.PathLike[str], *, progress: bool = False) -> Summary:
    """Continue the run in a directory to its end; a finished run only gets a new report."""
    directory = Path(directory).absolute()
    if not (directory / CONFIG).is_file() and (directory / JOURNAL).is_file():
        raise RunError(
            f"the run in {directory} has no {CONFIG}: if it was begun around a Trainer, by "
            "MsftRun, run that program again; otherwise restore the file"
        )
    if not (directory / CONFIG).is_file():
        raise RunError(f"there is no run in {directory}: it has no {CONFIG}")
    if is_finished(directory):
        _log.info("the run in %s is finished, there is nothing to resume", directory)
        return write_report(directory)
    config = replace(load_config(directory / CONFIG, defaults=RECORDED), output_dir=str(directory))
    return _run(config, is_new=False, progress=progress)


def is_finished(directory: Path) -> bool:
    """Return True if a run has a ``finished`` record."""
    if not (directory / JOURNAL).exists():
        return False
    return any(record["event"] == "finished" for record in effective(read(directory / JOURNAL)))


def _run(config: Config, *, is_new: bool, progress: bool) -> Summary:
    """Train a run from its current state to its end, and write its report."""
    directory = Path(config.output_dir)
    with ExitStack() as stack:
        stack.enter_context(watch_failures())
        if is_new:
            stack.enter_context(new_directory(config))
        stack.enter_context(_pause_if_full(directory))
        with open_workspace(config) as work, Interrupts() as interrupts, _record_end(work):
            mixture = work.metrics.mixture
            strategy = make_strategy(
                config, work.proportions, mode=mixture.mode, modes=mixture.other_modes
            )
            state, position = _restore_state(work, strategy)
            stop = state.stop
            if stop is None:
                stop = Loop(work, strategy, interrupts, state, progress=progress).run(position)
            _finish(work, stop, interrupts)
        if work.accelerator.is_main_process:
            write_report(directory)
        this_process().wait_for_everyone()
        return summarize(read(directory / JOURNAL))


@contextmanager
def _pause_if_full(directory: Path) -> Iterator[None]:
    """Raise :class:`PausedError` if the disk or ``max_disk`` has no room."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_room(error):
            raise
        advice = "make room on the disk"
        if isinstance(error, OverBudgetError):
            advice = f"raise max_disk in {directory / CONFIG}"
        raise PausedError(
            f"the run is paused, for there is no room: {error}. Nothing that was written before is "
            f"lost: {advice}, then continue with `msft-train resume {directory}`"
        ) from error


@contextmanager
def _record_end(work: Workspace) -> Iterator[None]:
    """Record in the journal that a signal or a full disk ended the process."""
    try:
        yield
    except Interrupted as interrupted:
        work.record("interrupted", step=_last_step(work), signal=interrupted.number)
        interrupted.directory = str(work.directory)
        raise
    except Exception as error:
        if _is_out_of_room(error):
            # The disk may have no room for this record either.
            with suppress(Exception):
                work.record("paused", step=_last_step(work), reason=str(error))
        raise


def _is_out_of_room(error: Exception) -> bool:
    """Return True if an error means that the disk or ``max_disk`` has no room."""
    return isinstance(error, OutOfSpaceError | OverBudgetError | PausedError) or is_full(error)


def _last_step(work: Workspace) -> int:
    if work.journal is None:
        return 0
    steps = [record["step"] for record in effective(read(work.journal.path)) if "step" in record]
    return steps[-1] if steps else 0


def _restore_state(work: Workspace, strategy: Method) -> tuple[RunState, Position | None]:
    """Restore model and timeline to where the run stands; return its state and position."""
    found = None if work.journal is None else _continue_journal(work, strategy)
    state, position = cast(tuple[RunState, Position | None], share(found))
    if position is not None:
        resume_point.load(work)
        if work.timeline is not None:
            work.timeline.rewind(position.evaluations)
    elif state.stop is None:
        policy = make_policy(strategy.needs(), strategy.mode, state.names)
        begin_stage(work, state.current, policy)
    return state, position


def _continue_journal(work: Workspace, strategy: Method) -> tuple[RunState, Position | None]:
    """Begin the journal, or replay it and record where it continues; in the main process."""
    records = effective(read(work.directory / JOURNAL))
    if not records:
        work.record("run_started", **start_record(work))
        for name, sub in work.mixture.items():
            for count, end in ((sub.too_long, "dropped"), (sub.cut, "cut")):
                if count:
                    length = work.config.data.max_length
                    _log.info("%s", too_long_text(name, count, length, end))
            own, metric = work.config.data.sub_datasets[name].metric, work.metrics.metrics[name]
            if own is None and metric.name != work.config.evaluation.metric:
                _log.info("sub-dataset %r has no references: its metric is %s", name, metric.name)
        return replay([], strategy), None
    base_id = records[0]["base_id"]
    if work.base is not None and work.base.id != base_id:
        raise RunError(
            f"the model in {work.loaded.directory} is not the one that the run began with (its id "
            f"was {base_id}, now it is {work.base.id}): restore it, or begin a new run"
        )
    point = resume_point.read(work)
    after, origin = where_to_resume(records, point)
    state = replay([record for record in records if record["seq"] <= after], strategy)
    work.record("resumed", after=after, **{"from": origin})
    place = origin.replace("_", " ")
    _log.info("resumed stage %d from its %s", state.current.stage.number, place)
    return state, point.position if point and origin == "resume_point" else None


def _finish(work: Workspace, stop: Stop, interrupts: Interrupts) -> None:
    """Test the result and the base once, write the result, and close the run."""
    keep_only_result(work, stop.checkpoint)
    # Free the optimizer's memory for the second copy of the weights, when the base is loaded.
    reset_optimizer(work.optimizer)
    beat = Heartbeat(is_silent=not work.accelerator.is_main_process)

    def check() -> None:
        beat.tick("testing the result and the base")
        if work.accelerator.num_processes == 1:
            interrupts.check()

    evaluator = Evaluator(
        work.config.evaluation, work.loaded, work.accelerator, work.metrics, check=check
    )
    examples = work.split("test")
    tested = evaluator(work.model, examples) if examples else None
    model_dir = work.directory / MODEL
    if work.store is not None:
        shutil.rmtree(model_dir, ignore_errors=True)  # of a process that was killed after this
        work.store.export(RESULT, model_dir)
    _load_base(work)
    if tested is not None:
        base = evaluator(work.model, examples)
        sizes = {name: len(rows) for name, rows in examples.items()}
        # A change against the base is known once the base is tested, too.
        overall = work.metrics.mixture.compute_overall(tested.metrics, sizes, base.metrics)
        tested = replace(tested, metrics={**tested.metrics, OVERALL: overall})
        _record_test(work, tested, "result", stop.checkpoint)
        _record_test(work, base, "base", work.base.id if work.base else None)
    if work.timeline is not None:
        _log.info("the result is in %s", model_dir)
        work.timeline.close()
    if work.journal is not None:
        resume_point.delete(work)
        # This record comes last, because a run that has it is never opened again.
        work.record(
            "finished",
            checkpoint=stop.checkpoint,
            model_dir=str(model_dir),
            seconds=time.time() - read(work.directory / JOURNAL)[0]["time"],
        )


def _record_test(
    work: Workspace, result: EvaluationResult, what: str, checkpoint: str | None
) -> None:
    work.record(
        "tested",
        checkpoint=checkpoint,
        what=what,
        split="test",
        metrics=result.metrics,
        losses=result.losses,
        **result.cost_fields(),
    )


def _load_base(work: Workspace) -> None:
    """Restore the base's weights in every process, from the base's own directory."""
    if work.loaded.adapter is not None:
        zero_adapter(work.loaded.model)
        return
    fresh = load_model(work.config.model).model.state_dict()
    if work.shards is not None:
        work.shards.copy_from_main(fresh)
        return
    with torch.no_grad():
        for name, tensor in work.accelerator.unwrap_model(work.model).state_dict().items():
            tensor.copy_(fresh[name])
