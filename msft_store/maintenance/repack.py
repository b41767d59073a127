"""Repack a store: remove all dead bytes and merge small packs into large ones.

A gc rewrites a pack only if enough of it is dead; a repack rewrites the others too. Invariants, as
for gc: new packs are durable before old ones are deleted, deleting excludes saves, and ids and the
content of every key stay the same.

Example::

    plan = plan_repack(catalog)
    print(plan)
    plan.execute()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msft_store._util import format_bytes, format_count
from msft_store.maintenance.gc import GcResult, PackWaste, find_waste, refuse_damage, rewrite_packs
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import MANIFESTS
from msft_store.objects.packs import PACKS
from msft_store.storage.backend import disk_bytes

SMALL = 64 << 20
"""Size in bytes below which a pack is merged with others."""
LARGEST = 1 << 30
"""Largest size of a merged pack, in bytes of chunks."""


@dataclass(frozen=True, kw_only=True)
class RepackPlan:
    """List the changes of a repack; :meth:`execute` makes them, and ``str`` describes them.

    Attributes:
        delete: Packs that no checkpoint needs.
        merge: Groups of packs. The live chunks of each group are copied to one new pack.
    """

    delete: tuple[PackWaste, ...]
    merge: tuple[tuple[PackWaste, ...], ...]
    _catalog: Catalog = field(repr=False, compare=False)

    @property
    def freed_bytes(self) -> int:
        """Bytes that :meth:`execute` frees, not counting footers."""
        dead = sum(waste.dead_bytes for group in self.merge for waste in group)
        return dead + sum(waste.size for waste in self.delete)

    def __str__(self) -> str:
        moved = max((sum(w.live_bytes for w in group) for group in self.merge), default=0)
        heading = (
            f"would make {self.change()}, and free {format_bytes(self.freed_bytes)}; "
            f"takes {format_bytes(moved)} for a moment"
        )
        return "\n".join([heading, *self.steps()])

    def change(self) -> str:
        """Return the number of packs after and before, such as "1 pack of 4"."""
        before = len(self.delete) + sum(map(len, self.merge))
        return f"{format_count(len(self.merge), 'pack')} of {before}"

    def steps(self) -> list[str]:
        """Return one line for each pack."""
        lines = [f"  delete   {waste.path} ({format_bytes(waste.size)})" for waste in self.delete]
        for number, group in enumerate(self.merge, 1):
            lines += [
                f"  into {number:>3} {waste.path} ({format_bytes(waste.size)}, of which "
                f"{format_bytes(waste.dead_bytes)} are dead)"
                for waste in group
            ]
        return lines

    def execute(self) -> GcResult:
        """Plan again under the exclusive lock, then merge and delete packs.

        Raises:
            StoreError: The store is damaged or locked, or there is no space for a merged pack.
        """
        backend = self._catalog.backend
        with backend.lock(shared=False, purpose="repack"):
            before = peak = disk_bytes(backend)
            # A new plan accounts for checkpoints that were saved after this one was made.
            plan = plan_repack(self._catalog)
            if plan.delete or plan.merge:
                backend.sync(MANIFESTS)
                backend.sync(PACKS)
            for waste in plan.delete:
                backend.delete(waste.path)
            for group in plan.merge:
                rewrite_packs(self._catalog, group)
                peak = max(peak, disk_bytes(backend))
                for waste in group:
                    backend.delete(waste.path)
            self._catalog.refresh()
            after = disk_bytes(backend)
        return GcResult(freed_bytes=before - after, bytes=after, peak_bytes=peak)


def plan_repack(catalog: Catalog) -> RepackPlan:
    """Plan a repack; raise :class:`StoreError` if the store is damaged."""
    catalog.refresh()
    refuse_damage(catalog)
    delete, wasteful, _ = find_waste(catalog, catalog.checkpoints(), share=0.0, small=SMALL)
    small = [waste for waste in wasteful if waste.live_bytes < SMALL]
    alone = [(waste,) for waste in wasteful if waste.live_bytes >= SMALL and waste.dead_bytes]
    groups = [group for group in _groups(small) if len(group) > 1 or group[0].dead_bytes]
    return RepackPlan(delete=delete, merge=(*groups, *alone), _catalog=catalog)


def _groups(wastes: Sequence[PackWaste]) -> list[tuple[PackWaste, ...]]:
    """Group packs, the smallest first, up to :data:`LARGEST` bytes of chunks a group."""
    groups: list[tuple[PackWaste, ...]] = []
    group: list[PackWaste] = []
    for waste in sorted(wastes, key=lambda waste: (waste.live_bytes, waste.path)):
        if group and sum(w.live_bytes for w in group) + waste.live_bytes > LARGEST:
            groups.append(tuple(group))
            group = []
        group.append(waste)
    return [*groups, tuple(group)] if group else groups
