"""Give the tensors of a checkpoint the names and shapes that they have in the files of the base.

A mapping says which tensors of the base are the counterparts of a checkpoint's. Read backwards, it
says how to write the files of the base again. Invariant: every element of the checkpoint is written
exactly once, and every written tensor of the base is complete; tensors for which this is not
possible keep their names in the checkpoint.

Example::

    layout = original_layout(tensors, base, mapping)
    layout.names["model.layers.0.mlp.gate.weight"]
    layout.assembled["model.layers.0.block_sparse_moe.experts.0.w1.weight"].parts
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from msft_store.format.mapping import BaseMapping, Shape, ViewPart, exchanged_prefixes
from msft_store.objects.bases import Base
from msft_store.objects.counterparts import layer_of
from msft_store.objects.manifest import TensorEntry, is_exactly_covered


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A tensor that is written from parts of a checkpoint's tensors."""

    entry: TensorEntry
    """The tensor without its content."""
    parts: tuple[tuple[str, ViewPart], ...]
    """Names of the checkpoint's tensors, each with one of their parts."""


@dataclass(frozen=True, kw_only=True)
class OriginalLayout:
    """The names and shapes of a checkpoint's tensors in the files of its base.

    Attributes:
        names: Names in the files, of tensors that are written as they are.
        assembled: Tensors of the files that consist of parts of a checkpoint's tensors.
        impossible: Names of tensors with a counterpart that cannot be written in its form.
    """

    names: Mapping[str, str]
    assembled: Mapping[str, Assembled]
    impossible: tuple[str, ...]

    @property
    def taken(self) -> set[str]:
        """Names in the checkpoint of the tensors that are written in another form."""
        parts = (part for one in self.assembled.values() for part in one.parts)
        return {*self.names, *(name for name, _ in parts)}


NOT_ORIGINAL = OriginalLayout(names={}, assembled={}, impossible=())
"""The layout that leaves all tensors as they are."""


def original_layout(
    tensors: Mapping[str, TensorEntry], base: Base, mapping: BaseMapping
) -> OriginalLayout:
    """Return the form of tensors in the files of a base, as far as a mapping tells."""
    mapped = [n for n in tensors if n in mapping.names or n in mapping.views]
    usable = {name: list(_users(name, entry, base, mapping)) for name, entry in tensors.items()}
    usable = {name: found for name, found in usable.items() if found}
    for name in [*_uncertain(tensors, base, mapping)]:
        usable.pop(name, None)
    while True:
        provided: dict[str, list[tuple[str, ViewPart | None]]] = {}
        for name, found in usable.items():
            for other, part in found:
                provided.setdefault(other, []).append((name, part))
        bad = {
            name
            for other, users in provided.items()
            for name in _superfluous(other, users, tensors, base)
        }
        if not bad:
            break
        usable = {name: found for name, found in usable.items() if name not in bad}
    names, assembled = {}, {}
    for other, users in provided.items():
        (name, first), *_ = users
        if first is None:
            if name != other:
                names[name] = other
            continue
        assembled[other] = Assembled(
            entry=replace(tensors[name], shape=base.tensors[other].shape, pieces=()),
            parts=tuple((n, part) for n, part in users if part is not None),
        )
    impossible = tuple(sorted(set(mapped) - usable.keys()))
    return OriginalLayout(names=names, assembled=assembled, impossible=impossible)


def _users(
    name: str, entry: TensorEntry, base: Base, mapping: BaseMapping
) -> Iterator[tuple[str, ViewPart | None]]:
    """Yield the tensors of the base that a whole tensor goes into, with its part in each."""
    view, other = mapping.views.get(name), mapping.names.get(name, name)
    if view is not None:
        if view.shape == entry.shape and view.covered == math.prod(view.shape):
            yield from ((part.tensor, part) for part in view.parts)
    elif other in base.tensors and base.tensors[other].shape == entry.shape:
        yield other, None


def _superfluous(
    other: str,
    users: list[tuple[str, ViewPart | None]],
    tensors: Mapping[str, TensorEntry],
    base: Base,
) -> Iterable[str]:
    """Return the users of a tensor of the base that do not write it exactly once, together."""
    whole = [name for name, part in users if part is None]
    if whole:
        # Of tied tensors, the one with the name in the base is written; the names end alike.
        kept = min(whole, key=lambda name: (len(exchanged_prefixes(name, other)[1]), name))
        return [name for name, _ in users if name != kept]
    shape = base.tensors[other].shape
    parts = [part for _, part in users if part is not None]
    views = {part.check(shape) for part in parts}
    if len(views) == len({tensors[name].dtype for name, _ in users}) == 1:
        boxes = [part.in_base((0,) * len(part.shape), part.shape) for part in parts]
        try:
            if is_exactly_covered(boxes, views.pop()):
                return ()
        except ValueError:
            pass
    return [name for name, _ in users]


def _uncertain(
    tensors: Mapping[str, TensorEntry], base: Base, mapping: BaseMapping
) -> Iterator[str]:
    """Yield the tensors whose counterpart may be another one of equal content.

    Untrained scales and biases are equal. An equal content in the checkpoint, too, makes their
    order meaningless, or the module as a whole has another name; else a trained scale could be
    written in the place of another.
    """
    twins: dict[tuple[object, ...], set[str]] = {}
    for other, tensor in base.tensors.items():
        same = (layer_of(other), tensor.dtype, tensor.shape, tensor.keys)
        twins.setdefault(same, set()).add(other)
    alike = {other: found for found in twins.values() if len(found) > 1 for other in found}
    back = {other: name for name, other in mapping.names.items()}
    mine = {name: entry.shape for name, entry in tensors.items()}
    theirs = base.shapes
    for name, entry in tensors.items():
        match = mapping.names.get(name, name)
        if match != name and match in alike:
            users = [tensors.get(back.get(one, one)) for one in alike[match]]
            new, old = exchanged_prefixes(name, match)
            if any(user is None or user.pieces != entry.pieces for user in users) and (
                _ends(mine, new, entry.shape) != _ends(theirs, old, entry.shape)
                or not all(one.startswith(old) for one in alike[match])
            ):
                yield name
        view = mapping.views.get(name)
        if view is not None and any(part.tensor in alike for part in view.parts):
            yield name


def _ends(shapes: Mapping[str, Shape], prefix: str, shape: Shape) -> set[str]:
    """Return the rest of the names of a shape that begin with a prefix."""
    return {
        n[len(prefix) :] for n, found in shapes.items() if found == shape and n.startswith(prefix)
    }
