"""Leases keep a version in a directory while a follower holds it or asks for it.

A lease is a ref of the directory's store, ``leases/NAME/FOLLOWER``, whose note has the time at
which it ends. Until then every gc, policy and ``forget`` leaves its checkpoint. Afterwards it
protects nothing, and goes with its checkpoint. The clocks of the machines must agree within its
length. On an object store nothing is ever deleted, so nothing is leased there.

Example::

    leases = Leases(directory, "policy", seconds=600)
    leases.take(checkpoint_id)
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid

from msft_store.errors import BusyError, StorageError, UnknownCheckpointError
from msft_store.objects.manifest import manifest_path
from msft_store.objects.refs import LEASES, Ref, delete_ref, write_ref
from msft_store.storage.backend import Backend

_log = logging.getLogger(__name__)


class Leases:
    """The leases of one follower in one directory, or none if it reads from elsewhere."""

    def __init__(self, directory: Backend | None, name: str, *, seconds: float) -> None:
        self._directory = directory
        self._start = f"{LEASES}{name}/{uuid.uuid4().hex}"
        self._seconds = seconds
        self._ends: dict[str, float] = {}
        """The time at which the lease of each checkpoint ends, by id."""

    def take(self, checkpoint: str) -> None:
        """Lease a checkpoint, unless more than half of its lease is left.

        A follower that must not write there does without, and a warning says so once.
        :class:`UnknownCheckpointError` if the checkpoint is gone.
        """
        now, directory = time.time(), self._directory
        if directory is None or self._ends.get(checkpoint, 0) - now > self._seconds / 2:
            return
        until = now + self._seconds
        try:
            with directory.lock(shared=True, purpose="follow"):
                if not directory.exists(manifest_path(checkpoint)):
                    raise UnknownCheckpointError(
                        f"checkpoint {checkpoint[:12]} is no longer in {directory.describe('')}"
                    )
                note = {"until": int(until * 1e9)}
                write_ref(
                    directory, Ref(name=self._ref(checkpoint), checkpoint=checkpoint, note=note)
                )
        except (StorageError, BusyError) as error:
            _log.warning("no version is leased, so a gc may take it away: %s", error)
            self._directory = None
            return
        self._ends[checkpoint] = until

    def end(self, *, besides: str | None = None) -> None:
        """End all leases, or all but that of one checkpoint."""
        for checkpoint in [one for one in self._ends if one != besides]:
            del self._ends[checkpoint]
            if self._directory is not None:
                # What cannot be deleted ends by itself.
                with contextlib.suppress(StorageError, BusyError):
                    delete_ref(self._directory, self._ref(checkpoint))

    def _ref(self, checkpoint: str) -> str:
        return f"{self._start}-{checkpoint[:12]}"
