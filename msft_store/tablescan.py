"""The keys in a tensor table, taken out without parsing it.

The tables of one model differ in their keys only. So where a table has the keys that the last one
had is checked, in a few operations on arrays, and what another layout needs, or one that is not
canonical JSON, is parsed in full by who asked.

Example::

    scanner = KeyScanner()
    keys = scanner.scan(table)               # None: parse it
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msft_store.format import KEY_BYTES
from msft_store.keytable import Keys, as_keys

_NAME = b'"chunks"'
_BEGIN = b'"chunks":"'


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layout:
    table: NDArray[np.uint8]
    """A table of this layout."""
    is_key: NDArray[np.bool_]
    """Which of its bytes are digits of keys."""
    digits: NDArray[np.int64]
    """Where they stand."""


class KeyScanner:
    """Finds keys where the table before had them."""

    def __init__(self) -> None:
        self._layout: _Layout | None = None

    def scan(self, table: bytes) -> Keys | None:
        """Return all keys in their order, or ``None`` where the table must be parsed."""
        data, layout = np.frombuffer(table, np.uint8), self._layout
        if layout is None or not _fits(data, layout):
            layout = self._layout = _layout(table)
        if layout is None:
            return None
        try:
            return as_keys(binascii.unhexlify(data.take(layout.digits).data))
        except binascii.Error:
            return None


def _fits(data: NDArray[np.uint8], layout: _Layout) -> bool:
    if data.size != layout.table.size:
        return False
    differs = data != layout.table
    return not (differs & ~layout.is_key).any()


def _layout(table: bytes) -> _Layout | None:
    parts = table.split(_BEGIN)
    # With escapes, or with other spaces, what is no key may look like one and the other way round.
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
