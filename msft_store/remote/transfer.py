"""Count the files and bytes of a transfer, and report its progress.

Example::

    print(push(store, url))          # "2 checkpoints in 1 pack, 12.3 kB; 1 ref"
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from msft_store._util import format_bytes, format_count
from msft_store.objects.refs import Ref
from msft_store.remote.refs import RefMove
from msft_store.remote.transport.base import PartReader

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a step (``"send"``), its bytes so far and its total bytes, 0 if unknown."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The result of a push, pull or clone; ``str()`` gives a summary for people.

    Attributes:
        checkpoints: Ids of the checkpoints that are new in the target, oldest first.
        packs: The number of packs that were transferred.
        bases: The number of records of bases that were transferred.
        refs: The refs that were created or moved.
        bytes: Bytes of all transferred files, except for the files of base models.
        base_bytes: Bytes of the transferred files of base models.
        unverified: The number of chunks that could not be compared with their keys, because a base
            is missing on this machine.
        timelines_left: The number of timelines whose refs were not transferred.
        bases_left: Paths of the bases that pushed checkpoints need and whose files are not in the
            target. They must stay as they are.
    """

    checkpoints: tuple[str, ...] = ()
    packs: int = 0
    bases: int = 0
    refs: tuple[RefMove, ...] = ()
    bytes: int = 0
    base_bytes: int = 0
    unverified: int = 0
    timelines_left: int = 0
    bases_left: tuple[str, ...] = ()

    def __str__(self) -> str:
        timelines = format_count(self.timelines_left, "timeline")
        left = f"{timelines} not moved: use --timelines to continue the run elsewhere"
        if not (self.bytes or self.base_bytes or self.refs):
            return f"nothing to do\n{left}" if self.timelines_left else "nothing to do"
        checkpoints = format_count(len(self.checkpoints), "checkpoint")
        packs = format_count(self.packs, "pack")
        parts = [f"{checkpoints} in {packs}, {format_bytes(self.bytes)}"]
        if self.base_bytes:
            parts.append(f"{format_bytes(self.base_bytes)} of bases")
        parts += [
            f"{move.name} -> {move.after[:12]}"
            + (f" (was {move.before[:12]})" if move.before else "")
            for move in self.refs
        ]
        if self.unverified:
            chunks = format_count(self.unverified, "chunk")
            parts.append(
                f"{chunks} not verified, because a base is missing here: relocate it, then run "
                "msft-store check --read-data"
            )
        parts += [
            f"the base {path} was not sent: keep it as it is, or push --with-base"
            for path in self.bases_left
        ]
        if self.timelines_left:
            parts.append(left)
        return "\n".join(parts)


class TransferCounter:
    """Counts what a transfer has moved so far. Methods may be called from several threads."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.done = Transfer()
        self._progress = progress
        self._step, self._so_far, self._total = "", 0, 0
        self._mutex = threading.Lock()

    def add(self, **counts: Any) -> None:
        """Add numbers, or tuples of ids and refs, to the fields of these names."""
        with self._mutex:
            more = {name: getattr(self.done, name) + count for name, count in counts.items()}
            self.done = replace(self.done, **more)

    def set_left(self, **left: Any) -> None:
        """State what is not transferred, in the fields of these names."""
        with self._mutex:
            self.done = replace(self.done, **left)

    def add_ref(self, before: Ref | None, after: Ref, size: int, place: str) -> None:
        """Count a ref that was written to a place, as a file of ``size`` bytes."""
        old = None if before is None else before.checkpoint
        move = RefMove(name=after.name, before=old, after=after.checkpoint)
        self.add(bytes=size, refs=(move,))
        _log.info("moved ref %s at %s to %s", after.name, place, after.checkpoint)

    def start_step(self, step: str, total: int) -> None:
        """Start the progress of a step of ``total`` bytes, 0 if unknown."""
        with self._mutex:
            self._step, self._so_far, self._total = step, 0, total
            self._report()

    def advance(self, size: int) -> None:
        """Count bytes of the current step; negative if they are transferred again."""
        with self._mutex:
            self._so_far += size
            self._report()

    def count_parts(self, parts: PartReader) -> PartReader:
        """Return a reader of the same parts that counts them, but only those of its last call."""
        counted = 0

        def read() -> Iterator[bytes]:
            nonlocal counted
            self.advance(-counted)
            counted = 0
            for part in parts():
                yield part
                counted += len(part)
                self.advance(len(part))

        return read

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._step, self._so_far, self._total)
