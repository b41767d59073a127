"""Keep the two timelines of a Trainer's run: its checkpoints, and one resume point.

Timeline ``NAME`` holds the weights, under the run's retention policy. Timeline ``NAME-resume``
holds the newest resume point. Invariant: the weights are durable before their resume point is, so
that no resume point is ahead of the weights. This holds in the background too, because only one
pair is committed at a time.

Example::

    timelines = RunTimelines(store, "main", background=False)
    timelines.open(base, KeepLast(1), resumable=True)   # in the main process; the others only read
    timelines.commit(weights, training, step=10, metrics={"loss": 0.4}, metadata={},
                     resume_metadata={}, files={})
    timelines.find_resume_point()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msft_store.errors import InvalidInputError
from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint
from msft_store.retention import Candidate, KeepBest, KeepLast, Mode, Policy, Reason
from msft_store.saver import Background
from msft_store.store import Store
from msft_store.timeline.persistence import KEY, ref_of
from msft_store.timeline.timeline import Timeline

_RESUME = "-resume"
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SaveLimit(Policy):
    """Keep ``n`` checkpoints as the Trainer counts them: the best by a metric is one of the ``n``.

    Unless it is ``final``, the newest is kept besides the best if ``n`` is 1, as the Trainer does
    until training ends.
    """

    n: int
    best: tuple[str, Mode] | None = None
    final: bool = False

    @property
    def ranked_by(self) -> tuple[str, ...]:
        return (self.best[0],) if self.best else ()

    def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
        best: list[tuple[Candidate, Reason]] = []
        if self.best is not None:
            metric, mode = self.best
            best = list(KeepBest(metric, 1, mode=mode).keep(candidates))
        yield from best
        others = [c for c in candidates if all(c.id != kept.id for kept, _ in best)]
        count = self.n - len(best)
        if not (count or self.final) and others and others[-1].id == candidates[-1].id:
            count = 1
        if count and others:
            yield from KeepLast(count).keep(others)


class RunTimelines:
    """The timelines of one run. All processes create this; only the main one opens it."""

    def __init__(self, store: Store, name: str, *, background: bool) -> None:
        if name.endswith(_RESUME):
            raise InvalidInputError(
                f"the name {name!r} is reserved for the resume points of a run; "
                f"choose a name that does not end in {_RESUME!r}"
            )
        self._store = store
        self._name = name
        self._background = Background()
        self._commits_in_background = background
        self._weights: Timeline | None = None
        self._resume: Timeline | None = None

    def open(
        self, base: Base | None, policy: Policy, *, resumable: bool, restart: bool = False
    ) -> bool:
        """Open or begin the timelines; return True if they hold checkpoints already.

        If ``resumable`` is false, there is no resume point. If ``restart`` is true, a run that was
        killed between its first commit and its first resume point begins again, because it cannot
        be resumed.
        """
        self._background.join()
        self._weights = Timeline(self._store, base, retention=policy, name=self._name)
        self._resume = None
        if resumable:
            name = f"{self._name}{_RESUME}"
            self._resume = Timeline(self._store, base, retention=KeepLast(1), name=name)
            numbers = [c.metadata[KEY]["index"] for c in self._weights.checkpoints()]
            if restart and numbers == [0] and not self._resume.checkpoints():
                self._weights.rewind(0)
        return bool(self._weights.checkpoints())

    @property
    def timeline(self) -> Timeline:
        """The timeline of the weights, after commits in the background are done."""
        if self._weights is None:
            raise InvalidInputError(
                "there is no timeline before training begins, and only the main process has one"
            )
        self.wait()
        return self._weights

    def set_policy(self, policy: Policy) -> None:
        """Let another policy decide from the next commit on."""
        self.timeline.retention = policy

    def is_used(self) -> bool:
        """Return True if the run has checkpoints. This works before the timelines are open."""
        return bool(self._protected(self._name))

    def hold(self, point: Checkpoint | None) -> None:
        """Keep a resume point, whatever is committed, until this is called with ``None``."""
        ref, refs = f"retries/{self._name}", self._store.refs()
        if point is not None:
            self._store.pin(point, ref)
        elif ref in refs:
            self._store.unpin(ref)
        held = refs.get(ref)
        if held is not None and held not in self._store.refs().values():
            self._store.evict([held])

    def commit(
        self,
        weights: Tensors,
        training: Tensors,
        *,
        step: int,
        metrics: Mapping[str, float],
        metadata: Mapping[str, Any],
        resume_metadata: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        """Commit the weights and, together with the training's state, the resume point.

        ``resume_metadata`` is the resume point's metadata; ``files`` describe the model. In the
        background this returns after everything is copied; an error of the previous commit is
        raised here or by :meth:`wait`.
        """
        names = list(weights)

        def commit(tensors: Tensors) -> None:
            if self._weights is not None:
                kept = {name: tensors[name] for name in names}
                self._weights.commit(kept, step, metrics, metadata, files)
            if self._resume is not None:
                self._resume.commit(tensors, step, metrics, resume_metadata, files)

        tensors = {**weights, **training}
        if self._commits_in_background:
            self._background.submit(tensors, commit)
        else:
            commit(tensors)

    def list_kept(self) -> list[Checkpoint]:
        """Return the kept checkpoints, oldest first. This works in every process."""
        self.wait()
        return self._protected(self._name)

    def find_resume_point(self) -> Checkpoint | None:
        """Return the newest resume point, or ``None``."""
        self._background.join()
        return next(reversed(self._protected(f"{self._name}{_RESUME}")), None)

    def leave(self) -> None:
        """Wait for commits in the background and free their memory. The checkpoints stay."""
        self._background.join()
        self._background.release()

    def wait(self) -> None:
        """Wait for commits in the background and raise an error that was not raised yet."""
        self._background.wait()

    def close(self) -> None:
        """Delete the refs of both timelines, and free the memory of the copy."""
        self.wait()
        self._background.release()
        for timeline in (self._weights, self._resume):
            if timeline is not None:
                timeline.close()

    def _protected(self, timeline: str) -> list[Checkpoint]:
        prefix = ref_of(timeline, "")
        named = {target for ref, target in self._store.refs().items() if ref.startswith(prefix)}
        return [checkpoint for checkpoint in self._store.log() if checkpoint.id in named]
