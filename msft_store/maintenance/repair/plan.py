"""Repairing a damaged store: a plan that can be printed first, and its execution.

Invariants: nothing is deleted: what is damaged, or of no use any more, moves to ``quarantine/``.
What is sound is written anew before the damaged file that holds it goes, so that a repair that was
killed at any point can be repeated and ends the same. Executing excludes saves and gc.

Example::

    plan = plan_repair(backend)
    print(plan)
    plan.execute()
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count

from msft_store.errors import StoreError, is_damage, require_damage, strip_hint
from msft_store.format.layout import VERSION, seal
from msft_store.maintenance.repair.assess import (
    Condition,
    Conditions,
    PackCondition,
    Survey,
    Verdicts,
)
from msft_store.maintenance.repair.recover import mend
from msft_store.objects.catalog import CONFIG, Catalog
from msft_store.objects.manifest import list_manifests, manifest_path
from msft_store.objects.packs import PackWriter, list_packs
from msft_store.objects.refs import RefReader, ref_path
from msft_store.storage.backend import QUARANTINE, Backend, file_sizes, write_atomic

_ACCOUNT = "why.json"


@dataclass(frozen=True, kw_only=True)
class RepairResult:
    """What an executed plan did."""

    folder: str | None
    """Where the files went that were set aside; ``None`` if there was nothing to do."""
    files: int
    """How many there are."""
    bytes: int
    """Their size."""


@dataclass(frozen=True, kw_only=True)
class RepairPlan:
    """What a repair would do; nothing happens before :meth:`execute`."""

    sound: tuple[str, ...]
    """Ids of the checkpoints that are sound, oldest first; they stay, as they are."""
    waiting: tuple[Condition, ...]
    """Checkpoints that stay, but cannot be restored before a base is back as it was."""
    lost: tuple[Condition, ...]
    """Checkpoints that cannot be restored any more; their manifests are set aside."""
    mended: Mapping[str, str]
    """Files that are written anew, and why, by path."""
    packs: tuple[PackCondition, ...]
    """Packs that are set aside; what is usable of them is written anew."""
    aside: Mapping[str, str]
    """Other files that are set aside, and why, by path."""
    _contents: Mapping[str, bytes] = field(repr=False)
    _backend: Backend = field(repr=False, compare=False)
    _verdicts: Verdicts = field(repr=False, compare=False)

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.mended or self.packs or self.aside)

    def __str__(self) -> str:
        kept = len(self.sound) + len(self.waiting)
        lines = [f"{len(self.sound)} of {kept + len(self.lost)} checkpoints are sound"]
        lines += [f"  waiting  checkpoint {condition}" for condition in self.waiting]
        lines += [f"  lost     checkpoint {condition}" for condition in self.lost]
        lines += [f"  mend     {path}: {why}" for path, why in self.mended.items()]
        lines += [f"  {_told(pack)}" for pack in self.packs]
        lines += [f"  aside    {path}: {why}" for path, why in self.aside.items()]
        return "\n".join(lines if self.needed else [*lines, "nothing to repair"])

    def execute(self) -> RepairResult:
        """Carry the plan out, as far as it is still true."""
        with self._backend.lock(shared=False, purpose="repair"):
            return _execute(_plan(self._backend, self._verdicts))


def plan_repair(backend: Backend) -> RepairPlan:
    """Return what is damaged and how much of it can be kept. Everything is read.

    :class:`StoreError` for what is no damage: no store there, another version, a file system that
    refuses.
    """
    if not (backend.exists(CONFIG) or list_manifests(backend) or list_packs(backend)):
        Catalog(backend)  # says so; a lock would leave its folder where no store is
    with backend.lock(shared=True, purpose="repair"):
        return _plan(backend, Verdicts())


def _plan(backend: Backend, verdicts: Verdicts) -> RepairPlan:
    overlay, mended = mend(backend)
    catalog = Catalog(overlay)
    catalog.refresh()
    found = Conditions(Survey(catalog, verdicts))
    refs, damaged = RefReader(overlay).scan()
    require_damage(damaged.values())
    aside = {path: strip_hint(error) for path, error in damaged.items()}
    kept = {*found.sound, *(condition.checkpoint for condition in found.waiting)}
    aside |= {
        ref_path(ref.name): f"it points to checkpoint {ref.checkpoint[:12]}, which is lost"
        for ref in refs.values()
        if ref.checkpoint not in kept
    }
    aside |= {
        manifest_path(condition.checkpoint): "; ".join(condition.reasons)
        for condition in found.lost
    }
    packs = {pack.path for pack in found.packs}
    aside |= {
        path: strip_hint(error)
        for path, error in catalog.objects.damaged.items()
        if path not in packs
    }
    return RepairPlan(
        sound=found.sound,
        waiting=found.waiting,
        lost=found.lost,
        mended={path: why for path, why in mended.items() if path not in aside},
        packs=found.packs,
        aside=aside,
        _contents=overlay.replaced,
        _backend=backend,
        _verdicts=verdicts,
    )


def _told(pack: PackCondition) -> str:
    if not pack.damaged:
        return f"rename   {pack.path}: {pack.why}"
    kept = f"{len(pack.usable)} of its {pack.records} chunks are kept" if pack.records else "lost"
    return f"pack     {pack.path}: {kept}; {pack.why}"


def _execute(plan: RepairPlan) -> RepairResult:
    backend = plan._backend
    if not plan.needed:
        return RepairResult(folder=None, files=0, bytes=0)
    folder = _new_folder(backend)
    write_atomic(backend, f"{folder}/{_ACCOUNT}", _account(plan))
    for path in plan.mended:
        _copy(backend, path, f"{folder}/{path}")
        write_atomic(backend, path, plan._contents[path])
    for path in plan.aside:
        backend.move(path, f"{folder}/{path}")
    # First of all no pack stands where another one belongs, which would be replaced.
    packs = [_out_of_the_way(backend, pack) for pack in plan.packs]
    for pack in packs:
        if pack.damaged and _rewritten(backend, pack) != pack.path:
            backend.move(pack.path, f"{folder}/{pack.path}")
    for pack in packs:
        if not pack.damaged:
            taken = backend.exists(pack.right_path)
            backend.move(pack.path, f"{folder}/{pack.path}" if taken else pack.right_path)
    moved = file_sizes(backend, folder)
    del moved[f"{folder}/{_ACCOUNT}"]
    return RepairResult(
        folder=backend.describe(folder), files=len(moved), bytes=sum(moved.values())
    )


def _new_folder(backend: Backend) -> str:
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = chain([now], (f"{now}-{number}" for number in count(2)))
    return next(
        f"{QUARANTINE}/{name}" for name in names if not backend.list(f"{QUARANTINE}/{name}")
    )


def _account(plan: RepairPlan) -> bytes:
    """Return what says, beside the files, why they are there."""
    packs = {pack.path: pack.why for pack in plan.packs}
    return seal(
        {
            "format": "msft-quarantine",
            "version": VERSION,
            "files": {**plan.mended, **packs, **plan.aside},
            "checkpoints": {lost.checkpoint: list(lost.reasons) for lost in plan.lost},
        }
    )


def _copy(backend: Backend, path: str, target: str) -> None:
    try:
        data = backend.read(path)
    except StoreError as error:
        # Of a file that is gone, or on a bad medium, there is nothing to keep.
        if backend.exists(path) and not is_damage(error):
            raise
    else:
        write_atomic(backend, target, data)


def _out_of_the_way(backend: Backend, pack: PackCondition) -> PackCondition:
    if pack.path == pack.right_path:
        return pack
    stem = pack.right_path.removesuffix(".pack")
    names = (f"{stem}-{number}.pack" for number in count(1))
    path = next(name for name in names if name == pack.path or not backend.exists(name))
    if path != pack.path:
        backend.move(pack.path, path)
    return replace(pack, path=path)


def _rewritten(backend: Backend, pack: PackCondition) -> str | None:
    """Write what is usable of a pack anew; return where.

    In the pack's own place, if nothing was damaged but what says where its parts are.
    """
    if not pack.usable:
        return None
    with backend.writer() as writer:
        anew = PackWriter(writer)
        for record in pack.usable:
            payload = backend.read(pack.path, record.offset, record.length)
            anew.append(replace(record, offset=anew.position), payload)
        return anew.finalize()
