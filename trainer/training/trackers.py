"""Experiment trackers (``log_with``): what the journal records, sent on through Accelerate.

A record is sent on once it is in the journal, by the main process alone, at the journal's step.
That step never goes back for a tracker: a run that was killed repeats steps when it is resumed, and
what the journal had of them before, void or not, was sent then and is not sent again. A tracker may
lack the one record that was in the journal, but not yet sent, when the kill came.

A tracker that fails is left out from then on, with one warning; training goes on without it.

Example::

    with tracking(config, records, warn=print) as told:     # records: those of an earlier process
        told(journal.append("trained", step=10, loss=0.5))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from trainer.config.load import to_dict
from trainer.config.schema import Config
from trainer.journal import Record

DIRECTORY = "trackers"
"""Where trackers that write files write them, in the run directory."""

Told = Callable[[Record], None]
"""Gets each record that was written."""


@contextmanager
def tracking(
    config: Config, records: Sequence[Record], *, warn: Callable[[str], None]
) -> Iterator[Told]:
    """Yield what sends new records to the configured trackers; ``records`` are all earlier ones.

    ``warn`` gets one line for each tracker that fails.
    """
    trackers = _Trackers(config, warn)
    for record in records:
        trackers.pass_over(record)
    try:
        yield trackers.send if config.log_with else _ignore
    finally:
        trackers.finish()


class _Trackers:
    """The trackers of a run; they are started by the first record that is sent."""

    def __init__(self, config: Config, warn: Callable[[str], None]) -> None:
        self._config = config
        self._warn = warn
        self._started: dict[str, Any] | None = None
        self._first: Record | None = None
        self._active: Sequence[str] = ()
        self._step = 0
        self._sent: dict[str, int] = {}

    def pass_over(self, record: Record) -> int | None:
        """Take note of a record; return its step if nothing of its kind was sent at it yet."""
        if self._first is None:
            self._first = record
        if record["event"] == "stage_started":
            self._active = record["active"]
        # Some records have no step of their own: they are about the last one.
        step = record.get("step", self._step)
        kind = f"{record['event']} {record.get('what', '')}"
        is_new = step >= self._step and step > self._sent.get(kind, -1)
        self._step = max(self._step, step)
        if is_new:
            self._sent[kind] = step
        return step if is_new else None

    def send(self, record: Record) -> None:
        """Send a record's values to all trackers."""
        step = self.pass_over(record)
        if self._started is None:
            self._start(begins=record is self._first)
        names = () if self._first is None else self._first["sub_datasets"]
        values = values_of(record, active=self._active, sub_datasets=names)
        if step is not None and values:
            self._each(lambda tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        """Let all trackers end."""
        self._each(lambda tracker: tracker.finish())
        self._started = {}

    def _start(self, *, begins: bool) -> None:
        self._started = {}
        settings = _flat(to_dict(self._config))
        for name in self._config.log_with:
            with self._guarded(name):
                tracker = self._make(name)
                tracker.start()
                self._started[name] = tracker
                if begins:
                    tracker.store_init_configuration(settings)

    def _make(self, name: str) -> Any:
        """Return a tracker that goes on with what an earlier process of this run began."""
        kind = LOGGER_TYPE_TO_CLASS[name]
        directory = Path(self._config.output_dir)
        label = f"{directory.name}-{_digest(self._first or {})}"
        continued: dict[str, dict[str, Any]] = {
            "wandb": {"id": label, "name": directory.name, "resume": "allow", "dir": directory},
            "trackio": {"name": label, "resume": "allow"},
        }
        arguments = continued.get(name, {})
        if kind.requires_logging_directory:
            arguments = {**arguments, "logging_dir": str(directory / DIRECTORY)}
        return kind(self._config.log_project, **arguments)

    def _each(self, act: Callable[[Any], None]) -> None:
        for name, tracker in list((self._started or {}).items()):
            with self._guarded(name):
                act(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Leave a tracker out that fails."""
        try:
            yield
        except Exception as error:  # each tracker raises what it likes
            tracker = (self._started or {}).pop(name, None)
            self._warn(
                f"warning: the tracker {name!r} failed and is left out from here on; training goes "
                f"on ({type(error).__name__}: {error})"
            )
            with suppress(Exception):
                if tracker is not None:
                    tracker.finish()


def values_of(
    record: Record, *, active: Sequence[str], sub_datasets: Sequence[str] | Mapping[str, Any]
) -> dict[str, float]:
    """Return what trackers are told of a record: tag → number; nothing of most events.

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
        values = {f"validation/{name}": value for name, value in record["metrics"].items()}
        losses = record["losses"] or {}
        values |= {f"validation_loss/{name}": value for name, value in losses.items()}
    elif event == "committed":
        values = {"disk/bytes": record["disk_bytes"], "disk/peak_bytes": record["disk_peak_bytes"]}
        values["disk/checkpoint_bytes"] = record["stored_bytes"]
    elif event == "tested":
        part = "test" if record["what"] == "result" else f"test_of_{record['what']}"
        values = {f"{part}/{name}": value for name, value in record["metrics"].items()}
    return {tag: float(value) for tag, value in values.items() if value is not None}


def _flat(tree: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return a configuration by dotted keys, lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{at}{key}.")
        else:
            flat[f"{at}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _digest(first: Record) -> str:
    """Return what tells runs apart that have a name in common: when they began."""
    return hashlib.blake2b(str(first.get("time")).encode(), digest_size=4).hexdigest()


def _ignore(record: Record) -> None:
    """Do nothing."""
