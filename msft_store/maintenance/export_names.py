"""Select the tensors of a checkpoint that an export writes, and their names in the files.

The metadata of a checkpoint describes its model under ``export``: ``without`` is a prefix of
tensors that are left out, and ``within`` is the prefix of the model's tensors, which is removed. A
prefix that remains in comparison with the names of the base is removed, too. Tensors that have
another form in the files of the base get that form (:mod:`~.original_layout`). ``adapter`` has the
settings of an adapter, and ``adapters`` those of further ones by name; the names of the tensors of
these begin with ``NAME/``.

Example::

    chosen = exported(checkpoint, tensors, base)
    chosen.tensors["lm_head.weight"].shape
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from msft_store.errors import InvalidInputError
from msft_store.format.mapping import NOTHING, BaseMapping, exchanged_prefixes
from msft_store.maintenance.original_layout import (
    NOT_ORIGINAL,
    Assembled,
    OriginalLayout,
    original_layout,
)
from msft_store.objects.bases import Base
from msft_store.objects.counterparts import match_names
from msft_store.objects.manifest import Checkpoint, TensorEntry
from msft_store.tensors.names import plain_names

KEY = "export"
"""Key of the metadata for the settings of an export."""

Layout = Literal["files", "memory"]
"""The form of an export: that of the base's files, or that of the checkpoint, as in memory."""
PROMPTS = "prompt_encoder."
"""Prefix of the tensors from which PEFT computes learned prompts, which an adapter's file has."""

_FOLDER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""Names of adapters that are names of directories, too."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The content of an export."""

    tensors: Mapping[str, TensorEntry]
    """Tensors by their names in the files."""
    left_out: tuple[str, ...]
    """Names in the checkpoint of tensors that do not belong to the model."""
    adapter: Mapping[str, Any] | None
    """The settings of an adapter; ``None`` for a model."""
    assembled: Mapping[str, Assembled] = field(default_factory=dict)
    """Those of ``tensors``, by their names in the files, that consist of parts of others."""
    counterparts: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Names in the base of those of ``tensors`` that have another name or shape there."""
    further: Mapping[str, Exported] = field(default_factory=dict)
    """Further adapters by name."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        own = sum(entry.nbytes for entry in self.tensors.values())
        return own + sum(part.nbytes for part in self.further.values())


def export_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the settings of an export that a checkpoint's metadata has."""
    stored = checkpoint.metadata.get(KEY)
    return stored if isinstance(stored, Mapping) else {}


def exported(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorEntry],
    base: Base | None,
    *,
    ties: bool = False,
    mapping: BaseMapping = NOTHING,
    layout: Layout | None = None,
) -> Exported:
    """Return the content of the export of a checkpoint that has these tensors and this base.

    ``ties`` means that the loader of the files ties tensors. A tied tensor is then written only
    under its name in the files of the base. ``layout`` selects between the names and shapes in the
    files of the base, as far as ``mapping`` tells them, and those in the checkpoint.
    :class:`InvalidInputError` if ``"files"`` is selected and not possible for all tensors.
    """
    settings = export_settings(checkpoint)
    without, within = settings.get("without"), settings.get("within")
    adapter = settings.get("adapter")
    if not isinstance(adapter, Mapping):
        adapter = None
    names = {name: name for name in tensors}
    if isinstance(without, str) and without:
        names = {name: name for name in names if not name.startswith(without)}
    if isinstance(within, str) and any(name.startswith(within) for name in names):
        names = {name: name[len(within) :] for name in names if name.startswith(within)}
    further = _further_adapters(settings.get("adapters"), tensors) if adapter is not None else {}
    if adapter is not None:
        names = {
            name: new
            for name, new in names.items()
            if not new.startswith(PROMPTS) and name.partition("/")[0] not in further
        }
    if base is not None and adapter is None:
        shapes = {new: tensors[name].shape for name, new in names.items()}
        prefix = common_prefix(shapes, base)
        names = {name: new[len(prefix) :] for name, new in names.items()}
    original = NOT_ORIGINAL
    if base is not None and adapter is None and layout != "memory":
        original = original_layout({name: tensors[name] for name in names}, base, mapping)
        taken = original.taken
        removed = {exchanged_prefixes(name, old) for name, old in original.names.items()}
        if len(removed) == 1 and not (pair := removed.pop())[1]:
            # A wrapper's prefix goes from the tensors that the base lacks, too.
            names = {name: new.removeprefix(pair[0]) for name, new in names.items()}
        kept = {new for name, new in names.items() if name not in taken}
        if kept & {*original.names.values(), *original.assembled}:
            original = replace(NOT_ORIGINAL, impossible=tuple(sorted(taken)))
    if layout == "files":
        _require_original(original, base)
    names |= original.names
    left = original.taken - original.names.keys()
    found = plain_names({new: tensors[name] for name, new in names.items() if name not in left})
    found |= {name: one.entry for name, one in original.assembled.items()}
    if base is not None and ties and adapter is None:
        found = _without_tied(found, base)
    return Exported(
        tensors=found,
        left_out=tuple(
            name
            for name in sorted(tensors.keys() - names.keys())
            if name.partition("/")[0] not in further
        ),
        adapter=adapter,
        assembled=original.assembled,
        counterparts={
            new: others
            for name, new in names.items()
            if name not in left and (others := mapping.counterparts(name))
        },
        further=further,
    )


def _require_original(original: OriginalLayout, base: Base | None) -> None:
    if base is None:
        raise InvalidInputError(
            "the checkpoint has no base, so there are no other names; export it without a layout"
        )
    if original.impossible:
        raise InvalidInputError(
            "these tensors cannot be written in the form that they have in the files of the base: "
            f"{', '.join(map(repr, original.impossible[:5]))}; leave the layout out, so "
            "that all others are written in that form"
        )


def _further_adapters(stored: object, tensors: Mapping[str, TensorEntry]) -> dict[str, Exported]:
    found = {}
    for name, settings in stored.items() if isinstance(stored, Mapping) else ():
        if not _FOLDER.fullmatch(name) or not isinstance(settings, Mapping):
            raise InvalidInputError(
                f"the adapter {str(name)[:80]!r} cannot have a directory of its name: load the "
                "checkpoint and save the adapter with PEFT"
            )
        part = {
            n.removeprefix(f"{name}/"): t for n, t in tensors.items() if n.startswith(f"{name}/")
        }
        found[name] = Exported(tensors=part, left_out=(), adapter=settings)
    return found


def root_of_model(
    shapes: Mapping[str, tuple[int, ...]], base: Base, roots: Iterable[str]
) -> str | None:
    """Return the one of ``roots`` that the names of a model begin with, for ``within``.

    Choose the root with the most counterparts in the base, then the longest one. Return ``None`` if
    no tensor has a counterpart.
    """
    found = match_names(shapes, base.shapes)
    counts = {root: sum(name.startswith(root) for name in found) for root in sorted(roots)}
    best = max(counts, key=lambda root: (counts[root], len(root)), default=None)
    return best if best is not None and counts[best] else None


def _without_tied(tensors: Mapping[str, TensorEntry], base: Base) -> dict[str, TensorEntry]:
    """Return tensors without those that are tied to a tensor in the files of the base.

    A tied tensor equals exactly one tensor that the base names. Vectors do not count, because
    vectors such as the scales of layer norms are often equal by chance.
    """
    twins = Counter(content_of(entry) for name, entry in tensors.items() if name in base.tensors)
    return {
        name: entry
        for name, entry in tensors.items()
        if name in base.tensors or len(entry.shape) < 2 or twins[content_of(entry)] != 1
    }


def content_of(entry: TensorEntry) -> tuple[object, ...]:
    """Return a value that is equal only for tensors of equal content."""
    return entry.dtype.name, entry.shape, entry.pieces


def common_prefix(shapes: Mapping[str, tuple[int, ...]], base: Base) -> str:
    """Return the prefix that all names have over those of the base, such as ``module.``."""
    found = match_names(shapes, base.shapes)
    prefixes = {
        name.removesuffix(other) if name.endswith(other) else "" for name, other in found.items()
    }
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return prefix if all(name.startswith(prefix) for name in shapes) else ""
