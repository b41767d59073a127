"""Look up and count chunk keys by the hundred thousand, as NumPy arrays.

``Keys`` has one row for each key: its 16 bytes as two integers. :class:`KeyTable` is a hash table
in arrays, because filling a dictionary with so many objects, or sorting them, takes longer than all
the rest of a listing. :class:`KeyScanner` reads the keys of a tensor table without parsing it: the
tables of one model differ in their keys only, so it checks that the layout is the previous one. It
returns ``None`` for another layout or JSON that is not canonical, and the caller parses the table.

Example::

    table = KeyTable(view_keys(b"".join(known)), np.arange(len(known)))
    table.find(view_keys(wanted))             # the values, -1 for a key that is absent
    keys = KeyScanner().scan(tensor_table)    # None: parse it
"""

from __future__ import annotations

import binascii
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msft_store.format.layout import KEY_BYTES

Keys = NDArray[np.uint64]
"""Shape ``(n, 2)``."""
Numbers = NDArray[np.int64]

_HALF = np.dtype("<u8")
_PAIR = struct.Struct("<2Q")
_WORD = (1 << 64) - 1
_MIX_HIGH, _MIX_LOW = secrets.randbits(64) | 1, secrets.randbits(64) | 1
"""Random for each process, so that nobody can choose keys that all collide."""
_BATCH = 1 << 15


def view_keys(data: bytes) -> Keys:
    """View concatenated keys as an array."""
    return np.frombuffer(data, _HALF).reshape(-1, KEY_BYTES // _HALF.itemsize)


def key_at(keys: Keys, row: int) -> bytes:
    """Return one key as bytes."""
    key: bytes = keys[row].tobytes()
    return key


def concatenate_keys(parts: Sequence[Keys]) -> Keys:
    """Return all keys of several arrays."""
    return np.concatenate([view_keys(b""), *parts])


def unique_keys(keys: Keys) -> Keys:
    """Return each key once, roughly in order of first occurrence."""
    owners = _Slots(keys).owners
    distinct: Keys = keys[owners == np.arange(len(keys))]
    return distinct


def select_changed_keys(keys: Keys, others: Keys | None) -> Keys:
    """Return the keys that differ from the same rows of ``others``; all if the lengths differ."""
    if others is None or len(others) != len(keys):
        return keys
    distinct: Keys = keys[(keys[:, 0] != others[:, 0]) | (keys[:, 1] != others[:, 1])]
    return distinct


def count_keys(keys: Keys) -> tuple[Keys, Numbers]:
    """Return each key once, and how often it occurs."""
    times = np.bincount(_Slots(keys).owners, minlength=len(keys))
    return keys[times > 0], times[times > 0]


def is_among(keys: Keys, known: Keys) -> NDArray[np.bool_]:
    """Return a mask of the keys that are among ``known``."""
    return KeyTable(known, np.arange(len(known))).contains(keys)


def is_zero(keys: Keys) -> NDArray[np.bool_]:
    """Return a mask of the keys that are all zeros, which stand for no reference."""
    zero: NDArray[np.bool_] = (keys[:, 0] == 0) & (keys[:, 1] == 0)
    return zero


class KeyTable:
    """A map from keys to numbers."""

    def __init__(
        self, keys: Keys, values: Numbers, preference: Sequence[NDArray[Any]] = ()
    ) -> None:
        """Store the value of each key; of equal keys the one smallest in ``preference`` wins.

        The columns of ``preference`` go from most to least significant; the value breaks ties.
        """
        self._slots = _Slots(keys)
        self._values = values.copy()
        owners = self._slots.owners
        twice = np.flatnonzero(np.bincount(owners, minlength=len(keys))[owners] > 1)
        if twice.size:
            columns = (values[twice], *(part[twice] for part in reversed(preference)))
            ordered = twice[np.lexsort((*columns, owners[twice]))]
            found, first = np.unique(owners[ordered], return_index=True)
            self._values[found] = values[ordered[first]]

    def find(self, keys: Keys) -> Numbers:
        """Return the number of each key; -1 for a key that is not in the table."""
        rows = self._slots.find(keys)
        found = np.full(len(keys), -1, np.int64)
        found[rows >= 0] = self._values[rows[rows >= 0]]
        return found

    def get(self, key: bytes) -> int:
        """Return the number of one key; -1 if it is not in the table."""
        row = self._slots.find_one(key)
        return row if row < 0 else int(self._values[row])

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """Return a mask of the keys that are in the table."""
        inside: NDArray[np.bool_] = self._slots.find(keys) >= 0
        return inside


class _Slots:
    """A hash table with linear probing, filled and searched for all keys at once."""

    def __init__(self, keys: Keys) -> None:
        self._high, self._low = _halves(keys)
        # The table is at most half full, so that probing stays short.
        bits = len(keys).bit_length() + 1
        self._mask, self._shift = (1 << bits) - 1, 64 - bits
        self._rows = np.full(self._mask + 1, -1, np.int32)
        self.owners = np.empty(len(keys), np.int64)
        """For each key the row of the equal key that represents it."""
        pending = np.arange(len(keys))
        place = self._home(self._high, self._low)
        while pending.size:
            free = self._rows[place] < 0
            self._rows[place[free]] = pending[free]
            held = self._rows[place]
            same = self._same(held, self._high[pending], self._low[pending])
            self.owners[pending[same]] = held[same]
            pending, place = pending[~same], (place[~same] + 1) & self._mask

    def find(self, keys: Keys) -> Numbers:
        """Return the row that represents each key; -1 if there is none."""
        # The arrays of one batch stay in the processor's cache.
        parts = [self._find(keys[at : at + _BATCH]) for at in range(0, len(keys), _BATCH)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def find_one(self, key: bytes) -> int:
        """Find one key, faster than :meth:`find` with an array of one."""
        high, low = _PAIR.unpack(key)
        place = (high * _MIX_HIGH + low * _MIX_LOW & _WORD) >> self._shift
        while (row := int(self._rows[place])) >= 0:
            if self._low[row] == low and self._high[row] == high:
                return row
            place = (place + 1) & self._mask
        return -1

    def _find(self, keys: Keys) -> Numbers:
        high, low = _halves(keys)
        found = np.full(len(keys), -1, np.int64)
        pending = np.arange(len(keys))
        place = self._home(high, low)
        while pending.size:
            held = self._rows[place]
            taken = held >= 0
            pending, place, held = pending[taken], place[taken], held[taken]
            same = self._same(held, high[pending], low[pending])
            found[pending[same]] = held[same]
            pending, place = pending[~same], (place[~same] + 1) & self._mask
        return found

    def _home(self, high: NDArray[np.uint64], low: NDArray[np.uint64]) -> Numbers:
        mixed = high * np.uint64(_MIX_HIGH) + low * np.uint64(_MIX_LOW)
        home: Numbers = (mixed >> np.uint64(self._shift)).astype(np.int64)
        return home

    def _same(
        self, rows: NDArray[np.int32], high: NDArray[np.uint64], low: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = (self._low[rows] == low) & (self._high[rows] == high)
        return same


def _halves(keys: Keys) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    return np.ascontiguousarray(keys[:, 0]), np.ascontiguousarray(keys[:, 1])


_NAME = b'"chunks"'
_BEGIN = b'"chunks":"'


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layout:
    table: NDArray[np.uint8]
    """An example of a table of this layout."""
    is_key: NDArray[np.bool_]
    """Mask of its bytes that are digits of keys."""
    digits: NDArray[np.int64]
    """Positions of these digits."""


class KeyScanner:
    """Reads keys at the positions that they had in the previous table."""

    def __init__(self) -> None:
        self._layout: _Layout | None = None

    def scan(self, table: bytes) -> Keys | None:
        """Return all keys in order, or ``None`` if the table must be parsed."""
        data, layout = np.frombuffer(table, np.uint8), self._layout
        if layout is None or not _has_layout(data, layout):
            layout = self._layout = _find_layout(table)
        if layout is None:
            return None
        try:
            return view_keys(binascii.unhexlify(data.take(layout.digits).data))
        except binascii.Error:
            return None


def _has_layout(data: NDArray[np.uint8], layout: _Layout) -> bool:
    if data.size != layout.table.size:
        return False
    differs = data != layout.table
    return not (differs & ~layout.is_key).any()


def _find_layout(table: bytes) -> _Layout | None:
    parts = table.split(_BEGIN)
    # With escapes or other white space, other text may look like a key, and a key like other text.
    if b"\\" in table or len(parts) - 1 != table.count(_NAME):
        return None
    is_key = np.zeros(len(table), bool)
    at = len(parts[0])
    for part in parts[1:]:
        length, at = part.find(b'"'), at + len(_BEGIN)
        if length < 0 or length % (2 * KEY_BYTES):
            return None
        is_key[at : at + length] = True
        at += len(part)
    data = np.frombuffer(table, np.uint8)
    return _Layout(table=data, is_key=is_key, digits=np.flatnonzero(is_key))
