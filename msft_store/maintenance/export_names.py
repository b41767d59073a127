"""What of a checkpoint an export writes, and under which names.

A checkpoint says in its metadata, under ``export``, which of its tensors are a model's: those whose
names do not begin with ``without``, and begin with ``within``. What the names then have more in
front than the base's names is left out of them.

Example::

    chosen = exported(checkpoint, tensors, base)
    chosen.tensors["lm_head.weight"].shape
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msft_store.objects.bases import Base
from msft_store.objects.manifest import Checkpoint, TensorEntry
from msft_store.objects.reference_planner import match_names

KEY = "export"
"""Of the metadata: how a checkpoint is exported."""


_MATRIX = 2
"""Dimensions."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export writes."""

    tensors: Mapping[str, TensorEntry]
    """By the names that they get in the files."""
    left_out: tuple[str, ...]
    """The checkpoint's names of what is no part of the model."""
    adapter: Mapping[str, Any] | None
    """The settings of an adapter, if it is one."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def exported(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorEntry],
    base: Base | None,
    *,
    ties: bool = False,
) -> Exported:
    """Return what an export of a checkpoint with these tensors writes; ``base`` is its base.

    ``ties``: whoever reads the files ties tensors as the configuration beside them says. Then what
    the base's files have under one of its names is written under that name only.
    """
    said = checkpoint.metadata.get(KEY)
    said = said if isinstance(said, Mapping) else {}
    without, within, adapter = said.get("without"), said.get("within"), said.get("adapter")
    names = {name: name for name in tensors}
    if isinstance(without, str) and without:
        names = {name: name for name in names if not name.startswith(without)}
    if isinstance(within, str) and any(name.startswith(within) for name in names):
        names = {name: name[len(within) :] for name in names if name.startswith(within)}
    if base is not None and not isinstance(adapter, Mapping):
        shapes = {new: tensors[name].shape for name, new in names.items()}
        prefix = common_prefix(shapes, base)
        names = {name: new[len(prefix) :] for name, new in names.items()}
    found = {new: tensors[name] for name, new in names.items()}
    if base is not None and ties and not isinstance(adapter, Mapping):
        found = _without_tied(found, base)
    return Exported(
        tensors=found,
        left_out=tuple(sorted(tensors.keys() - names.keys())),
        adapter=adapter if isinstance(adapter, Mapping) else None,
    )


def root_of_model(
    shapes: Mapping[str, tuple[int, ...]], base: Base, roots: Iterable[str]
) -> str | None:
    """Return which of ``roots`` the names of a model begin with, for ``within``.

    That is the one under which most tensors have a counterpart in the base, of several the longest;
    ``None`` if there is none under any.
    """
    found = match_names(shapes, {name: tensor.shape for name, tensor in base.tensors.items()})
    counts = {root: sum(name.startswith(root) for name in found) for root in sorted(roots)}
    best = max(counts, key=lambda root: (counts[root], len(root)), default=None)
    return best if best is not None and counts[best] else None


def _without_tied(tensors: Mapping[str, TensorEntry], base: Base) -> dict[str, TensorEntry]:
    """Return tensors without those that are tied to one of the base's, and not in its files.

    Such a one is equal to exactly one that the base has, and no vector: those, such as the scales
    of layer norms, are often equal by chance.
    """
    twins = Counter(_content(entry) for name, entry in tensors.items() if name in base.tensors)
    return {
        name: entry
        for name, entry in tensors.items()
        if name in base.tensors or len(entry.shape) < _MATRIX or twins[_content(entry)] != 1
    }


def _content(entry: TensorEntry) -> tuple[object, ...]:
    return entry.dtype.name, entry.shape, entry.pieces


def common_prefix(shapes: Mapping[str, tuple[int, ...]], base: Base) -> str:
    """Return what all names begin with that the base's names do not: ``module.``, or nothing."""
    found = match_names(shapes, {name: tensor.shape for name, tensor in base.tensors.items()})
    prefixes = {
        name.removesuffix(other) if name.endswith(other) else "" for name, other in found.items()
    }
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return prefix if all(name.startswith(prefix) for name in shapes) else ""
