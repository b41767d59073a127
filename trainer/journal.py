"""The journal of a run: one JSON object per line, in an append-only file.

Resume, report and tables are derived from it. Each record has ``seq`` (0, 1, 2, …), ``time``
(seconds since 1970) and ``event``. Many also have ``step`` (optimizer steps since the run began,
never goes back), ``stage`` (from 1) and ``epoch`` (in the stage). ``append`` returns once the line
is on disk. A crash during a write can tear the last line only; readers ignore it and the next
writer removes it. JSON has no NaN: a number that is not finite is written as ``null``, and ``read``
returns NaN for it.

================== ==============================================================================
event              fields
================== ==============================================================================
``run_started``    version, method, config, model {path, parameters, trainable, layers, hidden,
                   dtype}, mode (of the overall metric), modes {name: mode} of the others that
                   differ, metric (the overall one), metrics {name: metric}, overall (how that
                   is computed),
                   sub_datasets {name: {train, validation, test, too_long (dropped), cut,
                   set_aside}},
                   steps_per_epoch (of the whole mixture), full_checkpoint_bytes, base_bytes,
                   base_id
``stage_started``  stage, root (checkpoint id), active [names], shares {name: share of the examples
                   in an epoch}, limits {name: epochs}, floor (share of the examples behind a
                   limit), epochs, steps (planned), examples (of an epoch)
``trained``        step, stage, epoch, loss (mean token loss), lr, grad_norm or null, tokens,
                   attention_tokens, target_tokens, padded_tokens, forward_tokens,
                   forward_attention_tokens, forward_padded_tokens (mastered examples, which are
                   not trained on), seconds: all since the last such record. One is also written
                   before each evaluation, so that no record extends across an evaluation, a
                   roll-back or the end of a stage.
``losses``         step, stage, places {name: [places]}, values {name: [mean token losses]} of the
                   training examples since the last such record, in a stage that observes them
``looked_ahead``   step, stage, values {name: [reward]}, and tokens, attention_tokens,
                   padded_tokens, seconds of the probes
``adjusted``       step, stage, stage_step, epoch, weights {name: probability}, mastered
                   {name: [places]}, reason; applies from the next step on
``evaluated``      step, stage, epoch, index, split, checkpoint, metrics {name…, overall}, errors
                   {name: standard error}, losses {name…} or null, last, reused (known from an
                   earlier evaluation), carried [names] (not measured: the values are those of the
                   evaluation before, overall is computed from both), tokens, attention_tokens,
                   padded_tokens, generated_tokens, generated_attention_tokens, seconds
``averaged``       step, stage, index and epoch of the evaluation before it, name (in decisions),
                   checkpoint, weights {id: weight} of the average, and what ``evaluated`` says of
                   the results
``committed``      step, stage, checkpoint, logical_bytes, stored_bytes, disk_peak_bytes (before
                   eviction), disk_bytes (after it), kept {id: [reasons]}, dropped [ids], seconds
                   (that training waited for the commit); written once the checkpoint is durable
``diverged``       stage, epoch, step, what (``training loss``, …), value (``nan``, ``inf``,
                   ``-inf``); a ``decided`` follows, with the index of the evaluation before it
``decided``        step, stage, index, decision (``continue``, ``average``, ``roll_back``, ``skip``,
                   ``stop``), checkpoint (null with ``continue``; a name with ``average``), exclude
                   [names], reason; written before the loop acts on it, except that training
                   continues during a commit. If the active set changes within a stage: active
                   [names], shares {name: share}; if sub-datasets come back: include [names]; with
                   ``average``: weights {id: weight}
``rolled_back``    checkpoint, disk_peak_bytes, disk_bytes; also at the end of a run, when
                   the result becomes the last root
``resume_point``   step, stage, bytes
``resumed``        after (seq of the last earlier record that still counts), from
                   (``resume_point``, ``stage_root``, ``end``)
``tested``         checkpoint, what (``base``, ``result``), split, metrics {name…, overall},
                   losses {name…}, and the token counts of ``evaluated``, seconds
``finished``       checkpoint (the result), model_dir, seconds
``interrupted``    step, signal
``paused``         step, reason: no room on the disk or within ``max_disk``; missing if there was no
                   room for this record either
================== ==============================================================================

:mod:`trainer.report.flops` uses the token counts. ``tokens`` are real tokens in forward passes,
including the prompts of generations; ``attention_tokens`` is the sum of length² over the sequences
in these passes. ``generated_tokens`` counts tokens that were generated one at a time, and
``generated_attention_tokens`` is the sum of their context lengths; ``padded_tokens`` is padding.

The order at an evaluation is ``trained``, ``committed``, ``evaluated``, ``decided``. If a commit
runs in the background, the records after it wait in the :class:`JournalQueue`. Records that wait
when a process dies are lost together with their steps, which a resume repeats.

Example::

    with Journal(run / "journal.jsonl") as journal:
        journal.append("stage_started", stage=1, root=root, active=["arith"], epochs=3.0)
    records = effective(read(run / "journal.jsonl"))
    journal_queue = JournalQueue(journal)
    journal_queue.add_later(future, lambda: [("committed", {"checkpoint": future.result().id})])
    journal_queue.add("trained", step=1)           # waits behind it
    journal_queue.flush()                          # waits for the commit, writes both
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from trainer.errors import PausedError, RunError
from trainer.files import is_full, sync

Record = dict[str, Any]

_NUMBERS = ("metrics", "losses", "errors")


class Journal:
    """A journal that is open for appending."""

    def __init__(self, path: Path) -> None:
        """Open a journal; create it if it does not exist.

        A torn last line is removed first. Raises :class:`RunError` if any other line is damaged.
        """
        records, self._sound_bytes = _parse(path, path.read_bytes()) if path.exists() else ([], 0)
        self.path = path
        self.next_seq = len(records)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self._sound_bytes)
        os.fsync(self._file.fileno())
        sync(path.parent)

    def append(self, event: str, **fields: Any) -> Record:
        """Write one record and return it once it is on disk.

        Raises :class:`PausedError` if the disk is full, and :class:`RunError` for any other error.
        The journal then ends with the record before.
        """
        record: Record = {"seq": self.next_seq, "time": time.time(), "event": event, **fields}
        text = json.dumps(replace_non_finite(record), ensure_ascii=False, allow_nan=False)
        line = f"{text}\n".encode()
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes written")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._sound_bytes)
            kind = PausedError if is_full(error) else RunError
            raise kind(
                f"cannot write the {event!r} record, {len(line):,} bytes, to {self.path}: {error}"
            ) from error
        self._sound_bytes += len(line)
        self.next_seq += 1
        return record

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> list[Record]:
    """Return all records, void ones too, without a torn last line.

    Raises :class:`RunError` if there is no journal or a line before the last one is damaged.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"no journal at {path}: give the output_dir of a run") from None
    records, _ = _parse(path, content)
    return records


def effective(records: Iterable[Record]) -> list[Record]:
    """Return the records that count: ``resumed`` voids those between its ``after`` and itself.

    An argument named ``counted`` takes such records.
    """
    counted: list[Record] = []
    for record in records:
        if record["event"] == "resumed":
            counted = [earlier for earlier in counted if earlier["seq"] <= record["after"]]
        counted.append(record)
    return counted


def select(records: Iterable[Record], *events: str) -> list[Record]:
    """Return the records of some events, in order."""
    return [record for record in records if record["event"] in events]


def run_started(records: Iterable[Record]) -> Record:
    """Return the first record of a run; raises :class:`RunError` if the journal lacks it."""
    for record in records:
        if record["event"] == "run_started":
            return record
    raise RunError("the journal has no run_started record: the run ended before it began")


def mode_of(start: Record, name: str) -> Any:
    """Return the direction of a sub-dataset's metric, or of the overall one, ``max`` or ``min``.

    ``start`` is the run's ``run_started`` record.
    """
    return (start.get("modes") or {}).get(name, start["mode"])


def metric_of(start: Record, name: str) -> str:
    """Return the name of a sub-dataset's metric, or of the overall one.

    ``start`` is the run's ``run_started`` record.
    """
    return str((start.get("metrics") or {}).get(name, start["metric"]))


def replace_non_finite(value: Any) -> Any:
    """Return JSON values with ``None`` for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_non_finite(item) for item in value]
    return value


def _parse(path: Path, content: bytes) -> tuple[list[Record], int]:
    """Return the records and the length in bytes of the lines that they stand in."""
    lines = content.split(b"\n")
    tail = lines.pop()
    records: list[Record] = []
    sound_bytes = 0
    for number, line in enumerate(lines, start=1):
        record = _parse_line(line)
        if record is None and number == len(lines) and not tail:
            break
        if record is None or record["seq"] != len(records):
            found = "is not a record" if record is None else f"has seq {record['seq']}"
            raise RunError(
                f"{path}, line {number} {found}, record {len(records)} was expected: the journal "
                "was damaged or edited; restore it, or begin the run again in another output_dir"
            )
        records.append(record)
        sound_bytes += len(line) + 1
    return records, sound_bytes


def _parse_line(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("seq")) is not int:
        return None
    if not isinstance(record.get("event"), str):
        return None
    for key in _NUMBERS:
        if isinstance(values := record.get(key), dict):
            record[key] = {name: _number(value) for name, value in values.items()}
    if record["event"] in ("losses", "looked_ahead"):
        rows = record["values"].items()
        record["values"] = {name: [_number(value) for value in row] for name, row in rows}
    if record["event"] == "trained":
        record["loss"] = _number(record.get("loss"))
    return record


def _number(value: Any) -> Any:
    return math.nan if value is None else value


Line = tuple[str, dict[str, Any]]
"""Event and fields of a record."""

_Entry = tuple[Future[Any] | None, Callable[[], Iterable[Line]]]


class JournalQueue:
    """A queue that writes records in order, each after the commit that it describes."""

    def __init__(
        self, journal: Journal | None, on_record: Callable[[Record], None] = lambda record: None
    ) -> None:
        """Create a queue; ``on_record`` is called with each record that was written."""
        self._journal = journal
        self._on_record = on_record
        self._pending: deque[_Entry] = deque()

    def add(self, event: str, **fields: Any) -> None:
        """Queue a record and write it once the records before it are written."""
        self.add_later(None, lambda: [(event, fields)])

    def add_later(self, future: Future[Any] | None, lines: Callable[[], Iterable[Line]]) -> None:
        """Queue the records that ``lines`` returns; they are written after ``future`` is done.

        ``lines`` is called once, after the records before it are written, and may wait for
        ``future``.
        """
        self._pending.append((future, lines))
        self.write_ready()

    def write_ready(self) -> None:
        """Write all records that do not wait for a commit."""
        while self._pending:
            future, _ = self._pending[0]
            if future is not None and not future.done():
                return
            self._write_next()

    def flush(self) -> None:
        """Wait for the pending commits and write all records.

        If a commit failed, its error is raised and no later record is written.
        """
        while self._pending:
            self._write_next()

    def _write_next(self) -> None:
        _, lines = self._pending.popleft()
        try:
            for event, fields in lines():
                if self._journal is not None:
                    self._on_record(self._journal.append(event, **fields))
        except BaseException:
            self._pending.clear()
            raise
