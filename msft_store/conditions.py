"""Which checkpoints and packs a survey found sound, and what is the matter with the others.

Example::

    for condition in Conditions(survey).lost:
        print(condition.checkpoint, condition.reasons)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msft_store.dtypes import DType
from msft_store.errors import BaseError, CorruptedError, StoreError, reason
from msft_store.footer import Footer
from msft_store.format import Record
from msft_store.manifest import Checkpoint, chunk_sizes
from msft_store.packs import Stored, ahead, list_packs, path_of_pack
from msft_store.survey import Survey

_REASONS = 3
"""How many are given of a checkpoint; one damaged pack may be the reason a thousand times."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A checkpoint that cannot be restored, and why."""

    checkpoint: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.checkpoint[:12]}: {'; '.join(self.reasons)}"


@dataclass(frozen=True, kw_only=True)
class PackCondition:
    """A pack that is not as it should be."""

    path: str
    why: str
    records: int
    """How many it has; 0 if that cannot be told."""
    usable: tuple[Record, ...]
    """Those that are sound, and those that cannot be judged before a base is back."""
    right_path: str
    """Where it belongs, by its footer; its own path if that cannot be read."""
    damaged: bool = True
    """Whether more is wrong with it than its name."""


class Conditions:
    """What is the matter with checkpoints and packs."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._catalog = survey.catalog
        self._known: dict[tuple[bytes, int, DType, str | None], StoreError | None] = {}
        self._reasons = self._unusable()
        sound: list[str] = []
        waiting: list[Condition] = []
        lost = [
            Condition(checkpoint=identity, reasons=(reason(error),))
            for identity, error in survey.unreadable.items()
        ]
        for checkpoint in self._catalog.checkpoints():
            if checkpoint.id not in survey.unreadable:
                problems = self._problems(checkpoint)
                fatal = [error for error in problems if not isinstance(error, BaseError)]
                texts = tuple(dict.fromkeys(map(str, fatal or problems)))[:_REASONS]
                condition = Condition(checkpoint=checkpoint.id, reasons=texts)
                if not problems:
                    sound.append(checkpoint.id)
                else:
                    (lost if fatal else waiting).append(condition)
        self.sound = tuple(sound)
        """Ids of the checkpoints that can be restored, oldest first."""
        self.waiting = tuple(waiting)
        """Those that need a base which is not there or not as it was, and may come back."""
        self.lost = tuple(lost)
        self.packs = tuple(self._packs())

    def _unusable(self) -> dict[bytes, str]:
        """Return why records cannot be used, by the key of their chunk."""
        backend, verdicts = self._catalog.backend, self._survey.verdicts
        return {
            verdicts.footer(backend, path).rows["key"][number].tobytes(): why
            for places in (self._survey.stranded, verdicts.damaged)
            for (path, number), why in places.items()
        }

    def _problems(self, checkpoint: Checkpoint) -> list[StoreError]:
        base = checkpoint.base
        if base is not None and base not in self._catalog.objects.bases():
            # Not lost: the same model, added again, is the same base.
            text = f"base {base[:12]} has no record that can be read; msft-store add-base PATH"
            return [BaseError(f"{text} with the same model brings it back")]
        problems: list[StoreError] = []
        for name, entry in self._catalog.tensors(checkpoint).items():
            for piece in entry.pieces:
                for key, size in zip(piece.keys, chunk_sizes(piece, entry.dtype), strict=True):
                    place = (key, size, entry.dtype, base)
                    if place not in self._known:
                        self._known[place] = self._problem(*place)
                    problem = self._known[place]
                    if problem is not None:
                        problems.append(type(problem)(f"tensor {name}: {problem}"))
        return problems

    def _problem(self, key: bytes, size: int, dtype: DType, base: str | None) -> StoreError | None:
        objects = self._catalog.objects
        if objects.in_base(key, base) is not None:
            try:
                objects.read(key, size, dtype, base)
            except StoreError as error:
                return BaseError(reason(error))
            return None
        row = objects.index.find(key, base)
        if row < 0:
            return CorruptedError(self._reasons.get(key, f"chunk {key.hex()} is in no pack"))
        record = objects.index.stored(row).record
        if (record.size, record.dtype) != (size, dtype.code):
            return CorruptedError(f"chunk {key.hex()} has another size or dtype")
        waiting = self._survey.waiting.get(self._survey.places[row])
        return None if waiting is None else BaseError(waiting)

    def _packs(self) -> Iterator[PackCondition]:
        backend, verdicts = self._catalog.backend, self._survey.verdicts
        unreadable = self._catalog.objects.damaged
        for path in list_packs(backend):
            if path in unreadable:
                why = reason(unreadable[path])
                yield PackCondition(path=path, why=why, records=0, usable=(), right_path=path)
                continue
            footer = verdicts.footer(backend, path)
            reasons = [why for (at, _), why in verdicts.damaged.items() if at == path]
            if path in verdicts.mended:
                reasons.append(verdicts.mended[path])
            if self._survey.needs_without(path):
                reasons.append("it has chunks whose references are lost")
            right = path_of_pack(footer.check)
            if reasons or path != right:
                yield PackCondition(
                    path=path,
                    why=reasons[0] if reasons else "it stands under another name than its own",
                    records=len(footer),
                    usable=tuple(self._usable(path, footer)) if reasons else (),
                    right_path=right,
                    damaged=bool(reasons),
                )

    def _usable(self, path: str, footer: Footer) -> list[Record]:
        found = [(number, footer.record(number)) for number in self._survey.numbers(path).tolist()]
        usable = [
            (number, record)
            for number, record in found
            if self._survey.can_serve(Stored(pack=path, record=record), (path, number))
        ]
        if len(usable) == len(footer):
            # The same pack again, under the same name.
            return [record for _, record in usable]
        needed = self._survey.needed
        return [ahead(record) if (path, n) in needed else record for n, record in usable]
