"""Freeing space: a plan that can be printed first, and its execution.

Invariants: nothing that a checkpoint needs, directly or as a reference, is ever deleted; manifests
go before the packs that they name, and rewritten packs are durable before the old ones go, so that
a crash at any point leaves every remaining checkpoint whole. What a key stands for stays the same.
Deleting excludes saves. What needs no room is freed first; a pack for whose rewriting there is none
then stays as it is, and that is said.

Example::

    plan = plan_gc(catalog, KeepBest("overall", 3))
    print(plan)
    plan.execute()
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
from msft_store.storage.backend import TEMPORARY, disk_bytes, file_sizes
from msft_store.storage.quota import require_space

_LOG = logging.getLogger(__name__)
_REWRITE_FROM = 0.2
"""Dead share of a pack from which rewriting it pays for the copying."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happens to a checkpoint, and why."""

    checkpoint: Checkpoint
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PackWaste:
    """A pack with bytes that no checkpoint needs."""

    path: str
    size: int
    dead_bytes: int
    live: tuple[Record, ...]

    @property
    def live_bytes(self) -> int:
        """Return the room that rewriting it takes until it is deleted, the footer aside."""
        return sum(record.length for record in self.live)


@dataclass(frozen=True, kw_only=True)
class GcResult:
    """What an executed plan did, in bytes on disk."""

    freed_bytes: int
    bytes: int
    """All bytes of the store afterwards."""
    peak_bytes: int
    """All bytes of the store at the worst moment."""
    left_bytes: int = 0
    """Dead bytes of packs for whose rewriting there was no room; a later gc frees them."""
    hindrance: str | None = None
    """Why they were left."""

    def __str__(self) -> str:
        text = f"freed {format_bytes(self.freed_bytes)}"
        if self.left_bytes:
            text += f"; left {format_bytes(self.left_bytes)} for a later gc, for {self.hindrance}"
        return text


@dataclass(frozen=True, kw_only=True)
class GcPlan:
    """What a gc would do; nothing happens before :meth:`execute`."""

    kept: tuple[Verdict, ...]
    dropped: tuple[Verdict, ...]
    delete: tuple[PackWaste, ...]
    rewrite: tuple[PackWaste, ...]
    leftovers: tuple[tuple[str, int], ...]
    """Files of saves that never ended, and their sizes in bytes."""
    held_bytes: int
    """Bytes that no checkpoint names but that others are differences of."""
    _catalog: Catalog = field(repr=False, compare=False)

    @property
    def freed_bytes(self) -> int:
        """Bytes that executing frees, footers aside."""
        return (
            sum(waste.size for waste in self.delete)
            + sum(waste.dead_bytes for waste in self.rewrite)
            + sum(size for _, size in self.leftovers)
        )

    def __str__(self) -> str:
        return "\n".join([f"would free {format_bytes(self.freed_bytes)}", *self.steps()])

    def steps(self) -> list[str]:
        """Return what goes, in the order in which it does, and what stays; one line for each."""
        lines = [
            f"  forget   {_label(verdict.checkpoint)}: {', '.join(verdict.reasons)}"
            for verdict in self.dropped
        ]
        lines += [f"  delete   {waste.path} ({format_bytes(waste.size)})" for waste in self.delete]
        lines += [
            f"  rewrite  {waste.path} ({format_bytes(waste.dead_bytes)} of "
            f"{format_bytes(waste.size)} is dead; "
            f"takes {format_bytes(waste.live_bytes)} for a moment)"
            for waste in self.rewrite
        ]
        lines += [f"  leftover {path} ({format_bytes(size)})" for path, size in self.leftovers]
        if self.kept:
            lines.append("keeps")
        lines += [
            f"  {_label(verdict.checkpoint)}: {', '.join(verdict.reasons)}" for verdict in self.kept
        ]
        if self.held_bytes:
            lines.append(
                f"  {format_bytes(self.held_bytes)} of forgotten checkpoints, "
                "because others are stored as differences of them"
            )
        return lines

    def execute(self) -> GcResult:
        """Carry the plan out; what was pinned or came to be needed since stays."""
        return evict(self._catalog, [verdict.checkpoint.id for verdict in self.dropped])


def plan_gc(catalog: Catalog, policy: Policy | None = None) -> GcPlan:
    """Return what could go: without a policy, only bytes that no checkpoint needs."""
    catalog.refresh()
    refuse_damage(catalog)
    checkpoints, protected = catalog.checkpoints(), catalog.list_protected()
    kept: dict[str, tuple[str, ...]] = {
        checkpoint.id: (protected.get(checkpoint.id, "a checkpoint; no policy was given"),)
        for checkpoint in checkpoints
    }
    if policy is not None:
        check_ranked_metrics(
            check_policy(policy), [checkpoint.metrics for checkpoint in checkpoints]
        )
        decided = policy.decide(_candidates(checkpoints, protected))
        kept = {
            identity: tuple(reason.text for reason in reasons)
            for identity, reasons in decided.items()
        }
    keep = [checkpoint for checkpoint in checkpoints if checkpoint.id in kept]
    delete, rewrite, held = waste_of(catalog, keep)
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
    # To a policy of the whole store, timelines and their branches are one line of checkpoints.
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
    least a share ``rewrite_from`` of it is dead; with 0 if anything in it is.
    """
    backend = catalog.backend
    before = peak = disk_bytes(backend)
    refuse_damage(catalog)
    protected = catalog.list_protected()
    doomed = [i for i in drop if i not in protected and catalog.get(i) is not None]
    # Deciding comes first, because it reads everything and so finds any damage.
    keep = [checkpoint for checkpoint in catalog.checkpoints() if checkpoint.id not in doomed]
    delete, rewrite, _ = waste_of(catalog, keep, share=rewrite_from)
    if doomed:
        # After a power loss, a ref whose deletion was not durable would point to no checkpoint.
        backend.sync(REFS)
    for identity in doomed:
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
            # The remaining packs need even more room.
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
        hindrance=hindrance,
    )


def rewrite_packs(catalog: Catalog, wastes: Sequence[PackWaste]) -> None:
    """Write what is live in packs into one new pack, durably; the old ones stay."""
    require_space(catalog.backend, sum(waste.live_bytes for waste in wastes))
    with catalog.backend.writer() as writer:
        pack = PackWriter(writer)
        for waste in wastes:
            for record in waste.live:
                payload = catalog.backend.read(waste.path, record.offset, record.length)
                if len(payload) != record.length:
                    raise _damaged(f"{catalog.backend.describe(waste.path)} is truncated")
                pack.append(replace(record, offset=pack.position), payload)
        pack.finalize()


def waste_of(
    catalog: Catalog,
    keep: Sequence[Checkpoint],
    *,
    share: float = _REWRITE_FROM,
    small: int = 0,
) -> tuple[tuple[PackWaste, ...], tuple[PackWaste, ...], int]:
    """Return packs without anything that ``keep`` needs, packs to rewrite, and the bytes held.

    To rewrite are those of which a ``share`` is dead, and all below ``small`` bytes.
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
            footer, alive = index.packs[path], np.flatnonzero(live).tolist()
            rivals = is_among(index.keys[rows][live], index.keys[~needs.live]).tolist()
            records = tuple(
                raise_generation(footer.record(row)) if rival else footer.record(row)
                for row, rival in zip(alive, rivals, strict=True)
            )
            rewrite.append(PackWaste(path=path, size=size, dead_bytes=dead, live=records))
    # The one that takes the least room first: what it frees, the next one has.
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
    """Raise where something of a store cannot be read, for then it is not known what it needs."""
    for error in (*catalog.damaged.values(), *catalog.objects.damaged.values()):
        raise _damaged(error, type(error))


def _damaged(what: object, kind: type[StoreError] = CorruptedError) -> StoreError:
    told = strip_hint(what) if isinstance(what, StoreError) else what
    return kind(f"gc deletes nothing from a damaged store: {told}; {REPAIR_HINT}")


def _label(checkpoint: Checkpoint) -> str:
    step = "" if checkpoint.step is None else f" step {checkpoint.step}"
    return f"{checkpoint.id[:12]}{step}"
