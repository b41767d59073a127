"""What went from one store to another, counted as it goes.

Example::

    print(push(store, url))          # "2 checkpoints in 1 pack, 12.3 kB; 1 ref"
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from msft_store._util import format_bytes
from msft_store.remote.refs import RefMove

Part = bytes
Parts = Callable[[], Iterator[Part]]
"""Gives the bytes of a file from the beginning each time it is called."""
Progress = Callable[[str, int, int], None]
"""Is told a step (``"send"``), its bytes so far and all of them; 0 of all: that is not known."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What a push, pull or clone did."""

    checkpoints: tuple[str, ...]
    """Ids of those that are new in the target, oldest first."""
    packs: int
    bases: int
    """Records of bases."""
    refs: tuple[RefMove, ...]
    bytes: int
    """Of all files that went, a base's own aside."""
    base_bytes: int
    """Of the files of bases."""
    unverified: int
    """Chunks that could not be compared with their keys, because a base is not at hand."""
    timelines_left: int = 0
    """Timelines whose refs stayed, for nobody asked for them."""

    def __str__(self) -> str:
        left = (
            f"{_count(self.timelines_left, 'timeline')} not moved: --timelines takes them along, "
            "to go on with a run elsewhere"
        )
        if not (self.bytes or self.base_bytes or self.refs):
            return f"nothing to do\n{left}" if self.timelines_left else "nothing to do"
        parts = [
            f"{_count(len(self.checkpoints), 'checkpoint')} in {_count(self.packs, 'pack')}, "
            f"{format_bytes(self.bytes)}",
        ]
        if self.base_bytes:
            parts.append(f"{format_bytes(self.base_bytes)} of bases")
        parts += [
            f"{move.name} -> {move.after[:12]}"
            + (f" (was {move.before[:12]})" if move.before else "")
            for move in self.refs
        ]
        if self.unverified:
            parts.append(
                f"{_count(self.unverified, 'chunk')} not compared yet, for a base is not at hand: "
                "relocate it, then msft-store check --read-data"
            )
        if self.timelines_left:
            parts.append(left)
        return "\n".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass(kw_only=True)
class Tally:
    """Counts; calls may come from several threads."""

    checkpoints: list[str] = field(default_factory=list)
    packs: int = 0
    bases: int = 0
    refs: list[RefMove] = field(default_factory=list)
    bytes: int = 0
    base_bytes: int = 0
    unverified: int = 0
    timelines_left: int = 0
    progress: Progress | None = None
    """Hears of each step: what is done, how many bytes of it are, and of how many."""
    _step: str = ""
    _done: int = 0
    _total: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def went(self, size: int, *, pack: bool = False, base: bool = False) -> None:
        """Count a file of some bytes."""
        with self._counting:
            self.bytes += size
            self.packs += pack
            self.bases += base

    def begin(self, step: str, total: int) -> None:
        """Say what comes next, and how many bytes that is; 0: it is not known."""
        with self._counting:
            self._step, self._done, self._total = step, 0, total
            self._tell()

    def passed(self, size: int) -> None:
        """Count bytes of the step under way; fewer than none where they come once more."""
        with self._counting:
            self._done += size
            self._tell()

    def counted(self, parts: Parts) -> Parts:
        """Return what gives the same parts and counts them, those of the last time only."""
        before = 0

        def give() -> Iterator[Part]:
            nonlocal before
            self.passed(-before)
            before = 0
            for part in parts():
                yield part
                before += len(part)
                self.passed(len(part))

        return give

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self._step, self._done, self._total)

    def result(self) -> Transfer:
        """Return what was counted."""
        return Transfer(
            checkpoints=tuple(self.checkpoints),
            packs=self.packs,
            bases=self.bases,
            refs=tuple(self.refs),
            bytes=self.bytes,
            base_bytes=self.base_bytes,
            unverified=self.unverified,
            timelines_left=self.timelines_left,
        )
