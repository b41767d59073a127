"""What a run of the Trainer keeps in a store: its commits, and one resume point.

Two timelines: ``NAME`` of the weights, under the run's policy, and ``NAME-resume``, of which only
the newest stays. Invariant: a commit is durable before its resume point is, so that no resume point
is ahead of the commits; in the background too, where one pair is under way at a time.

Example::

    commits = RunCommits(store, "main", resumable=True, background=False)
    commits.begin(base, KeepLast(1))                # in the main process; the others only read
    commits.save(weights, training, step=10, metrics={"loss": 0.4}, metadata={}, of_training={})
    commits.point()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from msft_store.errors import InvalidInputError
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint
from msft_store.retention import KeepLast, Policy
from msft_store.saver import Background
from msft_store.store import Store
from msft_store.timeline.persistence import KEY
from msft_store.timeline.timeline import Timeline

_RESUME = "-resume"
Tensors = Mapping[str, torch.Tensor]


class RunCommits:
    """The timelines of one run; every process has this, the main one alone has begun it."""

    def __init__(self, store: Store, name: str, *, resumable: bool, background: bool) -> None:
        if name.endswith(_RESUME):
            raise InvalidInputError(
                f"a run named {name!r} would be taken for the resume points of another; "
                f"give it a name that does not end in {_RESUME!r}"
            )
        self._store = store
        self._name = name
        self._resumable = resumable
        self._background = Background() if background else None
        self._weights: Timeline | None = None
        self._resume: Timeline | None = None

    def begin(self, base: Base | None, policy: Policy, *, anew: bool = False) -> bool:
        """Take up the timelines, or begin them; return whether there are commits already.

        With ``anew``, a run that ended between its first commit and its first resume point has
        none: it cannot be resumed, and nothing of it is lost by beginning again.
        """
        self.join()
        self._weights = Timeline(self._store, base, retention=policy, name=self._name)
        if self._resumable:
            name = f"{self._name}{_RESUME}"
            self._resume = Timeline(self._store, base, retention=KeepLast(1), name=name)
            numbers = [c.metadata[KEY]["index"] for c in self._weights.checkpoints()]
            if anew and numbers == [0] and not self._resume.checkpoints():
                self._weights.rewind(0)
        return bool(self._weights.checkpoints())

    @property
    def timeline(self) -> Timeline:
        """The commits, once nothing of them is under way."""
        if self._weights is None:
            raise InvalidInputError(
                "there is no timeline before training has begun, and only in the main process"
            )
        self.wait()
        return self._weights

    def save(
        self,
        weights: Tensors,
        training: Tensors,
        *,
        step: int,
        metrics: Mapping[str, float],
        metadata: Mapping[str, Any],
        of_training: Mapping[str, Any],
    ) -> None:
        """Commit weights, and with the rest of the training's state the resume point.

        ``of_training`` is the resume point's metadata. In the background this returns after a copy
        of all; an error of the one before is raised here, or by :meth:`wait`.
        """
        names = list(weights)

        def save(tensors: Tensors) -> None:
            if self._weights is not None:
                kept = {name: tensors[name] for name in names}
                self._weights.commit(kept, step, metrics, metadata)
            if self._resume is not None:
                self._resume.commit(tensors, step, metrics, of_training)

        tensors = {**weights, **training}
        if self._background is None:
            save(tensors)
        else:
            self._background.submit(tensors, save)

    def rewind(self, index: int) -> None:
        """Make the next commit the one of number ``index``; later ones are evicted."""
        self.timeline.rewind(index)

    def kept(self) -> list[Checkpoint]:
        """Return the commits that are kept, oldest first, in whatever process."""
        self.wait()
        return self._protected(self._name)

    def point(self) -> Checkpoint | None:
        """Return the newest resume point."""
        self.join()
        return next(reversed(self._protected(f"{self._name}{_RESUME}")), None)

    def join(self) -> None:
        """Wait until nothing is under way, whatever came of it."""
        if self._background is not None:
            self._background.join()

    def wait(self) -> None:
        """Wait until nothing is under way, and raise an error that nobody has got yet."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Drop the refs of both timelines, and the memory of the copy."""
        self.wait()
        if self._background is not None:
            self._background.release()
        for timeline in (self._weights, self._resume):
            if timeline is not None:
                timeline.close()

    def _protected(self, timeline: str) -> list[Checkpoint]:
        prefix = f"timelines/{timeline}/"
        named = {target for ref, target in self._store.refs().items() if ref.startswith(prefix)}
        return [checkpoint for checkpoint in self._store.log() if checkpoint.id in named]
