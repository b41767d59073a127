"""Describe which elements of a base are the counterparts of a checkpoint's tensors.

Libraries rename, stack, concatenate, transpose and split tensors between files and memory. A
:class:`BaseMapping` says how, so that a reader needs no library to know. Invariants: a part lies in
its view, parts of a view have together at most as many elements as the view, and what a mapping
says about a base is checked against the shapes of that base when it is read.

Example::

    part = ViewPart(tensor="experts.0.w1", offset=(0, 0, 0), shape=(1, 8, 4), start=(0, 0))
    mapping = BaseMapping(names={"gate": "router"}, views={"experts": View((2, 8, 4), (part,))})
    BaseMapping.from_json(mapping.to_json(base_shapes), base_shapes) == mapping     # True
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.format.strict_json import (
    check_natural,
    check_object,
    check_shape,
    check_string,
    check_tensor_name,
)

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPart:
    """A box of a view and the box of a base's tensor that it shows.

    Attributes:
        tensor: Name of the base's tensor.
        offset: First index of the box in the view.
        shape: Shape of the box in the view.
        start: First index of the box in the base's tensor, as read with ``view``.
        axes: Permutation of the axes of the base's box, as in ``numpy.transpose``, or ``None`` for
            none. Axes of size 1 are then added or removed in front until there are as many as in
            ``shape``.
        view: Shape that the base's tensor is read with, or ``None`` for its own.
    """

    tensor: str
    offset: Shape
    shape: Shape
    start: Shape
    axes: Shape | None = None
    view: Shape | None = None

    def in_base(self, offset: Shape, shape: Shape) -> tuple[Shape, Shape]:
        """Return the offset and shape in the base's tensor of a box inside this part.

        ``offset`` counts from the first element of the part.
        """
        count, own = len(self.start), len(shape)
        aligned = [(0, 1)] * (count - own) + list(zip(offset, shape, strict=True))[-count:]
        if count == 0:
            aligned = []
        first, size = list(self.start), [1] * count
        for axis, (at, length) in zip(self.axes or range(count), aligned, strict=True):
            first[axis] += at
            size[axis] = length
        return tuple(first), tuple(size)

    def check(self, shape: Shape) -> Shape:
        """Return the shape that a base's tensor of this shape is read with.

        :class:`ValueError` if the part does not fit into the tensor.
        """
        seen = shape if self.view is None else self.view
        if math.prod(seen) != math.prod(shape) or len(seen) != len(self.start):
            raise ValueError(f"a part of {self.tensor!r} reads it with another number of elements")
        first, size = self.in_base((0,) * len(self.shape), self.shape)
        if any(f + s > n for f, s, n in zip(first, size, seen, strict=True)):
            raise ValueError(f"a part lies outside of {self.tensor!r}")
        return seen

    def to_json(self) -> dict[str, Any]:
        """Return the part as JSON; fields of their default value are left out."""
        entry: dict[str, Any] = {"tensor": self.tensor, "shape": list(self.shape)}
        for key, value in (("offset", self.offset), ("start", self.start)):
            if any(value) or (key == "start" and len(value) != len(self.shape)):
                entry[key] = list(value)
        for key, optional in (("axes", self.axes), ("view", self.view)):
            if optional is not None:
                entry[key] = list(optional)
        return entry

    @classmethod
    def from_json(cls, value: Any) -> ViewPart:
        """Undo :meth:`to_json`; :class:`ValueError` for anything else."""
        entry = check_object(value)
        shape = check_shape(entry["shape"])
        zeros = [0] * len(shape)
        start = check_shape(entry.get("start", zeros))
        axes = check_shape(entry["axes"]) if "axes" in entry else None
        if axes is not None and sorted(axes) != list(range(len(start))):
            raise ValueError("the axes of a part are no permutation")
        extra = len(shape) - len(start)
        if any(length != 1 for length in shape[: max(extra, 0)]):
            raise ValueError("a part has more axes than the tensor that it shows")
        return cls(
            tensor=check_tensor_name(entry["tensor"]),
            offset=check_shape(entry.get("offset", zeros)),
            shape=shape,
            start=start,
            axes=axes,
            view=check_shape(entry["view"]) if "view" in entry else None,
        )


@dataclass(frozen=True)
class View:
    """A tensor that consists of boxes of a base's tensors; elements in no part are zero.

    If parts overlap, the later one counts.
    """

    shape: Shape
    parts: tuple[ViewPart, ...] = field(repr=False)

    @cached_property
    def _bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        first = np.array([p.offset for p in self.parts], np.int64).reshape(
            len(self.parts), len(self.shape)
        )
        size = np.array([p.shape for p in self.parts], np.int64).reshape(
            len(self.parts), len(self.shape)
        )
        return first, first + size

    @cached_property
    def covered(self) -> int:
        """Number of elements in parts."""
        return sum(math.prod(part.shape) for part in self.parts)

    def overlapping(self, offset: Shape, shape: Shape) -> list[tuple[ViewPart, Shape, Shape]]:
        """Return the parts that share elements with a box, and the shared box in the view."""
        begin, end = self._bounds
        at = np.array(offset, np.int64)
        first, last = np.maximum(begin, at), np.minimum(end, at + np.array(shape, np.int64))
        return [
            (self.parts[n], tuple(first[n].tolist()), tuple((last[n] - first[n]).tolist()))
            for n in np.flatnonzero((first < last).all(axis=1))
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the view as JSON."""
        return {"shape": list(self.shape), "parts": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(cls, value: Any) -> View:
        """Undo :meth:`to_json`; :class:`ValueError` for anything else."""
        entry = check_object(value)
        shape, total = check_shape(entry["shape"]), 0
        if not isinstance(entry["parts"], list):
            raise ValueError("the parts of a view are no list")
        check_natural(math.prod(shape))
        parts = tuple(map(ViewPart.from_json, entry["parts"]))
        for part in parts:
            if len(part.offset) != len(shape) or len(part.shape) != len(shape):
                raise ValueError("a part has another number of axes than its view")
            ends = zip(part.offset, part.shape, shape, strict=True)
            if any(at + length > size or length == 0 for at, length, size in ends):
                raise ValueError("a part is empty or lies outside its view")
            total += math.prod(part.shape)
        if total > math.prod(shape):
            raise ValueError("the parts of a view have more elements than the view")
        return cls(shape, parts)


@dataclass(frozen=True, kw_only=True)
class BaseMapping:
    """The counterparts in a base of a checkpoint's tensors.

    A tensor that is in neither field has a counterpart only if the base has a tensor of the same
    name and shape.

    Attributes:
        names: Names in the base by names in the checkpoint, where they differ, of whole tensors of
            equal shape.
        views: Views of the base by names in the checkpoint.
    """

    names: Mapping[str, str]
    views: Mapping[str, View]

    def __bool__(self) -> bool:
        return bool(self.names or self.views)

    def counterparts(self, name: str) -> set[str]:
        """Return the base's tensors that make up a tensor of another name or shape, if they do."""
        view = self.views.get(name)
        if view is not None:
            whole = view.covered == math.prod(view.shape)
            return {part.tensor for part in view.parts} if whole else set()
        return {self.names[name]} if name in self.names else set()

    def __or__(self, other: BaseMapping) -> BaseMapping:
        """Return the union of the mappings of two processes that hold other boxes of tensors."""
        views = dict(self.views)
        for name, view in other.views.items():
            known = views.get(name, view)
            parts = (*known.parts, *(part for part in view.parts if part not in known.parts))
            views[name] = View(view.shape, parts)
        names = {name: old for name, old in self.names.items() if name not in views}
        return BaseMapping(names={**names, **other.names}, views=views)

    def to_json(self, base: Mapping[str, Shape]) -> dict[str, Any]:
        """Return the mapping as JSON for a base of these shapes, with most names as prefixes."""
        votes = Counter(exchanged_prefixes(new, old) for new, old in self.names.items())
        rules = sorted((rule for rule, count in votes.items() if count > 1), key=_by_length)
        implied = _apply(rules, base)
        names: dict[str, str | None] = {
            new: old for new, old in self.names.items() if implied.get(new) != old
        }
        names |= dict.fromkeys(implied.keys() - self.names.keys())
        if len(names) >= len(self.names):
            rules, names = [], dict(self.names)
        return {
            "prefixes": [list(rule) for rule in rules],
            "names": names,
            "views": {name: view.to_json() for name, view in self.views.items()},
        }

    @classmethod
    def from_json(cls, value: Any, base: Mapping[str, Shape]) -> BaseMapping:
        """Undo :meth:`to_json`.

        Raises:
            ValueError: The value is no mapping, or it is none for a base of these shapes.
            KeyError: A field is missing.
        """
        entry = check_object(value)
        rules = [(check_string(new), check_string(old)) for new, old in entry["prefixes"]]
        if len(rules) > len(base):
            raise ValueError("a mapping has more prefixes than the base has tensors")
        names = _apply(rules, base)
        for new, named in check_object(entry["names"]).items():
            names.pop(new, None)
            if named is not None:
                names[new] = check_tensor_name(named)
        for new, old in names.items():
            check_tensor_name(new)
            if old not in base:
                raise ValueError(f"a mapping names {old!r:.80}, which the base lacks")
        views = {
            check_tensor_name(name): View.from_json(view)
            for name, view in check_object(entry["views"]).items()
        }
        for view in views.values():
            for part in view.parts:
                if part.tensor not in base:
                    raise ValueError(f"a view names {part.tensor!r:.80}, which the base lacks")
                part.check(base[part.tensor])
        return cls(names=names, views=views)


NOTHING = BaseMapping(names={}, views={})
"""The mapping of a checkpoint whose tensors have the base's names and shapes, or no base."""


def exchanged_prefixes(new: str, old: str) -> tuple[str, str]:
    """Return the beginnings of two names before the segments that both end with."""
    mine, other = new.split("."), old.split(".")
    while mine and other and mine[-1] == other[-1]:
        mine.pop()
        other.pop()
    return "".join(f"{part}." for part in mine), "".join(f"{part}." for part in other)


def _by_length(rule: tuple[str, str]) -> tuple[int, tuple[str, str]]:
    return -len(rule[1]), rule


def _apply(rules: list[tuple[str, str]], base: Mapping[str, Shape]) -> dict[str, str]:
    """Return the names of a base with prefixes exchanged by the first rule that fits each."""
    by_old: dict[str, str] = {}
    for new, old in rules:
        by_old.setdefault(old, new)
    lengths = sorted({len(old) for old in by_old}, reverse=True)
    found: dict[str, str] = {}
    for name in sorted(base):
        fits = (name[:length] for length in lengths if name[:length] in by_old)
        for old in itertools.islice(fits, 1):
            found[by_old[old] + name[len(old) :]] = name
    return found
