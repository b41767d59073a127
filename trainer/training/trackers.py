"""Send journal records to experiment trackers (``log_with``) through Accelerate.

The main process sends a record after it was written to the journal, at the journal's step. The step
never goes back for a tracker: a resumed run repeats steps, but it does not send again what was sent
before the kill. A tracker may lack one record, if the kill came between the write and the send.

A tracker that fails is dropped with one warning, and training continues without it.

Example::

    with Trackers(config, records) as trackers:     # records: those of earlier processes
        trackers.send(journal.append("trained", step=10, loss=0.5))
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from trainer.algorithms.base import measured
from trainer.config.load import flatten, to_dict
from trainer.config.schema import Config
from trainer.journal import Record

DIRECTORY = "trackers"
"""The folder in the run directory for trackers that write files."""

_log = logging.getLogger(__name__)


class Trackers:
    """The trackers of a run; the first record that is sent starts them."""

    def __init__(self, config: Config, records: Iterable[Record]) -> None:
        """Create them; ``records`` were sent before."""
        self._config = config
        self._trackers: dict[str, Any] = {}
        self._is_started = False
        self._first: Record | None = None
        self._active: Sequence[str] = ()
        self._step = 0
        self._sent: dict[str, int] = {}
        for record in records:
            self._mark_sent(record)

    def __enter__(self) -> Trackers:
        return self

    def _mark_sent(self, record: Record) -> int | None:
        """Mark a record as sent; return its step, or ``None`` if one of its kind was sent there."""
        if self._first is None:
            self._first = record
        if record["event"] == "stage_started":
            self._active = record["active"]
        # Some records have no step of their own: they belong to the last one.
        step = record.get("step", self._step)
        kind = f"{record['event']} {record.get('what', '')}"
        is_new = step >= self._step and step > self._sent.get(kind, -1)
        self._step = max(self._step, step)
        if is_new:
            self._sent[kind] = step
        return step if is_new else None

    def send(self, record: Record) -> None:
        """Send a record's values to all trackers."""
        if not self._config.log_with:
            return
        step = self._mark_sent(record)
        if not self._is_started:
            self._start(is_new_run=record is self._first)
        names = () if self._first is None else self._first["sub_datasets"]
        values = select_values(record, active=self._active, sub_datasets=names)
        if step is not None and values:
            for name, tracker in list(self._trackers.items()):
                with self._drop_on_error(name):
                    tracker.log(values, step=step)

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._drop_on_error(name):
                tracker.finish()

    def _start(self, *, is_new_run: bool) -> None:
        self._is_started = True
        settings = {
            key: json.dumps(value) if isinstance(value, list) else value
            for key, value in flatten(to_dict(self._config)).items()
        }
        for name in self._config.log_with:
            with self._drop_on_error(name):
                tracker = self._make_tracker(name)
                tracker.start()
                self._trackers[name] = tracker
                if is_new_run:
                    tracker.store_init_configuration(settings)

    def _make_tracker(self, name: str) -> Any:
        """Return a tracker that continues what an earlier process of the run sent."""
        kind = LOGGER_TYPE_TO_CLASS[name]
        directory = Path(self._config.output_dir)
        # The time of its start tells a run from others of the same name.
        start = str((self._first or {}).get("time")).encode()
        label = f"{directory.name}-{hashlib.blake2b(start, digest_size=4).hexdigest()}"
        continued: dict[str, dict[str, Any]] = {
            "wandb": {"id": label, "name": directory.name, "resume": "allow", "dir": directory},
            "trackio": {"name": label, "resume": "allow"},
        }
        arguments = continued.get(name, {})
        if kind.requires_logging_directory:
            arguments = {**arguments, "logging_dir": str(directory / DIRECTORY)}
        return kind(self._config.log_project, **arguments)

    @contextmanager
    def _drop_on_error(self, name: str) -> Iterator[None]:
        """Drop a tracker that fails, with a warning."""
        try:
            yield
        except Exception as error:  # each tracker raises its own classes
            tracker = self._trackers.pop(name, None)
            _log.warning(
                "warning: the tracker %r failed and is dropped; training continues without it "
                "(%s: %s)",
                name,
                type(error).__name__,
                error,
            )
            with suppress(Exception):
                if tracker is not None:
                    tracker.finish()


def select_values(
    record: Record, *, active: Sequence[str], sub_datasets: Sequence[str] | Mapping[str, Any]
) -> dict[str, float]:
    """Return the numbers of a record for trackers, by tag; most events have none.

    ``active`` are the sub-datasets that are trained on, ``sub_datasets`` all of the mixture.
    """
    event = record["event"]
    values: dict[str, float | None] = {}
    if event == "trained":
        seconds = record["seconds"]
        values = {f"train/{key}": record[key] for key in ("loss", "lr", "grad_norm", "epoch")}
        values["train/tokens_per_second"] = record["tokens"] / seconds if seconds else None
        values["train/stage"] = record["stage"]
        values["train/active_sub_datasets"] = len(active)
    elif event == "stage_started":
        values = {f"active/{name}": int(name in active) for name in sub_datasets}
    elif event == "evaluated" and not record["reused"]:
        carried = record.get("carried") or ()
        metrics = measured(record["metrics"], carried)
        values = {f"validation/{name}": value for name, value in metrics.items()}
        losses = measured(record["losses"] or {}, carried)
        values |= {f"validation_loss/{name}": value for name, value in losses.items()}
    elif event == "committed":
        values = {"disk/bytes": record["disk_bytes"], "disk/peak_bytes": record["disk_peak_bytes"]}
        values["disk/checkpoint_bytes"] = record["stored_bytes"]
    elif event == "tested":
        part = "test" if record["what"] == "result" else f"test_of_{record['what']}"
        values = {f"{part}/{name}": value for name, value in record["metrics"].items()}
    return {tag: float(value) for tag, value in values.items() if value is not None}
