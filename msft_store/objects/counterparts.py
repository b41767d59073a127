"""Find the counterparts of a checkpoint's tensors among the tensors of a base.

Equal names come first, then renamed tensors, then parts: a tensor that consists of tensors of the
base, or is a part of one. Content decides: both sides are sampled, and two ranges are counterparts
if their samples are nearer to each other than unrelated weights can be. Invariants: no tensor is
read as a whole, the result depends on the samples only, and a tensor that the base knows under its
own name and shape costs nothing.

Example::

    mapping = find_mapping(state_side, base_side)
    mapping.views["model.layers.0.mlp.experts.down_proj"].parts[0].tensor
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import add

import numpy as np
from numpy.typing import NDArray

from msft_store.format.dtypes import DType
from msft_store.format.mapping import BaseMapping, Shape, View, ViewPart, exchanged_prefixes
from msft_store.objects.base_reader import can_convert

Values = NDArray[np.float64]
Indices = NDArray[np.int64]
Sample = Callable[[str, Indices], Values]
"""Returns elements of a tensor by their row-major indices; NaN for those that are elsewhere."""

_PROBE = 64
"""Elements of the sample that selects a candidate."""
_RUNS, _RUN = 8, 32
"""Number and length of the runs of elements that confirm a candidate."""
_NEAR = 0.25
"""Largest distance of counterparts; that of unrelated weights is about 1."""
_FIRST_STEPS, _MAX_STEPS = 8, 512
"""Most positions without a counterpart in one tensor, before the first one and in all."""
_MAX_BLOCKS = 1024
"""Largest number of equal blocks that a tensor is cut into."""
_MAX_VOTES = 8
"""Largest number of votes of one name."""
_MAX_SAMPLES, _MAX_SAMPLES_OF_TENSOR = 4096, 16
"""Most samples of a search, and the samples that each tensor of either side adds to them.

They are many times those of a successful search; one without any success would take minutes."""
_SHORTEST_ROW = 16
_MAX_ROWS = 1 << 15
"""Least number of elements of rows, and most rows, that are looked for one by one."""
_MAX_ROW_RUNS = 4096
_ROWS_AT_ONCE, _ROWS_TRIED = 1024, 16
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_NATURAL = re.compile(r"(\d+)")


@dataclass(frozen=True, kw_only=True)
class Side:
    """The tensors of a checkpoint, or those of a base, by name.

    ``boxes`` has the offset and shape of the boxes that this process holds. A tensor that it holds
    as a whole needs no entry.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, DType]
    sample: Sample
    boxes: Mapping[str, Sequence[tuple[Shape, Shape]]] = field(default_factory=dict)

    def pieces(self, names: Iterable[str]) -> tuple[Side, dict[str, tuple[str, Shape]]]:
        """Return the boxes of tensors as tensors of their own, with the place of each."""
        places: dict[str, tuple[str, Shape]] = {}
        shapes: dict[str, Shape] = {}
        for name in names:
            whole = ((0,) * len(self.shapes[name]), self.shapes[name])
            for number, (offset, shape) in enumerate(self.boxes.get(name, (whole,))):
                # No name of a tensor has a null character.
                key = name if shape == self.shapes[name] else f"{name}\0{number}"
                places[key], shapes[key] = (name, offset), shape

        def sample(key: str, index: Indices) -> Values:
            name, offset = places[key]
            if shapes[key] == self.shapes[name]:
                return self.sample(name, index)
            inner = map(add, np.unravel_index(index, shapes[key]), offset)
            return self.sample(name, np.ravel_multi_index(tuple(inner), self.shapes[name]))

        dtypes = {key: self.dtypes[name] for key, (name, _) in places.items()}
        return Side(shapes=shapes, dtypes=dtypes, sample=sample), places


@dataclass(frozen=True, slots=True)
class _Seen:
    """A tensor as it is, or turned: with its last two axes exchanged."""

    name: str
    shape: Shape
    turned: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def flat(self, index: Indices) -> Indices:
        """Return the row-major indices in the tensor as it is."""
        if not self.turned:
            return index
        rows, columns = self.shape[-2:]
        lead, rest = np.divmod(index, rows * columns)
        row, column = np.divmod(rest, columns)
        found: Indices = lead * (rows * columns) + column * rows + row
        return found


@dataclass(frozen=True, slots=True)
class _Range:
    """Consecutive elements of a seen tensor."""

    seen: _Seen
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class _Hit:
    """A range of a large tensor that is the counterpart of a range of a small one."""

    at: int
    small: _Range


def find_mapping(mine: Side, base: Side) -> BaseMapping:
    """Return the counterparts in a base of the tensors of a checkpoint."""
    names = match_names(mine.shapes, base.shapes, exchanged=True)
    ours, theirs = _Probed(mine), _Probed(base)
    rivals: dict[tuple[str | None, Shape], list[str]] = {}
    for free in base.shapes.keys() - {n for n, o in names.items() if n == o}:
        rivals.setdefault((layer_of(free), base.shapes[free]), []).append(free)
    renamed = {
        name: other
        for name, other in names.items()
        if name != other
        and _is_nearest(
            ours, name, theirs, other, rivals.get((layer_of(other), base.shapes[other]), [])
        )
    }
    rest = [n for n in mine.shapes if n not in renamed and names.get(n) != n]
    views: dict[str, View] = {}
    if rest:
        pieces, places = mine.pieces(rest)
        taken = {other for name, other in names.items() if name == other or name in renamed}
        left = [name for name in base.shapes if name not in taken]
        found = _Finder(pieces, base).find(list(places), left)
        parts: dict[str, list[ViewPart]] = {}
        for key in sorted(found):
            name, offset = places[key]
            moved = (replace(p, offset=tuple(map(add, p.offset, offset))) for p in found[key].parts)
            parts.setdefault(name, []).extend(moved)
        views = {name: View(mine.shapes[name], tuple(found)) for name, found in parts.items()}
    for name in [*views]:
        other = _whole(views[name], mine.shapes[name], base)
        if other is not None:
            renamed[name] = other
            del views[name]
    return BaseMapping(names=renamed, views=views)


def _whole(view: View, shape: Shape, base: Side) -> str | None:
    """Return the base's tensor that a view shows as it is, or ``None``."""
    part = view.parts[0]
    plain = part.axes is None and part.view is None and part.shape == shape
    return part.tensor if plain and base.shapes[part.tensor] == shape else None


def match_names(
    shapes: Mapping[str, Shape], base: Mapping[str, Shape], *, exchanged: bool = False
) -> dict[str, str]:
    """Return the name of the base's tensor that matches each tensor's name.

    Shapes must be equal. Equal names match first. Other names match if one side has an additional
    prefix, such as ``model.`` or ``module.``, or, with ``exchanged``, if they differ in any prefix.
    The prefix that matches most names is tried first.
    """
    matches = {name: name for name, shape in shapes.items() if base.get(name) == shape}
    rest = [name for name in shapes if name not in matches]
    tails: dict[tuple[str, Shape], list[str]] = {}
    for other in base if rest else ():
        for tail in _tails(other):
            tails.setdefault((tail, base[other]), []).append(other)
    votes: Counter[tuple[str, str]] = Counter()
    for name in rest:
        found = next((t for tail in _tails(name) if (t := tails.get((tail, shapes[name])))), ())
        numbers = _NUMBER.findall(name)
        # Without a limit, names that differ in a number only would have quadratically many votes.
        same = [other for other in found if _NUMBER.findall(other) == numbers] or found
        prefixes = [exchanged_prefixes(name, other) for other in same[:_MAX_VOTES]]
        votes.update(pair for pair in prefixes if exchanged or "" in pair)
    for added, removed in sorted(votes, key=lambda prefixes: (-votes[prefixes], prefixes)):
        for name in rest:
            if name in matches or not name.startswith(added):
                continue
            other = removed + name[len(added) :]
            if base.get(other) == shapes[name]:
                matches[name] = other
    return matches


def _tails(name: str) -> list[str]:
    """Return the ends of a name that begin with a segment, the longest first."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


class _Probed:
    """Samples of ranges, each taken once."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._probes: dict[_Range, Values] = {}
        self._rows: dict[_Seen, Values] = {}
        self.taken = 0

    def probe(self, part: _Range) -> Values:
        """Return the elements in the middle of a range."""
        if part not in self._probes:
            self._probes[part] = self.at(part, _middle(part.count))
        return self._probes[part]

    def at(self, part: _Range, index: Indices) -> Values:
        """Return elements of a range by their indices in it."""
        self.taken += 1
        found = self.side.sample(part.seen.name, part.seen.flat(part.start + index))
        return np.nan_to_num(found, nan=np.nan, posinf=1e38, neginf=-1e38)

    def rows(self, seen: _Seen) -> Values | None:
        """Return a sample of each row of a matrix, or ``None`` if it has too many or too short."""
        if seen not in self._rows and seen.shape[-1:] >= (_SHORTEST_ROW,):
            count, width = seen.size // seen.shape[-1], seen.shape[-1]
            if len(seen.shape) > 1 and count <= _MAX_ROWS:
                index = np.arange(count)[:, None] * width + _middle(width)
                found = self.at(_Range(seen, 0, seen.size), index.reshape(-1))
                self._rows[seen] = np.nan_to_num(found).reshape(index.shape)
        return self._rows.get(seen)

    def size(self, name: str) -> int:
        return math.prod(self.side.shapes[name])

    def seen(self, name: str) -> _Seen:
        return _Seen(name, self.side.shapes[name], False)

    def turned(self, name: str) -> _Seen | None:
        shape = self.side.shapes[name]
        if len(shape) < 2 or 1 in shape[-2:]:
            return None
        return _Seen(name, (*shape[:-2], shape[-1], shape[-2]), True)


def _middle(count: int) -> Indices:
    begin = max(count // 2 - _PROBE // 2, 0)
    return np.arange(begin, min(begin + _PROBE, count), dtype=np.int64)


def _spread(count: int) -> Indices:
    """Return indices in runs that are spread over ``count`` elements."""
    if count <= _RUNS * _RUN:
        return np.arange(count, dtype=np.int64)
    # The golden ratio avoids positions that are special in matrices, such as the first column.
    starts = [int((at * 0.6180339887498949 % 1) * (count - _RUN)) for at in range(1, _RUNS + 1)]
    return np.concatenate([np.arange(s, s + _RUN, dtype=np.int64) for s in sorted(starts)])


def _distance(one: Values, other: Values) -> Values:
    """Return the squared distance of rows over their squared lengths: 0 if equal, else up to 2."""
    known = ~np.isnan(one) & ~np.isnan(other)
    one, other = np.where(known, one, 0.0), np.where(known, other, 0.0)
    apart = ((one - other) ** 2).sum(axis=-1)
    whole = (one**2).sum(axis=-1) + (other**2).sum(axis=-1)
    found: Values = np.where(whole > 0, apart / np.where(whole > 0, whole, 1.0), 0.0)
    return np.where(known.any(axis=-1), found, 2.0)


def _elements(parts: Sequence[ViewPart]) -> int:
    return sum(math.prod(part.shape) for part in parts)


def _is_constant(values: Values) -> bool:
    known = values[~np.isnan(values)]
    return known.size == 0 or bool((known == known[0]).all())


def _is_nearest(mine: _Probed, name: str, base: _Probed, other: str, rivals: Sequence[str]) -> bool:
    """Return True if the counterpart that names tell is near, and no rival is nearer.

    All vectors of scales are near each other, so the rivals of vectors count.
    """
    one = mine.seen(name)
    if one.size == 0:
        return True
    own = mine.probe(_Range(one, 0, one.size))
    apart = [
        float(_distance(own, base.probe(_Range(base.seen(rival), 0, one.size))))
        for rival in (other, *(rivals if len(one.shape) < 2 else ()))
    ]
    # What another process holds cannot be compared; then the names decide alone.
    return bool(np.isnan(own).all()) or (apart[0] < 2 * _NEAR and apart[0] <= min(apart) + 1e-12)


class _Finder:
    """Searches the tensors without a counterpart for parts of each other."""

    def __init__(self, mine: Side, base: Side) -> None:
        self._mine, self._base = _Probed(mine), _Probed(base)
        self._used: set[_Range] = set()
        self._found: dict[str, list[ViewPart]] = {}
        count = len(mine.shapes) + len(base.shapes)
        self._most = _MAX_SAMPLES + _MAX_SAMPLES_OF_TENSOR * count

    def find(self, names: Sequence[str], others: Sequence[str]) -> dict[str, View]:
        """Return views of the base for tensors without a counterpart.

        ``others`` are the tensors of the base that are no counterpart yet. Those of the same layer
        are tried first, and whole tensors before blocks of them, so that few are left for the rest.
        """
        mine = _ordered(names, self._mine)
        # Large tensors consist of others; vectors may be equal by chance and come last.
        mine.sort(key=lambda name: len(self._mine.side.shapes[name]) < 2)
        left = _ordered(others, self._base)
        for everywhere, cut in ((False, False), (True, False), (False, True), (True, True)):
            pool = _Pool(self._left(left))
            for name in self._incomplete(mine):
                near = pool.names if everywhere else pool.of_layer(name)
                self._keep(name, self._assemble(name, near, cut=cut))
        self._locate([n for n in mine if n not in self._found], self._left(left))
        pool = _Pool(self._left(left))
        for name in self._incomplete(mine):
            self._keep(name, self._by_rows(name, pool))
        for name in self._incomplete(mine):
            self._keep(name, self._tied(name))
        shapes = self._mine.side.shapes
        return {name: View(shapes[name], tuple(parts)) for name, parts in self._found.items()}

    def _keep(self, name: str, parts: list[ViewPart]) -> None:
        """Keep parts if they have more elements than those known before."""
        if _elements(parts) > _elements(self._found.get(name, [])):
            self._found[name] = parts

    def _incomplete(self, names: Sequence[str]) -> list[str]:
        return [n for n in names if _elements(self._found.get(n, [])) < self._mine.size(n)]

    def _left(self, names: Sequence[str]) -> list[str]:
        """Return the tensors of the base that complete tensors do not show as a whole."""
        shown: Counter[str] = Counter()
        incomplete = set(self._incomplete(list(self._found)))
        for part in (p for n, parts in self._found.items() if n not in incomplete for p in parts):
            shown[part.tensor] += math.prod(part.shape)
        return [name for name in names if shown[name] < self._base.size(name)]

    def _tied(self, name: str) -> list[ViewPart]:
        """Return a part that shows a whole tensor of the base, which others may show, too."""
        seen = self._mine.seen(name)
        equal = [n for n, shape in self._base.side.shapes.items() if shape == seen.shape]
        if len(seen.shape) < 2:
            return []
        ranges = [
            _Range(self._base.seen(n), 0, seen.size)
            for n in sorted(equal, key=_natural)
            if self._fits(name, n)
        ]
        hits = self._fill(self._mine, seen, self._base, ranges)
        return [p for hit in hits if (p := _part(seen, hit.at, hit.small))]

    def _by_rows(self, name: str, pool: _Pool) -> list[ViewPart]:
        """Return the parts of a tensor whose rows are in another order, such as interleaved."""
        seen = self._mine.seen(name)
        others = [
            other
            for other in pool.of_layer(name)
            if self._base.side.shapes[other][-1:] == seen.shape[-1:] and self._fits(name, other)
        ]
        rows = self._mine.rows(seen) if others else None
        if rows is None:
            return []
        others = [other for other in others if self._shares_rows(rows, other)]
        least, found = np.full(len(rows), _NEAR), np.full((len(rows), 2), -1)
        for number, other in enumerate(others):
            theirs = self._base.rows(self._base.seen(other))
            if theirs is not None:
                nearest, apart = _nearest(rows, theirs)
                better = apart < least
                least[better] = apart[better]
                found[better] = np.stack([np.full(len(rows), number), nearest], axis=1)[better]
        if (found[:, 0] < 0).mean() > 0.5:
            return []
        runs = _row_runs(found, math.prod(seen.shape[-2:-1]))
        seens = [self._base.seen(other) for other in others]
        parts = [
            part for run in runs[:_MAX_ROW_RUNS] if (part := _row_part(seen, run, seens[run.other]))
        ]
        return parts if len(runs) <= _MAX_ROW_RUNS else []

    def _shares_rows(self, rows: Values, other: str) -> bool:
        """Return True if some rows of the base's tensor are among rows."""
        seen = self._base.seen(other)
        count, width = seen.size // seen.shape[-1], seen.shape[-1]
        some = np.unique(np.linspace(0, count - 1, _ROWS_TRIED).astype(np.int64))
        index = (some[:, None] * width + _middle(width)).reshape(-1)
        theirs = np.nan_to_num(self._base.at(_Range(seen, 0, seen.size), index))
        _, apart = _nearest(theirs.reshape(len(some), -1), rows)
        return bool((apart < _NEAR).any())

    def _assemble(self, name: str, others: Sequence[str], *, cut: bool) -> list[ViewPart]:
        """Return the parts of the base that a tensor consists of."""
        best: list[ViewPart] = []
        fitting = [other for other in others if self._fits(name, other)]
        for big, smalls in self._pairs(self._mine, name, self._base, fitting):
            ranges = [r for small in smalls for r in _ranges(small, big, cut=cut)]
            hits = self._fill(self._mine, big, self._base, ranges)
            parts = [p for hit in _joined(hits, big) if (p := _part(big, hit.at, hit.small))]
            best = max(best, parts, key=_elements)
            if _elements(best) == big.size:
                break
        return best

    def _locate(self, names: Sequence[str], others: Sequence[str]) -> None:
        """Find tensors that are parts of one tensor of the base."""
        pool = _Pool(list(names))
        for other in others:
            for group in pool.near(other):
                smalls = [n for n in group if n not in self._found and self._fits(n, other)]
                for big, seen in self._pairs(self._base, other, self._mine, smalls):
                    ranges = [_Range(small, 0, small.size) for small in seen]
                    for hit in self._fill(self._base, big, self._mine, ranges):
                        small = hit.small.seen
                        whole = _Range(big, hit.at, hit.small.count)
                        part = _part(small, 0, whole)
                        if part is not None:
                            self._keep(small.name, [part])

    def _fits(self, name: str, other: str) -> bool:
        return can_convert(self._base.side.dtypes[other], self._mine.side.dtypes[name])

    @staticmethod
    def _pairs(
        large: _Probed, name: str, small: _Probed, others: Sequence[str]
    ) -> Iterator[tuple[_Seen, list[_Seen]]]:
        """Yield a tensor and candidates, as they are and turned, that may be parts of it."""
        plain = [small.seen(other) for other in others]
        turned = [seen for seen in map(small.turned, others) if seen is not None]
        for big in (large.seen(name), large.turned(name)):
            if big is not None:
                for smalls in (turned, plain) if big.turned else (plain, turned):
                    yield big, [seen for seen in smalls if _may_be_part(seen, big)]

    def _fill(
        self, large: _Probed, big: _Seen, small: _Probed, ranges: Sequence[_Range]
    ) -> list[_Hit]:
        """Return the ranges that a tensor consists of, from its first element on."""
        groups: dict[int, list[_Range]] = {}
        for part in ranges:
            groups.setdefault(part.count, []).append(part)
        probes = {n: np.stack([small.probe(p) for p in group]) for n, group in groups.items()}
        sizes = sorted(groups, reverse=True)
        hits: list[_Hit] = []
        at, misses, total = 0, 0, big.size
        while sizes and at < total and misses < (_MAX_STEPS if hits else _FIRST_STEPS):
            if self._mine.taken + self._base.taken > self._most:
                break
            hit = None
            for count in sizes:
                if at + count <= total and _box(big.shape, at, count) is not None:
                    here = _Range(big, at, count)
                    hit = self._best(large, here, small, groups[count], probes[count])
                    if hit is not None:
                        break
            if hit is None:
                misses += 1
                at += math.gcd(*sizes)
            else:
                self._used.add(hit)
                hits.append(_Hit(at, hit))
                at += hit.count
        return hits

    def _best(
        self,
        large: _Probed,
        here: _Range,
        small: _Probed,
        candidates: Sequence[_Range],
        probes: Values,
    ) -> _Range | None:
        own = large.at(here, _middle(here.count))
        apart = _distance(own[None], probes)
        least = apart.min()
        if least >= _NEAR:
            return None
        # Equal candidates are taken in the order of their names, each once if there are enough.
        equal: list[int] = np.flatnonzero(apart <= least + 1e-12).tolist()
        free = [n for n in equal if candidates[n] not in self._used]
        for number in [*free, *equal][:4]:
            found = candidates[number]
            index = _spread(here.count)
            one, two = large.at(here, index), small.at(found, index)
            if _is_constant(two) and here.count > 1 and len(here.seen.shape) > 1:
                near = bool((one == two).all())
            else:
                near = float(_distance(one, two)) < _NEAR
            if near:
                return found
        return None


class _Pool:
    """Names of tensors, those of the same layer first."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    @cached_property
    def _by_number(self) -> dict[str | None, list[str]]:
        found: dict[str | None, list[str]] = {}
        for name in self.names:
            found.setdefault(layer_of(name), []).append(name)
        return found

    def of_layer(self, name: str) -> list[str]:
        """Return the names with the first number of a name."""
        return self._by_number.get(layer_of(name), [])

    def near(self, name: str) -> Iterator[list[str]]:
        """Yield the names with the first number of a name, then all names."""
        layer = self.of_layer(name)
        if layer:
            yield layer
        if len(layer) < len(self.names):
            yield self.names


def layer_of(name: str) -> str | None:
    """Return the first number among the segments of a name, that of the layer in most models."""
    found = _NUMBER.search(name)
    return found[0] if found else None


def _ordered(names: Iterable[str], side: _Probed) -> list[str]:
    """Return the names of the tensors that have elements, in natural order."""
    return sorted((name for name in names if side.size(name)), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in names by their value."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in _NATURAL.split(name) if part
    ]


def _may_be_part(small: _Seen, big: _Seen) -> bool:
    if small.size == big.size:
        return True
    if not small.shape or not big.shape:
        return False
    if len(small.shape) == 1 and small.size < big.size:
        return len(big.shape) == 1 or big.shape[-1] % small.size == 0
    return small.shape[-1] == big.shape[-1]


def _ranges(small: _Seen, big: _Seen, *, cut: bool) -> list[_Range]:
    """Return a tensor as one range, or cut into blocks that ``big`` may consist of."""
    if not cut:
        return [_Range(small, 0, small.size)] if small.size <= big.size else []
    if len(small.shape) < 2 or len(big.shape) < 2:
        return []
    unit = math.gcd(small.shape[-2], big.shape[-2]) * small.shape[-1]
    if small.shape[-1] != big.shape[-1] or small.size // unit > _MAX_BLOCKS:
        return []
    return [_Range(small, at, unit) for at in range(0, small.size, unit)]


def _box(shape: Shape, start: int, count: int) -> tuple[Shape, Shape] | None:
    """Return consecutive elements of a tensor as a box, or ``None`` if they are none."""
    inner, axis = 1, len(shape)
    while axis and count % (inner * shape[axis - 1]) == 0 == start % (inner * shape[axis - 1]):
        axis -= 1
        inner *= shape[axis]
    offset, size = [0] * len(shape), list(shape)
    rest, length = start // inner, count // inner
    if count % inner or start % inner or (axis == 0 and length != 1):
        return None
    for at in reversed(range(axis)):
        rest, offset[at] = divmod(rest, shape[at])
        size[at], length = length, 1
        if offset[at] + size[at] > shape[at]:
            return None
    return tuple(offset), tuple(size)


def _nearest(rows: Values, others: Values) -> tuple[Indices, Values]:
    """Return the nearest other row of each row, and its distance."""
    lengths = (others**2).sum(axis=1)
    nearest = np.empty(len(rows), np.int64)
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[at : at + _ROWS_AT_ONCE]
        nearest[at : at + len(some)] = (lengths - 2 * some @ others.T).argmin(axis=1)
    return nearest, _distance(rows, others[nearest])


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows whose counterparts are in one tensor, a constant step apart."""

    at: int
    count: int
    other: int
    """Number of the tensor."""
    first: int
    """First row there."""
    step: int


def _row_runs(found: Indices, height: int) -> list[_Run]:
    """Return the runs of rows, none of which exceeds a matrix of ``height`` rows.

    ``found`` has the number of the tensor, or -1, and the row there of each row.
    """
    runs: list[_Run] = []
    at = 0
    while at < len(found):
        number, first = found[at].tolist()
        end, step = at + 1, 1
        while number >= 0 and end % height and end < len(found) and found[end, 0] == number:
            if end == at + 1:
                step = int(found[end, 1]) - first
            if step < 1 or found[end, 1] - found[end - 1, 1] != step:
                break
            end += 1
        if number >= 0:
            runs.append(_Run(at, end - at, number, first, step if end - at > 1 else 1))
        at = end
    return runs


def _row_part(big: _Seen, run: _Run, seen: _Seen) -> ViewPart | None:
    """Return the part that shows the rows of a run."""
    width, step = seen.shape[-1], run.step
    if step == 1:
        return _part(big, run.at * width, _Range(seen, run.first * width, run.count * width))
    box = _box(big.shape, run.at * width, run.count * width)
    if box is None or (seen.size // width) % step:
        return None
    return ViewPart(
        tensor=seen.name,
        offset=box[0],
        shape=box[1],
        start=(run.first // step, run.first % step, 0),
        axes=(1, 0, 2),
        view=(seen.size // width // step, step, width),
    )


def _joined(hits: Sequence[_Hit], big: _Seen) -> list[_Hit]:
    """Return hits, with those that continue each other as one."""
    found: list[_Hit] = []
    for hit in hits:
        if found:
            at, before = found[-1].at, found[-1].small
            count = before.count + hit.small.count
            follows = (hit.at, hit.small.seen, hit.small.start) == (
                at + before.count,
                before.seen,
                before.start + before.count,
            )
            joined = _Hit(at, _Range(before.seen, before.start, count))
            if follows and _part(big, at, joined.small) is not None:
                found[-1] = joined
                continue
        found.append(hit)
    return found


def _part(big: _Seen, at: int, small: _Range) -> ViewPart | None:
    """Return the part of a view that shows a range of the base; ``None`` if no box is one."""
    box = _box(big.shape, at, small.count)
    if box is None:
        return None
    offset, shape = box
    seen, total = small.seen, small.seen.size
    own, view, start = _box(seen.shape, small.start, small.count), None, None
    if own is not None and _stripped(own[1]) == _stripped(shape):
        start = own[0]
        rank = len(start)
    elif not seen.turned:
        tail = _stripped(shape)[1:]
        inner = math.prod(tail)
        if small.start % inner or total % inner:
            return None
        view = (total // inner, *tail)
        start, rank = (small.start // inner, *(0 for _ in tail)), len(view)
    else:
        return None
    axes = list(range(rank))
    if seen.turned:
        axes[-2:] = reversed(axes[-2:])
        start = (*start[:-2], start[-1], start[-2])
    if big.turned:
        if rank < 2:
            return None
        axes[-2:] = reversed(axes[-2:])
        offset = (*offset[:-2], offset[-1], offset[-2])
        shape = (*shape[:-2], shape[-1], shape[-2])
    return ViewPart(
        tensor=seen.name,
        offset=offset,
        shape=shape,
        start=start,
        axes=None if axes == sorted(axes) else tuple(axes),
        view=view,
    )


def _stripped(shape: Shape) -> Shape:
    """Return a shape without its leading axes of size 1."""
    first = next((at for at, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]
