"""Plan the repair of a damaged store, print the plan, and execute it.

Invariants: repair deletes nothing; damaged and useless files move to ``quarantine/``. The sound
chunks of a damaged pack are copied to a new pack before the damaged one moves, so a killed repair
can be repeated with the same result. Executing excludes saves and gc.

Example::

    plan = plan_repair(backend)
    print(plan)
    plan.execute()
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count

from msft_store.errors import StorageError, StoreError, is_damage, require_damage, strip_hint
from msft_store.format.layout import VERSION, seal
from msft_store.maintenance.gc import copy_records
from msft_store.maintenance.repair.assess import (
    Condition,
    PackCondition,
    Survey,
    Verdicts,
)
from msft_store.maintenance.repair.recover import recover_files
from msft_store.objects.catalog import CONFIG, Catalog
from msft_store.objects.manifest import list_manifests, manifest_path
from msft_store.objects.packs import list_packs
from msft_store.objects.refs import RefReader, ref_path
from msft_store.storage.backend import QUARANTINE, Backend, file_sizes, write_atomic

_REPORT = "why.json"
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, kw_only=True)
class RepairResult:
    """Report the files that an executed plan moved to quarantine.

    Attributes:
        folder: Path of the quarantine folder; ``None`` if there was nothing to repair.
        files: Number of the files in it, without ``why.json``.
        bytes: Their size.
    """

    folder: str | None
    files: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RepairPlan:
    """List the changes of a repair; :meth:`execute` makes them, and ``str`` describes them.

    Attributes:
        sound: Ids of the sound checkpoints, oldest first. They do not change.
        waiting: Checkpoints that stay but cannot be restored until a base is back.
        lost: Checkpoints that cannot be restored; their manifests move to quarantine.
        recovered: Reasons to write small files again with corrected content, by path.
        packs: Packs that are rewritten without their damaged chunks, quarantined, or renamed.
        quarantined: Reasons to move other files to quarantine, by path.
    """

    sound: tuple[str, ...]
    waiting: tuple[Condition, ...]
    lost: tuple[Condition, ...]
    recovered: Mapping[str, str]
    packs: tuple[PackCondition, ...]
    quarantined: Mapping[str, str]
    _contents: Mapping[str, bytes] = field(repr=False)
    _backend: Backend = field(repr=False, compare=False)
    _verdicts: Verdicts = field(repr=False, compare=False)
    _version: int = field(repr=False, compare=False)

    @property
    def needed(self) -> bool:
        """True if the plan changes anything."""
        return bool(self.recovered or self.packs or self.quarantined)

    def __str__(self) -> str:
        kept = len(self.sound) + len(self.waiting)
        lines = [f"{len(self.sound)} of {kept + len(self.lost)} checkpoints are sound"]
        lines += [f"  waiting  checkpoint {condition}" for condition in self.waiting]
        lines += [f"  lost     checkpoint {condition}" for condition in self.lost]
        lines += [f"  recover  {path}: {why}" for path, why in self.recovered.items()]
        lines += [f"  {_describe_pack(pack)}" for pack in self.packs]
        lines += [f"  move     {path}: {why}" for path, why in self.quarantined.items()]
        return "\n".join(lines if self.needed else [*lines, "nothing to repair"])

    def execute(self) -> RepairResult:
        """Plan again under the exclusive lock, then move damaged files and write corrected ones.

        Raises:
            StoreError: The store is locked, or the file system refuses a write.
        """
        with self._backend.lock(shared=False, purpose="repair"):
            return _execute(_plan(self._backend, self._verdicts))


def plan_repair(backend: Backend) -> RepairPlan:
    """Read the whole store and plan its repair.

    Raises:
        StoreError: There is no store, it has another version, or the file system refuses to read
            it. None of these counts as damage.
    """
    if not (backend.exists(CONFIG) or list_manifests(backend) or list_packs(backend)):
        Catalog(backend)  # This raises; taking the lock would create a folder.
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(backend.lock(shared=True, purpose="repair"))
        except StorageError as error:
            # A store on a read-only file system has no lock, but its repair can be planned.
            if getattr(error.__cause__, "errno", None) not in _READ_ONLY:
                raise
        return _plan(backend, Verdicts())


def _plan(backend: Backend, verdicts: Verdicts) -> RepairPlan:
    overlay, recovered = recover_files(backend)
    catalog = Catalog(overlay)
    catalog.refresh()
    survey = Survey(catalog, verdicts)
    sound, waiting, lost = survey.conditions()
    rewritten = tuple(survey.packs())
    refs, damaged = RefReader(overlay).scan()
    require_damage(damaged.values())
    kept = {*sound, *(condition.checkpoint for condition in waiting)}
    packs = {pack.path for pack in rewritten}
    errors = {**damaged, **catalog.objects.damaged}
    quarantined = {path: strip_hint(error) for path, error in errors.items() if path not in packs}
    for ref in refs.values():
        if ref.checkpoint not in kept:
            reason = f"it points to checkpoint {ref.checkpoint[:12]}, which is lost"
            quarantined[ref_path(ref.name)] = reason
    for condition in lost:
        quarantined[manifest_path(condition.checkpoint)] = "; ".join(condition.reasons)
    return RepairPlan(
        sound=tuple(sound),
        waiting=tuple(waiting),
        lost=tuple(lost),
        recovered={path: why for path, why in recovered.items() if path not in quarantined},
        packs=rewritten,
        quarantined=quarantined,
        _contents=overlay.replaced,
        _backend=backend,
        _verdicts=verdicts,
        _version=catalog.config.version,
    )


def _describe_pack(pack: PackCondition) -> str:
    if not pack.damaged:
        return f"rename   {pack.path}: {pack.why}"
    kept = f"{len(pack.usable)} of its {pack.records} chunks are kept" if pack.records else "lost"
    return f"pack     {pack.path}: {kept}; {pack.why}"


def _execute(plan: RepairPlan) -> RepairResult:
    backend = plan._backend
    if not plan.needed:
        return RepairResult(folder=None, files=0, bytes=0)
    folder = _new_folder(backend)
    write_atomic(backend, f"{folder}/{_REPORT}", _make_report(plan))
    for path in plan.recovered:
        _copy(backend, path, f"{folder}/{path}")
        write_atomic(backend, path, plan._contents[path])
    for path in plan.quarantined:
        backend.move(path, f"{folder}/{path}")
    # Misnamed packs move first, because writing a pack replaces a file that has its name.
    packs = [_move_misnamed(backend, pack) for pack in plan.packs]
    for pack in packs:
        if pack.damaged and _rewrite_pack(backend, pack, plan._version) != pack.path:
            backend.move(pack.path, f"{folder}/{pack.path}")
    for pack in packs:
        if not pack.damaged:
            taken = backend.exists(pack.right_path)
            backend.move(pack.path, f"{folder}/{pack.path}" if taken else pack.right_path)
    moved = file_sizes(backend, folder)
    del moved[f"{folder}/{_REPORT}"]
    return RepairResult(
        folder=backend.describe(folder), files=len(moved), bytes=sum(moved.values())
    )


def _new_folder(backend: Backend) -> str:
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = chain([now], (f"{now}-{number}" for number in count(2)))
    return next(
        f"{QUARANTINE}/{name}" for name in names if not backend.list(f"{QUARANTINE}/{name}")
    )


def _make_report(plan: RepairPlan) -> bytes:
    """Return the content of ``why.json``: the reasons for each file and lost checkpoint."""
    packs = {pack.path: pack.why for pack in plan.packs}
    return seal(
        {
            "format": "msft-quarantine",
            "version": VERSION,
            "files": {**plan.recovered, **packs, **plan.quarantined},
            "checkpoints": {lost.checkpoint: list(lost.reasons) for lost in plan.lost},
        }
    )


def _copy(backend: Backend, path: str, target: str) -> None:
    try:
        data = backend.read(path)
    except StoreError as error:
        # A file that is missing or on a bad medium cannot be copied.
        if backend.exists(path) and not is_damage(error):
            raise
    else:
        write_atomic(backend, target, data)


def _move_misnamed(backend: Backend, pack: PackCondition) -> PackCondition:
    if pack.path == pack.right_path:
        return pack
    stem = pack.right_path.removesuffix(".pack")
    names = (f"{stem}-{number}.pack" for number in count(1))
    path = next(name for name in names if name == pack.path or not backend.exists(name))
    if path != pack.path:
        backend.move(pack.path, path)
    return replace(pack, path=path)


def _rewrite_pack(backend: Backend, pack: PackCondition, version: int) -> str | None:
    """Copy the usable chunks of a pack to a new pack; return its path, or ``None`` without any.

    The path is the old one if only the header or trailer was damaged.
    """
    records = [(pack.path, record) for record in pack.usable]
    return copy_records(backend, records, version) if records else None
