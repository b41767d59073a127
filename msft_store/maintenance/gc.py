"""Plan a garbage collection, print the plan, and execute it.

Invariants: gc never deletes a chunk that a checkpoint needs, directly or as a reference. Manifests
are deleted before the packs that they name, and rewritten packs are durable before the old ones go,
so a crash at any point leaves every remaining checkpoint complete. Keys keep their content.
Deleting excludes saves. Packs that need no space are freed first; a pack that there is no space to
rewrite stays as it is and is reported.

Example::

    plan = plan_gc(catalog, KeepBest("overall", 3))
    print(plan)
    plan.execute()
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np

from msft_store._util import format_bytes
from msft_store.errors import (
    REPAIR_HINT,
    CorruptedError,
    OutOfSpaceError,
    OverBudgetError,
    StoreError,
    strip_hint,
)
from msft_store.format.key_table import is_among
from msft_store.format.layout import Record
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import MANIFESTS, Checkpoint, manifest_path
from msft_store.objects.packs import PACKS, PackWriter, raise_generation
from msft_store.objects.reachability import find_reachable
from msft_store.objects.refs import REFS
from msft_store.retention import Candidate, Policy, check_policy, check_ranked_metrics
from msft_store.storage.backend import TEMPORARY, Backend, disk_bytes, file_sizes
from msft_store.storage.quota import require_space

_LOG = logging.getLogger(__name__)
_REWRITE_FROM = 0.2
"""Share of dead bytes from which a pack is rewritten; below it, copying costs more."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A checkpoint that a gc keeps or deletes, and the reasons."""

    checkpoint: Checkpoint
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{_label(self.checkpoint)}: {', '.join(self.reasons)}"


@dataclass(frozen=True, kw_only=True)
class PackWaste:
    """A pack with bytes that no checkpoint needs."""

    path: str
    size: int
    dead_bytes: int
    live: tuple[Record, ...]

    @property
    def live_bytes(self) -> int:
        """Bytes that the rewritten pack occupies until this one is deleted, without the footer."""
        return sum(record.length for record in self.live)


@dataclass(frozen=True, kw_only=True)
class GcResult:
    """Report the effect of an executed plan, in bytes on disk.

    Attributes:
        freed_bytes: Bytes that the store lost.
        bytes: Size of the store afterwards.
        peak_bytes: Largest size of the store during the execution.
        left_bytes: Dead bytes in packs that there was no space to rewrite. A later gc frees them.
        held_bytes: Bytes of chunks that no checkpoint names but that others refer to.
        hindrance: The error that postponed the rewriting; ``None`` if there was none.
    """

    freed_bytes: int
    bytes: int
    peak_bytes: int
    left_bytes: int = 0
    held_bytes: int = 0
    hindrance: str | None = None

    def __str__(self) -> str:
        text = f"freed {format_bytes(self.freed_bytes)}"
        if self.left_bytes:
            text += f"; a later gc frees {format_bytes(self.left_bytes)}: {self.hindrance}"
        return text


@dataclass(frozen=True, kw_only=True)
class GcPlan:
    """List the changes of a gc; :meth:`execute` makes them, and ``str`` describes them.

    Attributes:
        kept: Checkpoints that stay, with the reasons.
        dropped: Checkpoints whose manifests are deleted, with the reasons.
        delete: Packs that no kept checkpoint needs.
        rewrite: Packs whose live chunks are copied to a new pack.
        leftovers: Paths of files of interrupted saves, and their sizes in bytes.
        held_bytes: Bytes of chunks that no kept checkpoint names but that others refer to.
    """

    kept: tuple[Verdict, ...]
    dropped: tuple[Verdict, ...]
    delete: tuple[PackWaste, ...]
    rewrite: tuple[PackWaste, ...]
    leftovers: tuple[tuple[str, int], ...]
    held_bytes: int
    _catalog: Catalog = field(repr=False, compare=False)

    @property
    def freed_bytes(self) -> int:
        """Bytes that :meth:`execute` frees, not counting footers."""
        return (
            sum(waste.size for waste in self.delete)
            + sum(waste.dead_bytes for waste in self.rewrite)
            + sum(size for _, size in self.leftovers)
        )

    def __str__(self) -> str:
        return "\n".join([f"would free {format_bytes(self.freed_bytes)}", *self.steps()])

    def steps(self) -> list[str]:
        """Return one line for each deletion, in order, then one for each kept checkpoint."""
        lines = [f"  forget   {verdict}" for verdict in self.dropped]
        lines += [f"  delete   {waste.path} ({format_bytes(waste.size)})" for waste in self.delete]
        lines += [
            f"  rewrite  {waste.path} ({format_bytes(waste.dead_bytes)} of "
            f"{format_bytes(waste.size)} is dead; "
            f"takes {format_bytes(waste.live_bytes)} for a moment)"
            for waste in self.rewrite
        ]
        lines += [f"  leftover {path} ({format_bytes(size)})" for path, size in self.leftovers]
        if self.kept:
            lines += ["keeps", *(f"  {verdict}" for verdict in self.kept)]
        if self.held_bytes:
            lines.append(
                f"  {format_bytes(self.held_bytes)} of forgotten checkpoints, "
                "because others are stored as differences of them"
            )
        return lines

    def execute(self) -> GcResult:
        """Free the space, but keep all that was pinned or became needed since the plan was made.

        Raises:
            StoreError: The store is damaged or locked. Nothing of a damaged store is deleted.
        """
        return evict(self._catalog, [verdict.checkpoint.id for verdict in self.dropped])


def plan_gc(catalog: Catalog, policy: Policy | None = None) -> GcPlan:
    """Plan a gc; without a policy, it frees only bytes that no checkpoint needs."""
    catalog.refresh()
    refuse_damage(catalog)
    checkpoints, protected = catalog.checkpoints(), catalog.list_protected()
    kept: dict[str, tuple[str, ...]] = {
        c.id: (protected.get(c.id, "a checkpoint; no policy was given"),) for c in checkpoints
    }
    if policy is not None:
        check_ranked_metrics(check_policy(policy), [c.metrics for c in checkpoints])
        decided = policy.decide(_candidates(checkpoints, protected))
        kept = {i: tuple(reason.text for reason in reasons) for i, reasons in decided.items()}
    keep = [c for c in checkpoints if c.id in kept]
    delete, rewrite, held = find_waste(catalog, keep)
    return GcPlan(
        kept=tuple(Verdict(checkpoint=c, reasons=kept[c.id]) for c in keep),
        dropped=tuple(
            Verdict(checkpoint=c, reasons=("no rule of the policy keeps it",))
            for c in checkpoints
            if c.id not in kept
        ),
        delete=delete,
        rewrite=rewrite,
        leftovers=_leftovers(catalog),
        held_bytes=held,
        _catalog=catalog,
    )


def _candidates(checkpoints: Sequence[Checkpoint], protected: Mapping[str, str]) -> list[Candidate]:
    # A policy of the whole store sees timelines and branches as one sequence of checkpoints.
    return [
        Candidate(
            id=checkpoint.id,
            metrics=checkpoint.metrics,
            stored_bytes=checkpoint.stored_bytes,
            index=index,
            pinned=protected.get(checkpoint.id),
            step=checkpoint.step,
        )
        for index, checkpoint in enumerate(checkpoints)
    ]


def evict(
    catalog: Catalog, drop: Sequence[str], *, rewrite_from: float = _REWRITE_FROM
) -> GcResult:
    """Delete checkpoints by id under the store's lock; see :func:`evict_locked`."""
    with catalog.backend.lock(shared=False, purpose="gc"):
        catalog.refresh()
        return evict_locked(catalog, drop, rewrite_from=rewrite_from)


def evict_locked(
    catalog: Catalog, drop: Sequence[str], *, rewrite_from: float = _REWRITE_FROM
) -> GcResult:
    """Delete checkpoints that no ref protects, and free the bytes that no other one needs.

    The caller holds the lock exclusively and has refreshed the catalog. A pack is rewritten if at
    least a share ``rewrite_from`` of it is dead; 0 means any dead byte.
    """
    backend = catalog.backend
    before = peak = disk_bytes(backend)
    refuse_damage(catalog)
    protected = catalog.list_protected()
    dropped = [i for i in drop if i not in protected and catalog.get(i) is not None]
    # Deciding comes first, because it reads everything and so finds any damage.
    keep = [checkpoint for checkpoint in catalog.checkpoints() if checkpoint.id not in dropped]
    delete, rewrite, held = find_waste(catalog, keep, share=rewrite_from)
    if dropped:
        catalog.delete_leases_of(dropped)
        # After a power loss, a ref whose deletion was not durable would point to no checkpoint.
        backend.sync(REFS)
    for identity in dropped:
        _LOG.info("evict checkpoint %s", identity[:12])
        backend.delete(manifest_path(identity))
        catalog.remove(identity)
    if delete or rewrite:
        # After a power loss, a manifest whose deletion was not durable would lack its chunks. The
        # packs that hold other copies of deleted chunks must be durable too.
        backend.sync(MANIFESTS)
        backend.sync(PACKS)
    for path, _ in _leftovers(catalog):
        backend.delete(path)
    for waste in delete:
        _LOG.debug("delete %s, %s", waste.path, format_bytes(waste.size))
        backend.delete(waste.path)
    left, hindrance = 0, None
    for number, waste in enumerate(rewrite):
        try:
            rewrite_packs(catalog, [waste])
        except (OutOfSpaceError, OverBudgetError) as error:
            # The packs are sorted by the space they need, so the remaining ones need even more.
            left, hindrance = sum(w.dead_bytes for w in rewrite[number:]), str(error)
            _LOG.info("rewriting %s is postponed: %s", format_bytes(left), hindrance)
            break
        peak = max(peak, disk_bytes(backend))
        backend.delete(waste.path)
    if delete or rewrite:
        catalog.objects.refresh()
    after = disk_bytes(backend)
    return GcResult(
        freed_bytes=before - after,
        bytes=after,
        peak_bytes=peak,
        left_bytes=left,
        held_bytes=held,
        hindrance=hindrance,
    )


def rewrite_packs(catalog: Catalog, wastes: Sequence[PackWaste]) -> None:
    """Copy the live chunks of packs to one new durable pack; the old packs stay."""
    require_space(catalog.backend, sum(waste.live_bytes for waste in wastes))
    records = [(waste.path, record) for waste in wastes for record in waste.live]
    copy_records(catalog.backend, records, catalog.config.version)


def copy_records(backend: Backend, records: Iterable[tuple[str, Record]], version: int) -> str:
    """Copy records, given with the paths of their packs, to a new pack; return its path."""
    with backend.writer() as writer:
        pack = PackWriter(writer, version)
        for path, record in records:
            payload = backend.read(path, record.offset, record.length)
            if len(payload) != record.length:
                raise _damaged(f"{backend.describe(path)} is truncated")
            pack.append(replace(record, offset=pack.position), payload)
        return pack.finalize()


def find_waste(
    catalog: Catalog,
    keep: Sequence[Checkpoint],
    *,
    share: float = _REWRITE_FROM,
    small: int = 0,
) -> tuple[tuple[PackWaste, ...], tuple[PackWaste, ...], int]:
    """Return the packs that ``keep`` does not need, the packs to rewrite, and the held bytes.

    A pack is rewritten if at least a ``share`` of it is dead, or if it has fewer than ``small``
    bytes.
    """
    index = catalog.objects.index
    keys = catalog.keys_by_base(keep)
    needs = find_reachable(catalog.objects, index, keys)
    if len(needs.missing):
        _name_missing(catalog, keep)
    delete, rewrite = [], []
    for path, rows in index.slices():
        live, lengths = needs.live[rows], index.lengths[rows]
        if live.any() and live.all() and not small:
            continue
        size, dead = catalog.backend.size(path), int(lengths[~live].sum())
        if not live.any():
            delete.append(PackWaste(path=path, size=size, dead_bytes=dead, live=()))
        elif (dead and dead >= share * size) or size < small:
            records = [index.packs[path].record(row) for row in np.flatnonzero(live).tolist()]
            has_other = is_among(index.keys[rows][live], index.keys[~needs.live]).tolist()
            records = [
                raise_generation(record) if other else record
                for record, other in zip(records, has_other, strict=True)
            ]
            rewrite.append(PackWaste(path=path, size=size, dead_bytes=dead, live=tuple(records)))
    # The pack that needs the least space comes first, so that the next one can use what it frees.
    rewrite.sort(key=lambda waste: waste.live_bytes)
    return tuple(delete), tuple(rewrite), int(index.lengths[needs.only_referenced].sum())


def _name_missing(catalog: Catalog, keep: Sequence[Checkpoint]) -> NoReturn:
    for checkpoint in keep:
        alone = catalog.keys_by_base([checkpoint])
        missing = find_reachable(catalog.objects, catalog.objects.index, alone).missing
        if len(missing):
            raise _damaged(f"{len(missing)} chunks of {_label(checkpoint)} are in no pack")
    raise _damaged("chunks are in no pack")


def _leftovers(catalog: Catalog) -> tuple[tuple[str, int], ...]:
    return tuple(file_sizes(catalog.backend, TEMPORARY).items())


def refuse_damage(catalog: Catalog) -> None:
    """Raise if a file of the store cannot be read, because its references are then unknown."""
    for error in (*catalog.damaged.values(), *catalog.objects.damaged.values()):
        raise _damaged(error, type(error))


def _damaged(what: object, kind: type[StoreError] = CorruptedError) -> StoreError:
    reason = strip_hint(what) if isinstance(what, StoreError) else what
    return kind(f"gc deletes nothing from a damaged store: {reason}; {REPAIR_HINT}")


def _label(checkpoint: Checkpoint) -> str:
    step = "" if checkpoint.step is None else f" step {checkpoint.step}"
    return f"{checkpoint.id[:12]}{step}"
